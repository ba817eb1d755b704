"""One process of several that trains the same model twice: built whole, and built in slices.

``python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.runners.sharded_worker
OUTPUT CFG_PATH OPTION...``; every OPTION is one of ``--options``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis.common import dist
from lavis.common.config import load_config
from lavis.common.registry import RUNNERS, TASKS
from lavis.models.weights.files import final_dtype
from lavis.runners.prepare import RunPlan
from lavis.runners.runner_base import RunnerBase


def train(output: Path, cfg_path: str, options: list[str], *, mapped: bool) -> list[Any]:
    """Whole weights before and after training, and what has been found out of the family."""
    config: Any = load_config(cfg_path, [*options, f"run.output_dir={output / str(mapped)}"])
    task = TASKS.get(config.run.task)(config)
    task.check_paths()
    data, device = task.build_datasets(), torch.device("cpu")
    plan = RunPlan.of(config, data, device)
    torch.manual_seed(config.run.seed)
    model = task.build_model(device, data, mapped=mapped)
    types = {n: final_dtype(p) for n, p in model.named_parameters()}
    runner: RunnerBase = RUNNERS.get(config.run.runner)(config, task, model, data, "job", plan)

    def weights() -> dict[str, Tensor]:
        each = model.named_parameters(remove_duplicate=False)
        return {n: runner.strategy.whole(p).clone() for n, p in each}

    before = weights()
    assert {n: before[n].dtype for n in types} == types
    local = sum(p.to_local().numel() for p in model.parameters())
    assert local < 0.51 * sum(p.numel() for p in model.parameters())
    checkpoint = runner.train()
    assert checkpoint.is_file()
    llm = model.language
    return [before, weights(), llm.proven, llm.packs, llm.caches, llm.logit_scale]


def main() -> None:
    """Compare, bit for bit."""
    torch.set_num_threads(1)
    output, cfg_path, *options = sys.argv[1:]
    with dist.process_group("cpu"):
        whole, slices = (
            train(Path(output), cfg_path, options, mapped=mapped) for mapped in (False, True)
        )
        assert whole[2:] == slices[2:]
        for one, other in zip(whole[:2], slices[:2], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[n], other[n]) for n in one)
        moved = [n for n in whole[0] if not torch.equal(whole[0][n], whole[1][n])]
        for one, other in [(whole[0], whole[1])] if dist.is_main() else []:
            print("same:", len(one), "moved:", len(moved), "of", len(other))


if __name__ == "__main__":
    main()
