"""Learning-rate schedules and optimizer parameter groups.

A schedule is a pure function of the step number, so that resuming needs nothing but that number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lavis.common.errors import ConfigError
from lavis.common.registry import LR_SCHEDULERS

if TYPE_CHECKING:
    from torch import nn

    from lavis.common.schema import RunConfig

STEPWISE = "linear_warmup_cosine_lr_step-wise"


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from ``warmup_lr`` to ``init_lr``, then what a subclass says.

    Subclasses that decay by epoch warm up inside epoch 0 only, as the original does.

    Raises:
        ConfigError: if the warm-up does not fit into the run.
    """

    run: RunConfig
    steps_per_epoch: int

    warms_up_across_epochs: ClassVar[bool] = False
    decays_by_epoch: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ("min_lr", "lr_decay_rate")

    def __post_init__(self) -> None:
        if self.warms_up_across_epochs and self.warmup_steps >= self.max_steps:
            raise ConfigError(
                f"run.warmup_steps: {self.warmup_steps} steps of warm-up do not fit into a run of "
                f"{self.max_steps} steps"
            )

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.run.max_epoch * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up."""
        ratio = self.run.warmup_ratio
        return self.run.warmup_steps if ratio is None else int(ratio * self.max_steps)

    def notes(self) -> Iterator[str]:
        """What the settings do that one might not expect of them."""
        run, warmup = self.run, self.warmup_steps
        if run.warmup_ratio is not None and run.warmup_steps:
            yield f"run.warmup_steps: run.warmup_ratio decides ({warmup} steps)"
        if warmup and not 0 <= run.warmup_lr < run.init_lr:
            yield (
                f"run.warmup_steps: {warmup} steps warm nothing up, since run.warmup_lr "
                f"({run.warmup_lr:g}) starts at init_lr; set run.warmup_lr: 0"
            )
        elif warmup > self.steps_per_epoch and not self.warms_up_across_epochs:
            then = "the rate jumps at its end" if run.max_epoch > 1 else "init_lr is not reached"
            other = f", or run.lr_sched: {STEPWISE}" * (warmup < self.max_steps)
            yield (
                f"run.warmup_steps: {warmup}, but an epoch has {self.steps_per_epoch} steps and "
                f"{run.lr_sched} warms up in the first one only: {then}. Set run.warmup_steps to "
                f"at most {self.steps_per_epoch}{other}"
            )
        for key, neutral in (("min_lr", 0), ("lr_decay_rate", 1)):
            if key not in self.uses and getattr(run, key) != neutral:
                yield f"run.{key} has no effect with run.lr_sched: {run.lr_sched}"
        if self.decays_by_epoch and run.max_epoch == 1:
            yield (
                f"run.lr_sched: {run.lr_sched} decays from epoch to epoch, so a run of one epoch "
                f"keeps init_lr; {STEPWISE} decays by step"
            )
        elif self.decays_by_epoch and "lr_decay_rate" in self.uses and run.lr_decay_rate == 1:
            yield f"run.lr_sched: {run.lr_sched} stays at init_lr with run.lr_decay_rate: 1"

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0 over the whole run."""
        epoch = step // self.steps_per_epoch
        warming = 0 < self.warmup_steps >= step  # not in step 0 of a run without warm-up
        if warming and (epoch == 0 or self.warms_up_across_epochs):
            top = self.run.init_lr
            start = self.run.warmup_lr if self.run.warmup_lr >= 0 else top
            return min(top, start + (top - start) * (step / self.warmup_steps))
        return self.after_warmup(epoch, step)

    def after_warmup(self, epoch: int, step: int) -> float:
        """Learning rate once the warm-up is over."""
        raise NotImplementedError

    def _cosine(self, progress: float) -> float:
        least, span = self.run.min_lr, self.run.init_lr - self.run.min_lr
        return least + span * 0.5 * (1.0 + math.cos(math.pi * progress))


@LR_SCHEDULERS.register("constant_lr")
class ConstantLR(Schedule):
    """``init_lr`` throughout."""

    uses: ClassVar[tuple[str, ...]] = ()

    def after_warmup(self, epoch: int, step: int) -> float:
        return self.run.init_lr


@LR_SCHEDULERS.register("linear_warmup_step_lr")
class LinearWarmupStepLR(Schedule):
    """``init_lr * decay_rate ** epoch``, not below ``min_lr``."""

    decays_by_epoch: ClassVar[bool] = True

    def after_warmup(self, epoch: int, step: int) -> float:
        return max(self.run.min_lr, self.run.init_lr * self.run.lr_decay_rate**epoch)


@LR_SCHEDULERS.register("linear_warmup_cosine_lr")
class LinearWarmupCosineLR(Schedule):
    """Cosine over epochs: constant within an epoch."""

    decays_by_epoch: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("min_lr",)

    def after_warmup(self, epoch: int, step: int) -> float:
        return self._cosine(epoch / self.run.max_epoch)


@LR_SCHEDULERS.register(STEPWISE)
class StepwiseLinearWarmupCosineLR(Schedule):
    """Warm-up and cosine both by step."""

    uses: ClassVar[tuple[str, ...]] = ("min_lr",)
    warms_up_across_epochs: ClassVar[bool] = True

    def after_warmup(self, epoch: int, step: int) -> float:
        warmup = self.warmup_steps
        return self._cosine((step - warmup) / (self.max_steps - warmup))


def build_schedule(run: RunConfig, steps_per_epoch: int) -> Schedule:
    """The schedule that ``run.lr_sched`` names."""
    return LR_SCHEDULERS.get(run.lr_sched)(run, steps_per_epoch)


class PartRate(NamedTuple):
    """How a part of the model learns.

    Attributes:
        share: what the rate of the schedule is multiplied by.
        schedule: of its own, in place of the run's.
    """

    share: float
    weight_decay: float
    schedule: Schedule | None = None


_NORM = re.compile(r"(^|[._])(ln|bn|norm|layernorm)\w*", re.IGNORECASE)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    layer_decay: float = 1.0,
    layers_above: Callable[[str], int] = lambda _: 0,
    rates: Mapping[str, PartRate] | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters for AdamW.

    Biases, norms and 1-d tensors get no weight decay. A layer learns at ``layer_decay`` to the
    power of ``layers_above`` of the rate (Bao et al. 2021, BEiT).

    Args:
        layers_above: of a parameter's name; 0 of what has no layers.
        rates: of parts that have their own, by the first word of a name.

    Returns:
        Groups with ``params``, ``weight_decay``, ``lr_scale`` and the ``part`` whose own schedule
        holds, or ``""``. Without layer decay these are the original's two, decayed first, so that
        either project reads the other's optimizer.
    """
    first = (1.0, weight_decay, True, ""), (1.0, weight_decay, False, "")
    groups: dict[tuple[float, float, bool, str], list[nn.Parameter]] = {key: [] for key in first}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith("bias") or _NORM.search(name) is not None
        part = name.partition(".")[0]
        rate = (rates or {}).get(part, PartRate(1.0, weight_decay))
        scale = rate.share * layer_decay ** layers_above(name)
        key = (scale, rate.weight_decay, not plain, part if rate.schedule else "")
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": decay if decayed else 0.0,
            "lr_scale": scale,
            "part": own,
        }
        for (scale, decay, decayed, own), params in groups.items()
        if params or (scale, decay, decayed, own) in first
    ]
