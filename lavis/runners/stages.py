"""Train one stage after another, each from the weights of the one before."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavis.common import dist
from lavis.common.errors import ConfigError
from lavis.common.registry import MODELS, RUNNERS, TASKS
from lavis.common.schema import Config
from lavis.common.stages import in_stage, select_stages, whole_run
from lavis.models.config import PartsConfig
from lavis.models.weights.agreement import check_settings
from lavis.models.weights.files import WeightFile, open_pth
from lavis.models.weights.trained import assign_model_state, frozen_entries, trainable_state
from lavis.runners.keeper import newest_among, open_checkpoint
from lavis.runners.launch import distributed, make_folder, new_job_id, strategy_name
from lavis.runners.prepare import RunPlan, log_notes, without_effect

logger = logging.getLogger(__name__)


class _Start(NamedTuple):
    """Where training begins: at a stage.

    Attributes:
        stage: the first that is trained.
        weights: the checkpoint of the stage before, to begin with.
        resume: a checkpoint of this stage, to go on from.
    """

    stage: str
    weights: Path | None = None
    resume: Path | None = None


def train_stages(stages: Mapping[str, Config], only: str | None = None) -> tuple[Path, bool]:
    """Check all stages, then train them, each in its folder of the run's folder.

    Args:
        only: train this one alone.

    Returns:
        The last checkpoint, and whether a signal has stopped the run.

    Raises:
        LavisError: as a run of one stage; the message names the stage.
    """
    chosen = select_stages(stages, only)
    tasks = check_stages(chosen)
    world, placed = dist.launched_world_size(), next(iter(chosen.values())).run
    for name, config in chosen.items():
        with in_stage(name):
            if strategy_name(config.run, world) in ("fsdp2", "deepspeed"):
                placed = config.run  # these need a process group for a single process, too
    with distributed(placed) as device:
        tree = whole_run(stages)
        start = dist.by_main(lambda: _start(stages, only, tree))
        names = list(chosen)[list(chosen).index(start.stage) :]
        prepared: dict[str, tuple[Config, Any, RunPlan]] = {}
        for name in names:
            resume = str(start.resume) if start.resume and name == start.stage else None
            config = chosen[name]
            config = replace(config, run=replace(config.run, resume_ckpt_path=resume))
            with in_stage(name):
                with dist.main_first():
                    data = tasks[name].build_datasets()
                prepared[name] = config, data, RunPlan.of(config, data, device)
                log_notes(without_effect(config, answers=bool(config.run.test_splits)))
        job = new_job_id(placed)
        folder = Path(placed.output_dir) / job
        make_folder(folder, tree)
        arguments = ["--cfg-path", str(folder / "config.yaml")]
        arguments += [] if only is None else ["--stage", only]
        checkpoint = start.weights
        for number, name in enumerate(names, start=len(chosen) - len(names) + 1):
            logger.info("stage %s, %d of %d: %s", name, number, len(chosen), folder / name)
            with in_stage(name):
                checkpoint, interrupted = _train(
                    *prepared.pop(name), device, f"{job}/{name}", checkpoint, arguments
                )
            if interrupted:
                return checkpoint, True
            gc.collect()  # a sharded model is in circles of references
            if device.type == "cuda":
                torch.cuda.empty_cache()
    assert checkpoint is not None
    return checkpoint, False


def _train(
    config: Config,
    data: Any,
    plan: RunPlan,
    device: torch.device,
    job: str,
    start: Path | None,
    arguments: Sequence[str],
) -> tuple[Path, bool]:
    """Train a stage, beginning with a checkpoint of the one before, if there was one."""
    run, made = config.run, config.model
    assert isinstance(made, PartsConfig)
    if start is not None:
        made = replace(made, load_finetuned=True, finetuned=str(start.absolute()))
        config = replace(config, model=made)
    task = TASKS.get(run.task)(config)
    torch.manual_seed(run.seed)
    model = task.build_model(device, data, mapped=plan.strategy.shards, start=True)
    before: Mapping[str, Tensor] = {}
    if plan.before is not None:
        before = plan.before.model
    elif path := made.finetuned_path(config.env.cache_root):
        before = open_pth(path)
    plan = replace(plan, kept=frozen_entries(model, before), arguments=tuple(arguments))
    runner = RUNNERS.get(run.runner)(config, task, model, data, job, plan)
    return runner.train(), runner.interrupted


def check_stages(stages: Mapping[str, Config]) -> dict[str, Any]:
    """Check settings and files of stages, and that each can begin where the one before ends.

    Returns:
        The task of each.

    Raises:
        LavisError: naming the stage.
    """
    tasks = {}
    for name, config in stages.items():
        with in_stage(name):
            if not isinstance(config.model, PartsConfig):
                raise ConfigError(f"model arch {config.model.arch!r} is not made of parts")
            tasks[name] = TASKS.get(config.run.task)(config)
            tasks[name].check_paths()
    if len(stages) > 1:
        _check_succession(stages)
    return tasks


def _check_succession(stages: Mapping[str, Config]) -> None:
    """Give each stage's model, without numbers, the names and shapes that the one before trains."""
    held: dict[str, Tensor] = {}
    before: tuple[str, Config] | None = None
    vision_learned = False
    for name, config in stages.items():
        with in_stage(name):
            made, root = config.model, config.env.cache_root
            assert isinstance(made, PartsConfig)
            if before is None and (path := made.finetuned_path(root)):
                held = dict(open_pth(path))
            cached = config.run.feature_cache.enabled
            if cached and vision_learned:
                raise ConfigError(
                    "run.feature_cache: an earlier stage trains the vision side, and the cache "
                    "reads that from its own weight files alone; set run.feature_cache.enabled: "
                    "false"
                )
            vision_learned |= bool(made.trained_vision)
            model = MODELS.get(made.arch).outline(made, cache_root=root, vision=not cached)
            if before is not None:
                _check_begins(f"what stage {before[0]} ends with", before[1], made, model, held)
            learns = trainable_state(model, lambda parameter: parameter.detach())
            held |= {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in learns.items()}
            before = name, config


def _check_begins(
    label: str, before: Config, made: PartsConfig, model: Any, held: dict[str, Tensor]
) -> None:
    earlier, new = before.model, made.new_parts
    assert isinstance(earlier, PartsConfig)
    if earlier.lora is not None and made.lora is None:
        raise ConfigError(
            f"{label} are adapters, too, without which the language model is another one: keep "
            "model.train.language.lora (with lr: 0 they stay as they are), or model.get_lora"
        )
    content = {"config": before.tree}
    check_settings(label, content, made, new_adapters="language" in new)
    assign_model_state(model, WeightFile.of(label, held), new_parts=new)


def _start(stages: Mapping[str, Config], only: str | None, tree: dict[str, Any]) -> _Start:
    """Where ``run.resume_ckpt_path`` says to go on."""
    names = list(stages)
    last = names.index(only) if only else len(names) - 1
    near = names[max(last - 1, 0) : last + 1] if only else names  # whose checkpoints are of use
    run = stages[names[0]].run
    found = None
    if run.resume_ckpt_path == "auto":
        found = newest_among(Path(run.output_dir), tree, near[::-1])
    elif run.resume_ckpt_path is not None:
        found = Path(run.resume_ckpt_path).absolute()
    if found is None:
        if last and only and not getattr(stages[only].model, "load_finetuned", False):
            raise ConfigError(
                f"--stage {only} begins with a checkpoint of stage {names[last - 1]}: set "
                "run.resume_ckpt_path to one in the folder of that stage, or to auto, which looks "
                f"for one of this configuration in {run.output_dir}; or set model.load_finetuned: "
                "true and model.finetuned to any other"
            )
        return _Start(only or names[0])
    name = found.parent.name
    if only and name not in names:
        name = only
    if name not in near:
        raise ConfigError(
            f"run.resume_ckpt_path: {found} is in no folder of {' or '.join(near)}; a checkpoint "
            "that lies elsewhere needs --stage, which says of which stage it is"
        )
    before, run, number = open_checkpoint(found), stages[name].run, names.index(name)
    epochs = before.progress.epochs_done if before.progress else before.epoch + 1
    scored = not run.test_splits or (found.parent / "evaluation" / "scores.json").is_file()
    if number == last or (not only and not (epochs >= run.max_epoch and scored)):
        return _Start(name, resume=found)
    if epochs < run.max_epoch:
        raise ConfigError(
            f"{found}: stage {name} is not at its end ({epochs} of {run.max_epoch} epochs): train "
            "it first, or begin with it all the same by model.finetuned"
        )
    return _Start(names[number + 1], weights=found)
