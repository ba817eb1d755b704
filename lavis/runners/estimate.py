"""What a run needs on a card, without weights and without a card: ``train.py --plan``.

The model is built of its small files alone, put on a card that has shapes and no numbers
(:mod:`lavis.models.compute.fake_cuda`), and a micro-batch is trained there; what is held at once is
counted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from lavis.common import dist
from lavis.common.errors import ConfigError, LavisError
from lavis.common.registry import MODELS, did_you_mean
from lavis.common.schema import Config
from lavis.common.types import Batch, Sample
from lavis.datasets.collate import collate
from lavis.models.compute.fake_cuda import FakeCuda, on_card
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import PartsConfig
from lavis.models.vlm import VLM
from lavis.runners.launch import strategy_name

GIB = 2**30
USABLE = 0.95  # of a card's memory: the rest is the driver's, and fragments
UTILISATION = 0.4  # of a card's matrix peak, assumed
_STEP = 64  # tokens to which a row is rounded
_IMAGE_TEXT = 142  # tokens of a document with one image, as the 18.8k instructions have on average


class Card(NamedTuple):
    """A graphics card."""

    name: str
    gib: float
    tflops: float  # of dense products in half precision, accumulated in fp32


CARDS = [
    Card("rtx3090", 24, 71), Card("rtx4090", 24, 165), Card("a6000", 48, 155),
    Card("l40s", 48, 362), Card("a100-40", 40, 312), Card("a100", 80, 312), Card("h100", 80, 989),
]  # fmt: skip


def card(text: str) -> Card:
    """A card by its name, or by its gigabytes: then as fast as an RTX 3090.

    Raises:
        ConfigError: neither.
    """
    names = {c.name: c for c in CARDS}
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return Card(f"{text} GiB", float(text), CARDS[0].tflops)
    if text.lower() not in names:
        near = did_you_mean(text, names)
        raise ConfigError(f"--plan: {text!r} is no card{near} ({', '.join(names)}), nor gigabytes")
    return names[text.lower()]


@dataclass(frozen=True)
class Sharing:
    """What a strategy leaves on each of N cards: shares of 1 or 1 / N."""

    name: str
    cards: int
    frozen: bool = False  # whether frozen weights are sharded
    weights: bool = False  # of what learns
    gradients: bool = False
    optimizer: bool = False
    offload: bool = False  # whether slices wait in main memory

    @classmethod
    def of(cls, config: Config, cards: int) -> Sharing:
        """What ``run`` asks for on so many cards."""
        run = config.run
        name = strategy_name(run, cards)
        if name == "fsdp2":
            return cls(name, cards, True, True, True, True, run.fsdp_cpu_offload)
        if name == "deepspeed":
            zero: dict[str, Any] = (run.deepspeed_config or {}).get("zero_optimization") or {}
            stage = int(zero.get("stage", 0))
            offload = (zero.get("offload_param") or {}).get("device") == "cpu"
            all_of_it = stage == 3
            return cls(
                f"deepspeed, stage {stage}", cards, all_of_it, all_of_it, stage > 1, stage > 0,
                offload,
            )  # fmt: skip
        return cls(name, cards)

    def share(self, sharded: bool) -> float:
        """Of a tensor that is on each card."""
        if sharded and self.offload:
            return 0.0
        return 1 / self.cards if sharded else 1.0


class Held(NamedTuple):
    """Bytes on a card that stay from step to step."""

    frozen: float
    trained: float  # weights that learn
    state: float  # their gradients and two moments
    gathered: float  # whole blocks of a sharded model, one in use and one on its way

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class Estimator:
    """One model on a card of shapes.

    Attributes:
        config: of the run.
        model: without numbers.
        card: which has none, either.
    """

    def __init__(self, config: Config) -> None:
        """Build the model of its small files.

        Raises:
            ConfigError, WeightsError: a setting or a small file (``config.json``, the vocabulary)
                does not fit; weights are not looked for.
        """
        self.config, made = config, config.model
        if not isinstance(made, PartsConfig):
            raise ConfigError(f"--plan: model arch {made.arch!r} is not made of parts")
        vision = not config.run.feature_cache.enabled
        self.model: VLM = MODELS.get(made.arch).outline(
            made, cache_root=config.env.cache_root, vision=vision
        )
        self.card = FakeCuda()
        with self.card:
            on_card(self.model)
        self._peaks: dict[tuple[int, StepSchedule], int] = {}

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    def held(self, sharing: Sharing) -> Held:
        """What stays on a card."""
        learn = [p for p in self.model.parameters() if p.requires_grad]
        trained = sum(p.nbytes for p in learn)
        gathered = 0.0
        if sharing.frozen:
            blocks = [sum(p.nbytes for p in b.parameters()) for b in self.model.shardable_blocks()]
            rest = self.weights - sum(blocks)
            gathered = rest + 2 * max(blocks)
        share = sharing.share
        return Held(
            frozen=(self.weights - trained) * share(sharing.frozen),
            trained=trained * share(sharing.weights),
            state=trained * share(sharing.gradients) + 2 * trained * share(sharing.optimizer),
            gathered=gathered,
        )

    def schedule(self, sharing: Sharing, memory: float) -> StepSchedule:
        """What ``run`` asks for on a card of so many bytes."""
        free = memory - self.held(sharing).total
        device = torch.device("cuda")
        return StepSchedule.from_run(self.config.run, self.model, device, free=max(free, 0.0))

    def working(self, tokens: int, schedule: StepSchedule) -> int:
        """Bytes that forward and backward pass of a micro-batch take beside the weights."""
        key = tokens, schedule
        if key not in self._peaks:
            model, batch = self.model.train(), self.batch(tokens)
            with self.card:
                model.set_schedule(schedule)
                model.constant_prefix()
                self.card.restart()
                before = self.card.live
                model(batch.pin_memory()).loss_sum.backward()
                gradients = sum(p.nbytes for p in model.parameters() if p.grad is not None)
                self._peaks[key] = self.card.peak - before - gradients
                model.zero_grad(set_to_none=True)
                model.set_schedule(StepSchedule())
        return self._peaks[key]

    def batch(self, tokens: int) -> Batch:
        """A packed micro-batch of documents with an image each, half of whose tokens count."""
        encoder = self.model.encoder
        prefix, _ = encoder.constant_prefix()
        span = encoder.num_query_token
        length = min(encoder.max_txt_len, max(_IMAGE_TEXT, len(prefix) + span + _STEP))
        whole, left = divmod(tokens, length)
        image, samples = encoder.tokenizer.image_id, []
        for number in range(whole + (left > 0)):
            n = length if number < whole else left
            shown = n > len(prefix) + span
            ids = torch.tensor([*prefix, *[image] * span * shown, *[5] * length])[:n]
            labels = ids.where(torch.arange(n) >= n // 2, -100)
            samples.append(Sample(str(number), ids, labels, *self._seen(shown)))
        return collate(samples)

    def _seen(self, shown: bool) -> tuple[torch.Tensor, ...]:
        if self.model.vision is None:
            features = torch.zeros(int(shown), *self.model.features)
            return torch.empty(0), torch.empty(0, 0, 0, dtype=torch.int64), features
        side = self.model.image_size
        return (torch.zeros(int(shown), 3, side, side),)

    def most_tokens(self, schedule: StepSchedule, free: float, limit: int = 2**17) -> int:
        """The longest packed row that fits, a multiple of 64; 0 if none does.

        What a row takes grows evenly with its tokens, so two rows tell.
        """
        short = 4096 if self.working(4096, schedule) <= free else 512
        less, more = (self.working(n, schedule) for n in (short, 2 * short))
        tokens = short + (free - less) / ((more - less) / short)
        return max(0, min(int(tokens), limit) // _STEP * _STEP)

    def flops(self, tokens: int, schedule: StepSchedule) -> float:
        """Operations of a micro-batch, those of recomputed layers counted again."""
        images = len(self.batch(tokens).pixel_values) or len(self.batch(tokens).query_features)
        useful = self.model.training_flops(tokens, images)
        every = schedule.recompute_every
        layers = list(self.model.language.blocks())
        again = layers[::every] if every else []
        return useful + 2.0 * tokens * sum(p.numel() for b in again for p in b.parameters())


def plan_run(config: Config, data: Any, chosen: Card) -> str:
    """A page about what a run needs.

    Args:
        data: of the run, or why its length is not known.

    Raises:
        LavisError: as :class:`Estimator`.
    """
    transformers_logging.set_verbosity_error()
    logging.getLogger("lavis").setLevel(logging.WARNING)
    run = config.run
    made = Estimator(config)
    cards = max(dist.launched_world_size(), 2 if strategy_name(run, 1) == "fsdp2" else 1)
    sharing = Sharing.of(config, cards)
    memory = chosen.gib * GIB * USABLE
    held, schedule = made.held(sharing), made.schedule(sharing, memory)
    tokens = run.max_tokens_per_batch or run.batch_size_train * made.model.encoder.max_txt_len
    working = made.working(tokens, schedule)
    total = held.total + working
    fits = "fits" if total <= memory else "DOES NOT FIT"
    lines = [
        f"{chosen.name}: {chosen.gib:g} GiB, of which {memory / GIB:.1f} may be used; "
        f"{sharing.name} on {cards}",
        "",
        "GiB on a card",
        _row("frozen weights", held.frozen),
        _row("weights that learn", held.trained),
        _row("their gradients and moments", held.state),
        *([_row("whole blocks, in use and on their way", held.gathered)] * bool(held.gathered)),
        _row(f"a micro-batch of {tokens:,} tokens, recompute {schedule.recompute}", working),
        _row(f"together: {fits}", total),
        _row("set-up", setup_peak(made, sharing)),
        "",
        "longest packed row (run.max_tokens_per_batch)",
    ]
    free = memory - held.total
    for recompute in ("none", "all"):
        other = replace(schedule, recompute=recompute)
        longest = made.most_tokens(other, free) if free > 0 else 0
        found = f"{longest:,} tokens" if longest else "none fits"
        lines.append(f"  recompute {recompute:<6}{found:>20}")
    lines += ["", *_time(made, data, tokens, schedule, chosen, cards)]
    if total > memory:
        lines += ["", *_advice(made, config, memory)]
    return "\n".join(lines)


def setup_peak(made: Estimator, sharing: Sharing) -> float:
    """Bytes on a card while the model is made: a tensor goes to its place at a time."""
    held = made.held(sharing)
    largest = max(p.nbytes for p in made.model.parameters())
    return held.frozen + held.trained + max(largest, held.gathered)


def _row(name: str, count: float) -> str:
    return f"  {name:<60}{count / GIB:>8.2f}"


def _time(
    made: Estimator, data: Any, tokens: int, schedule: StepSchedule, chosen: Card, cards: int
) -> Iterator[str]:
    each = made.flops(tokens, schedule) / tokens
    rate = chosen.tflops * 1e12 * UTILISATION / each
    yield (
        f"{each / 1e9:.1f} GFLOP a token: {rate:,.0f} tokens/s on a card at {UTILISATION:.0%} of "
        f"its {chosen.tflops:g} TFLOP/s (assumed, not measured)"
    )
    if isinstance(data, str):
        yield f"length of an epoch: {data}"
        return
    epoch, epochs = sum(data.lengths), made.config.run.max_epoch
    hours = epoch * epochs / rate / cards / 3600
    yield (
        f"{len(data):,} samples, {epoch:,} tokens an epoch: {epochs} epochs in about {hours:.1f} h "
        f"on {cards} of these cards"
    )


def _advice(made: Estimator, config: Config, memory: float) -> Iterator[str]:
    """What would fit: fewer bits, or more cards."""
    tokens = config.run.max_tokens_per_batch or made.model.encoder.max_txt_len
    working = made.working(tokens, StepSchedule(recompute="all"))
    for cards in (2, 4, 8):
        sharing = Sharing("fsdp2", cards, True, True, True, True)
        needed = made.held(sharing).total + working
        if needed <= memory:
            yield (
                f"run.strategy: fsdp2 on {cards} of these cards would do, with run.recompute: all: "
                f"{needed / GIB:.1f} GiB on each"
            )
            break
    else:
        yield "not even run.strategy: fsdp2 on 8 of these cards would do, with run.recompute: all"
    if not any(p.requires_grad for p in made.model.language.parameters()):
        yield "model.language.quantize: nf4 keeps the language model's layers in 4.5 bits a weight"


def plan_chat(config: Config, chosen: Card) -> str:
    """A page about what a conversation needs."""
    transformers_logging.set_verbosity_error()
    made = Estimator(config)
    memory, context = chosen.gib * GIB * USABLE, made.model.context
    with made.card, torch.no_grad():
        ids = torch.zeros(1, _STEP, dtype=torch.int64, device="cuda")
        _, keys = made.model.language.prefix(ids)
        each = sum(t.nbytes for pair in keys for t in pair) / _STEP
        del keys
        made.card.restart()
        before = made.card.live
        made.model.language.prefix(torch.zeros(1, 1024, dtype=torch.int64, device="cuda"))
        passing = made.card.peak - before
    room = max(memory - made.weights - passing, 0.0)
    held = min(context, int(room / each))
    return "\n".join([
        f"{chosen.name}: {chosen.gib:g} GiB, of which {memory / GIB:.1f} may be used", "",
        "GiB on a card",
        _row("weights", made.weights),
        _row("a pass of 1,024 tokens, keys and values included", passing),
        _row(f"keys and values of a whole context of {context:,} tokens", context * each),
        "",
        f"{each / 2**20:.2f} MiB a token: there is room for {room / each:,.0f} tokens of all "
        f"conversations, {held:,} of one" if room else "the weights DO NOT FIT",
    ])  # fmt: skip


def length_of(task: Any) -> Any:
    """The run's data, or why there are none."""
    try:
        return task.build_datasets()
    except LavisError as error:
        return f"unknown, since {error}"
