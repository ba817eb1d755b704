"""What a strategy leaves on each card, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lavis.common.schema import Config
from lavis.runners.launch import strategy_name


@dataclass(frozen=True)
class Sharing:
    """What a strategy leaves on each card.

    Attributes:
        name: of the strategy, for people.
        cards: over which it shares.
        weights: whether every card has a slice of each weight only, frozen ones too.
        gradients, moments: the same of what belongs to a weight that learns.
        offload: whether slices wait in main memory.
        buckets: whether gradients are there a second time, to be sent.
        master: whether AdamW has fp32 copies of weights in half precision.
    """

    name: str
    cards: int
    weights: bool = False
    gradients: bool = False
    moments: bool = False
    offload: bool = False
    buckets: bool = False
    master: bool = False

    @classmethod
    def of(cls, config: Config, cards: int) -> Sharing:
        """What ``run`` asks for on so many cards.

        Raises:
            ConfigError: as :func:`lavis.runners.launch.strategy_name`.
        """
        run = config.run
        name = strategy_name(run, cards)
        if name == "fsdp2":
            return cls.fsdp2(cards, offload=run.fsdp_cpu_offload)
        if name != "deepspeed":
            return cls(name, cards, buckets=name == "ddp")
        zero = run.deepspeed("zero_optimization")
        stage = int(zero.get("stage", 0))
        half = any(run.deepspeed(k).get("enabled") for k in ("bf16", "fp16"))
        offload = (zero.get("offload_param") or {}).get("device") in ("cpu", "nvme")
        return cls(
            f"deepspeed, ZeRO {stage}", cards, weights=stage == 3, gradients=stage >= 2,
            moments=stage >= 1, offload=offload, buckets=stage < 2, master=half,
        )  # fmt: skip

    @classmethod
    def fsdp2(cls, cards: int, *, offload: bool = False) -> Sharing:
        """FSDP2 on so many cards."""
        return cls("fsdp2", cards, weights=True, gradients=True, moments=True, offload=offload)

    def share(self, sharded: bool) -> float:
        """Of a tensor that is on each card."""
        if sharded and self.offload:
            return 0.0
        return 1 / self.cards if sharded else 1.0


class Held(NamedTuple):
    """Bytes on a card that stay from one micro-batch to the next.

    Attributes:
        frozen: weights.
        trained: weights that learn.
        gradients: theirs.
        moments: AdamW's two.
        gathered: whole blocks of a model in slices, one in use and one on its way.
    """

    frozen: float
    trained: float
    gradients: float
    moments: float
    gathered: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)
