"""``train.py --plan`` and ``cli_demo.py --plan``: a page about what a card has to hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from transformers.utils import logging as transformers_logging

from lavis.common import dist
from lavis.common.errors import ConfigError, LavisError
from lavis.common.registry import did_you_mean
from lavis.common.schema import Config
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import PartsConfig
from lavis.runners.estimate import Estimator
from lavis.runners.sharing import Sharing

GIB = 2**30
USABLE = 0.95  # of a card's memory: the rest is the driver's, and fragments
UTILISATION = 0.4  # of a card's matrix peak, assumed
_PROMPT = 1024  # tokens
_CACHE_SHARE = 0.75  # of what a conversation's weights leave: as lavis.chat.command takes


class Card(NamedTuple):
    """A graphics card."""

    name: str
    gib: float
    tflops: float  # of dense products in half precision, summed in fp32: the makers' figures


CARDS = [
    Card("rtx3090", 24, 71), Card("rtx4090", 24, 165), Card("a6000", 48, 155),
    Card("l40s", 48, 362), Card("a100-40", 40, 312), Card("a100-80", 80, 312),
    Card("h100", 80, 989),
]  # fmt: skip


def card(text: str) -> Card:
    """A card by its name, or by its gibibytes: then as fast as an RTX 3090.

    Raises:
        ConfigError: neither.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return Card(f"a card of {float(text):g} GiB", float(text), CARDS[0].tflops)
    names = {c.name: c for c in CARDS}
    name = re.sub(r"[\s_]", "", text.lower())
    if name not in names:
        near = did_you_mean(name, names)
        raise ConfigError(
            f"--plan: {text!r} is no card that is known{near} ({', '.join(names)}); give its "
            "memory in GiB"
        )
    return names[name]


def plan_run(config: Config, task: Any, chosen: Card) -> str:
    """What a run needs on a card, on as many cards as processes were started.

    Raises:
        LavisError: as :class:`Estimator`.
    """
    transformers_logging.set_verbosity_error()
    run = config.run
    cards = max(dist.launched_world_size(), 1)
    made = Estimator(config, Sharing.of(config, cards))
    memory, held = chosen.gib * GIB * USABLE, made.held
    tokens = run.max_tokens_per_batch or run.batch_size_train * made.model.encoder.max_txt_len
    schedule = made.schedule(memory)
    done, needed = made.micro_batch(tokens, schedule), made.needed(tokens, schedule)
    rows = [
        ("frozen weights", held.frozen),
        ("weights that learn", held.trained),
        ("their gradients", held.gradients),
        ("AdamW's moments", held.moments),
        ("whole blocks, in use and on their way", held.gathered),
        (f"activations of {tokens:,} tokens, kept", done.kept),
        ("head, backward pass and others, for a moment", needed - held.total - done.kept),
        (f"together: {_verdict(needed, memory)}", needed),
        ("set-up", setup_peak(made)),
    ]
    lines = [
        _heading(chosen, f"{made.sharing.name} on {cards} of them"),
        *_table(rows),
        f"recompute: {schedule.recompute} (run.recompute: {run.recompute})",
        "longest row that fits (run.max_tokens_per_batch)",
        *(_longest(made, replace(schedule, recompute=how), memory) for how in ("none", "all")),
        *_time(made, task, schedule, chosen, cards),
    ]
    if needed > memory:
        lines += _advice(config, tokens, memory)
    return "\n".join(lines)


def _heading(chosen: Card, rest: str) -> str:
    usable = f"{chosen.gib * USABLE:.1f} of {chosen.gib:g} GiB may be used"
    return f"{chosen.name}: {usable}; {rest}"


def _verdict(needed: float, memory: float) -> str:
    return "fits" if needed <= memory else "DOES NOT FIT"


def _table(rows: list[tuple[str, float]]) -> Iterator[str]:
    yield f"  {'GiB on a card':<48}"
    for name, count in rows:
        if count >= 5e-3 * GIB:
            yield f"  {name:<48}{count / GIB:>8.2f}"


def _longest(made: Estimator, schedule: StepSchedule, memory: float) -> str:
    found = made.longest(schedule, memory)
    tokens = f"{found:,} tokens" if found else "none"
    return f"  recompute {schedule.recompute!s:<30}{tokens:>16}"


def setup_peak(made: Estimator) -> float:
    """Bytes on a card while the model is made: each tensor goes to its place by itself.

    A tensor may be there a second time in another type, and one that is packed in fp32.
    """
    largest = max(p.nbytes for p in made.model.parameters())
    return made.held.frozen + made.held.trained + max(2 * largest, made.held.gathered)


def _time(
    made: Estimator, task: Any, schedule: StepSchedule, chosen: Card, cards: int
) -> Iterator[str]:
    each, run = made.flops(schedule), made.config.run
    rate = chosen.tflops * 1e12 * UTILISATION / each
    yield (
        f"{each / 1e9:.1f} GFLOP a token: {rate:,.0f} tokens/s on a card at {UTILISATION:.0%} of "
        f"its {chosen.tflops:g} TFLOP/s (assumed, not measured)"
    )
    try:
        data = task.build_datasets()
    except LavisError as error:
        yield (
            f"1,000,000 tokens take {1e6 / rate / cards / 60:.1f} min; how many an epoch has is "
            f"not known: {error}"
        )
        return
    samples = run.batch_size_train * run.accum_grad_iters * cards
    epoch = sum(data.lengths)
    step = each * epoch / len(data) * samples
    yield (
        f"{len(data):,} samples, {epoch:,} tokens an epoch; a step of {samples:,} samples takes "
        f"{step / 1e12:,.1f} TFLOP"
    )
    hours = epoch * run.max_epoch / rate / cards / 3600
    yield f"{run.max_epoch} epochs take about {hours:.2g} h"


def _advice(config: Config, tokens: int, memory: float) -> Iterator[str]:
    """What would fit: a model in slices, or fewer bits."""
    made = config.model
    if not isinstance(made, PartsConfig) or made.parts[2].quantize:
        return
    whole = replace(config, run=replace(config.run, strategy="fsdp2", deepspeed_config=None))
    again = StepSchedule(recompute="all")
    for cards in (2, 4, 8):
        needed = Estimator(whole, Sharing.fsdp2(cards)).needed(tokens, again)
        if needed <= memory:
            yield (
                f"run.strategy: fsdp2 on {cards} of these cards would do, all layers recomputed: "
                f"{needed / GIB:.1f} GiB on each"
            )
            break
    else:
        yield "run.strategy: fsdp2 would not do on 8 of these cards; see run.fsdp_cpu_offload"
    if "language" not in made.training:
        yield "language.quantize: nf4 (arch: vlm) keeps its layers in 4.5 bits a weight"


def plan_chat(config: Config, chosen: Card) -> str:
    """What conversations with a model need on a card.

    Raises:
        LavisError: as :class:`Estimator`.
    """
    transformers_logging.set_verbosity_error()
    cached = replace(config.run.feature_cache, enabled=False)  # images are encoded
    run = replace(config.run, feature_cache=cached, amp=False)
    made = Estimator(replace(config, run=run), Sharing("", 1))
    memory, context = chosen.gib * GIB * USABLE, made.model.context
    each, passing = made.chat(_PROMPT)
    left = max(memory - made.weights, 0.0)
    room = min(left * _CACHE_SHARE, max(left - passing, 0.0))
    needed = made.weights + passing + each * context
    rows = [
        ("weights", float(made.weights)),
        (f"a prompt's pass of {_PROMPT:,} tokens, for a moment", passing),
        (f"keys and values of a whole context, {context:,} tokens", each * context),
        (f"together: {_verdict(needed, memory)}", needed),
        ("set-up", setup_peak(made)),
    ]
    return "\n".join([
        _heading(chosen, "one conversation"), *_table(rows),
        f"{each / 2**10:.0f} KiB a token: room for {room / each:,.0f} tokens of all conversations",
    ])  # fmt: skip
