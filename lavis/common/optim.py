"""Learning-rate schedules and optimizer parameter groups.

A schedule is a pure function of the step number, so that resuming needs nothing but that number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lavis.common.errors import ConfigError
from lavis.common.registry import LR_SCHEDULERS

if TYPE_CHECKING:
    from torch import nn

    from lavis.common.schema import RunConfig

STEPWISE = "linear_warmup_cosine_lr_step-wise"


def _warmup(run: RunConfig, steps_per_epoch: int) -> int:
    if run.warmup_ratio is None:
        return run.warmup_steps
    return int(run.warmup_ratio * run.max_epoch * steps_per_epoch)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from ``warmup_lr`` to ``init_lr``, then what a subclass says.

    Subclasses that decay by epoch warm up inside epoch 0 only, as the original does.

    Attributes:
        init_lr: rate after the warm-up.
        min_lr: lowest rate.
        warmup_lr: rate of step 0 (``init_lr`` if negative).
        warmup_steps: optimizer steps of warm-up.
        decay_rate: factor per epoch (``linear_warmup_step_lr``).
        max_epoch: epochs of the run.
        steps_per_epoch: optimizer steps of one epoch.
    """

    init_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    decay_rate: float
    max_epoch: int
    steps_per_epoch: int

    warms_up_across_epochs: ClassVar[bool] = False
    decays_by_epoch: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ("min_lr", "lr_decay_rate")

    @classmethod
    def from_run(cls, run: RunConfig, steps_per_epoch: int) -> Schedule:
        """Build the schedule of a run.

        Raises:
            ConfigError: if the warm-up does not fit into the run.
        """
        max_steps, warmup_steps = run.max_epoch * steps_per_epoch, _warmup(run, steps_per_epoch)
        if cls.warms_up_across_epochs and warmup_steps >= max_steps:
            raise ConfigError(
                f"run.warmup_steps: {warmup_steps} steps of warm-up do not fit into a run of "
                f"{max_steps} steps"
            )
        return cls(
            init_lr=run.init_lr,
            min_lr=run.min_lr,
            warmup_lr=run.warmup_lr if run.warmup_lr >= 0 else run.init_lr,
            warmup_steps=warmup_steps,
            decay_rate=run.lr_decay_rate,
            max_epoch=run.max_epoch,
            steps_per_epoch=steps_per_epoch,
        )

    @classmethod
    def notes(cls, run: RunConfig, steps_per_epoch: int) -> Iterator[str]:
        """What the settings of a run do that one might not expect of them."""
        warmup = _warmup(run, steps_per_epoch)
        if run.warmup_ratio is not None and run.warmup_steps:
            yield f"run.warmup_steps: run.warmup_ratio decides ({warmup} steps)"
        if warmup and not 0 <= run.warmup_lr < run.init_lr:
            yield (
                f"run.warmup_steps: {warmup} steps warm nothing up, since run.warmup_lr "
                f"({run.warmup_lr:g}) starts at init_lr; set run.warmup_lr: 0"
            )
        elif warmup > steps_per_epoch and not cls.warms_up_across_epochs:
            then = "the rate jumps at its end" if run.max_epoch > 1 else "init_lr is not reached"
            other = f", or run.lr_sched: {STEPWISE}" * (warmup < run.max_epoch * steps_per_epoch)
            yield (
                f"run.warmup_steps: {warmup}, but an epoch has {steps_per_epoch} steps and "
                f"{run.lr_sched} warms up in the first one only: {then}. Set run.warmup_steps to "
                f"at most {steps_per_epoch}{other}"
            )
        for key, neutral in (("min_lr", 0), ("lr_decay_rate", 1)):
            if key not in cls.uses and getattr(run, key) != neutral:
                yield f"run.{key} has no effect with run.lr_sched: {run.lr_sched}"
        if cls.decays_by_epoch and run.max_epoch == 1:
            yield (
                f"run.lr_sched: {run.lr_sched} decays from epoch to epoch, so a run of one epoch "
                f"keeps init_lr; {STEPWISE} decays by step"
            )
        elif cls.decays_by_epoch and "lr_decay_rate" in cls.uses and run.lr_decay_rate == 1:
            yield f"run.lr_sched: {run.lr_sched} stays at init_lr with run.lr_decay_rate: 1"

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0 over the whole run."""
        epoch = step // self.steps_per_epoch
        warming = 0 < self.warmup_steps >= step  # not in step 0 of a run without warm-up
        if warming and (epoch == 0 or self.warms_up_across_epochs):
            share = step / self.warmup_steps
            return min(self.init_lr, self.warmup_lr + (self.init_lr - self.warmup_lr) * share)
        return self.after_warmup(epoch, step)

    def after_warmup(self, epoch: int, step: int) -> float:
        """Learning rate once the warm-up is over."""
        raise NotImplementedError

    def _cosine(self, progress: float) -> float:
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (
            1.0 + math.cos(math.pi * progress)
        )


@LR_SCHEDULERS.register("constant_lr")
class ConstantLR(Schedule):
    """``init_lr`` throughout."""

    uses: ClassVar[tuple[str, ...]] = ()

    def after_warmup(self, epoch: int, step: int) -> float:
        return self.init_lr


@LR_SCHEDULERS.register("linear_warmup_step_lr")
class LinearWarmupStepLR(Schedule):
    """``init_lr * decay_rate ** epoch``, not below ``min_lr``."""

    decays_by_epoch: ClassVar[bool] = True

    def after_warmup(self, epoch: int, step: int) -> float:
        return max(self.min_lr, self.init_lr * self.decay_rate**epoch)


@LR_SCHEDULERS.register("linear_warmup_cosine_lr")
class LinearWarmupCosineLR(Schedule):
    """Cosine over epochs: constant within an epoch."""

    decays_by_epoch: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("min_lr",)

    def after_warmup(self, epoch: int, step: int) -> float:
        return self._cosine(epoch / self.max_epoch)


@LR_SCHEDULERS.register(STEPWISE)
class StepwiseLinearWarmupCosineLR(Schedule):
    """Warm-up and cosine both by step."""

    uses: ClassVar[tuple[str, ...]] = ("min_lr",)
    warms_up_across_epochs: ClassVar[bool] = True

    def after_warmup(self, epoch: int, step: int) -> float:
        max_steps = self.max_epoch * self.steps_per_epoch
        return self._cosine((step - self.warmup_steps) / (max_steps - self.warmup_steps))


def build_schedule(run: RunConfig, steps_per_epoch: int) -> Schedule:
    """The schedule that ``run.lr_sched`` names."""
    return LR_SCHEDULERS.get(run.lr_sched).from_run(run, steps_per_epoch)


_NORM = re.compile(r"(^|[._])(ln|bn|norm|layernorm)\w*", re.IGNORECASE)
_VIT = re.compile(r"(^|\.)visual_encoder\.(blocks\.(\d+)\.)?")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    layer_decay: float = 1.0,
    vit_depth: int = 0,
    rates: Mapping[str, tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters for AdamW.

    Biases, norms and 1-d tensors get no weight decay. With ``layer_decay`` < 1 the vision
    encoder's block ``i`` learns at ``layer_decay ** (vit_depth - i)`` of the rate, its embeddings
    at ``layer_decay ** (vit_depth + 1)`` (Bao et al. 2021, BEiT).

    Args:
        rates: of parts that have their own, by the first word of a name: what the learning rate is
            multiplied by, and the weight decay.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr_scale``. Without layer decay these are
        the original's two, decayed first, so that either project reads the other's optimizer.
    """
    first = (1.0, weight_decay, True), (1.0, weight_decay, False)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {key: [] for key in first}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith("bias") or _NORM.search(name) is not None
        scale, decay = (rates or {}).get(name.partition(".")[0], (1.0, weight_decay))
        if layer_decay != 1.0 and (found := _VIT.search(name)):
            scale *= layer_decay ** (vit_depth - int(found[3]) if found[3] else vit_depth + 1)
        groups.setdefault((scale, decay, not plain), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decay, decayed), params in groups.items()
        if params or (scale, decay, decayed) in first
    ]
