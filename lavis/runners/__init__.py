"""The training loop and checkpoints."""

from lavis.common.registry import RUNNERS

RUNNERS.register("runner_base", "lavis.runners.runner_base:RunnerBase")
RUNNERS.register("deepspeed_runner", "lavis.runners.runner_base:RunnerBase")  # the original's name
