"""What a run is going to do, decided and checked before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis.common import dist
from lavis.common.errors import ConfigError, at
from lavis.common.optim import PartRate, Schedule, build_schedule
from lavis.common.schema import Config, RunConfig
from lavis.datasets.plan import BatchPlan
from lavis.models.config import PartsConfig
from lavis.runners.agreement import check_agreement, data_fingerprints, warn_of_another_rate
from lavis.runners.checkpoint import Checkpoint
from lavis.runners.keeper import newest_of, open_checkpoint
from lavis.runners.launch import build_strategy
from lavis.runners.strategy import Strategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What a runner needs besides the model.

    Attributes:
        strategy: not set up yet.
        batches: the samples of every step.
        schedule: the learning rate of every step.
        rates: of the parts that learn, where the model is made of parts.
        before: the checkpoint to resume from.
        step: optimizer steps that it has done.
        data: fingerprints of the training data.
        kept: what earlier stages have trained and this run leaves as it is: checkpoints hold it,
            too, under its name in a file.
        arguments: of ``train.py``, by which it goes on; without, its folder's ``config.yaml``.
    """

    strategy: Strategy
    batches: BatchPlan
    schedule: Schedule
    rates: dict[str, PartRate]
    before: Checkpoint | None
    step: int
    data: dict[str, str]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config, dataset: Any, device: torch.device) -> RunPlan:
        """Plan a run. Every process calls this.

        Raises:
            ConfigError: the strategy, the ratios, the token budget or the schedule does not fit.
            WeightsError: the checkpoint to resume from is damaged or belongs to another run.
        """
        run = config.run
        strategy = build_strategy(run, device)
        if not strategy.keeps_packed:
            _check_unpacked(config)
        source = newest_of(config) if run.resume_ckpt_path == "auto" else run.resume_ckpt_path
        before = None if source is None else open_checkpoint(Path(source))
        data = data_fingerprints(config, dataset)
        if before is not None:
            check_agreement(before, config, data)
        packed = run.max_tokens_per_batch is not None
        batches = BatchPlan(
            sizes=getattr(dataset, "sizes", (len(dataset),)),
            samples_per_step=samples_per_step(run, before),
            batch_size=run.batch_size_train,
            seed=run.seed,
            world_size=dist.world_size(),
            ratios=config.dataset_ratios,
            lengths=dataset.lengths if packed else None,
            max_tokens=run.max_tokens_per_batch,
        )
        schedule = build_schedule(run, batches.steps_per_epoch)
        step = 0
        if before is not None:
            step = before.steps_in(batches)
            warn_of_another_rate(before, run, schedule, step)
        log_notes(schedule.notes())
        rates = part_rates(config, batches.steps_per_epoch)
        return cls(strategy, batches, schedule, rates, before, step, data)


def _check_unpacked(config: Config) -> None:
    model = config.model
    if isinstance(model, PartsConfig) and model.parts[2].quantize:
        raise ConfigError(
            f"{model.key('language', 'quantize')}: ZeRO stage 3 takes no packed weights; train "
            "with run.strategy: ddp or fsdp2, or without quantize"
        )


def part_rates(config: Config, steps_per_epoch: int) -> dict[str, PartRate]:
    """How each part learns.

    Raises:
        ConfigError: naming the part, whose rate or schedule cannot be.
    """
    model, run = config.model, config.run
    if not isinstance(model, PartsConfig):
        return {}
    rates = {}
    for part, how in model.training.items():
        if how.lr and not run.init_lr:
            raise ConfigError(
                f"model.train.{part} learns at {how.lr:g}, but rates are shares of run.init_lr, "
                "which is 0; set it"
            )
        share = 1.0 if not run.init_lr or how.lr is None else how.lr / run.init_lr
        decay = run.weight_decay if how.weight_decay is None else how.weight_decay
        with at(f"model.train.{part}"):
            own = how.schedule(run, share)
            schedule = None if own is None else build_schedule(own, steps_per_epoch)
        rates[part] = PartRate(1.0 if schedule else share, decay, schedule)
        if schedule is not None:
            log_notes(f"model.train.{part}, {note}" for note in schedule.notes())
    return rates


def samples_per_step(run: RunConfig, before: Checkpoint | None) -> int:
    """Samples of an optimizer step over all processes.

    A run that goes on with another number of processes keeps the step of its checkpoint, so that
    it sees the same samples in the same steps.
    """
    share, world = run.batch_size_train * run.accum_grad_iters, dist.world_size()
    then = before.progress if before else None
    if then is None or then.world_size == world or then.samples_per_step != share * then.world_size:
        return share * world
    logger.warning(
        "the run began with %d processes, now there are %d: a step keeps its %d samples "
        "(batch_size_train * accum_grad_iters * processes would be %d)",
        then.world_size, world, then.samples_per_step, share * world,
    )  # fmt: skip
    return then.samples_per_step


def log_notes(notes: Iterable[str]) -> None:
    """Warn, in one process."""
    for note in notes if dist.is_main() else ():
        logger.warning("%s", note)


def without_effect(config: Config, *, answers: bool) -> Iterator[str]:
    """Settings that were given and change nothing.

    Args:
        answers: whether questions are going to be answered.
    """
    run, given = config.run, config.tree.get("run", {})
    greedy = [k for k in ("num_beams", "min_new_tokens", "min_len") if (given.get(k) or 1) > 1]
    if greedy and answers:
        yield f"{', '.join(f'run.{k}' for k in greedy)}: no effect, since answers are greedy"
    if answers and run.max_len not in (None, run.max_new_tokens):
        yield f"run.max_len: no effect beside run.max_new_tokens ({run.max_new_tokens})"
    if run.lr_layer_decay != 1 and not _trains_vit(config.model):
        yield "run.lr_layer_decay: no effect, since the ViT is frozen"


def _trains_vit(model: Any) -> bool:
    vision = getattr(model, "training", {}).get("vision")
    return vision is not None and (
        not vision.parts or not {"vit", "pos_embed"}.isdisjoint(vision.parts)
    )
