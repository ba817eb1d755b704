"""What a run needs on a card, without weights and without a card.

The model is built of its small files alone, put on a card that has shapes and no numbers
(:mod:`lavis.models.compute.fake_cuda`), and a micro-batch is trained there; what is held at once is
counted. Of two rows, since what a row takes grows evenly with its tokens.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.registry import MODELS
from lavis.common.schema import Config
from lavis.common.types import DTYPES, Batch, Sample, Spans
from lavis.datasets.collate import collate
from lavis.models.compute.fake_cuda import FakeCuda, on_card
from lavis.models.compute.quantized_linear import count_weights
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import PartsConfig
from lavis.models.vlm import VLM
from lavis.runners.sharing import Held, Sharing
from lavis.runners.strategy import gathered_at_once, unchanged_blocks

_ROWS = 7, 14  # documents, that are tried
_STEP = 64  # tokens to which a longest row is rounded down
_DOCUMENT = 142  # tokens with one image, as the 18.8k instructions have on average


class Pass(NamedTuple):
    """Bytes beside what is held, the most in each part of a micro-batch.

    Attributes:
        vision: while images are encoded.
        kept: activations, when the head is reached.
        forward: until then.
        head: the head and its loss, activations included.
        backward: the backward pass, activations included.
    """

    vision: float
    kept: float
    forward: float
    head: float
    backward: float

    @property
    def peak(self) -> float:
        """The most of all."""
        return max(self)


class Estimator:
    """One model on a card of shapes; neither has numbers."""

    def __init__(self, config: Config, sharing: Sharing) -> None:
        """Build the model of its small files.

        Raises:
            ConfigError: a setting does not fit, or the model is not made of parts.
            WeightsError: a small file is missing or damaged; weights are not looked for.
        """
        self.config, self.sharing, made = config, sharing, config.model
        if not isinstance(made, PartsConfig):
            raise ConfigError(f"--plan: model arch {made.arch!r} is not made of parts")
        try:
            self.model: VLM = MODELS.get(made.arch).outline(
                made, cache_root=config.env.cache_root, vision=not config.run.feature_cache.enabled
            )
        except WeightsError as error:
            raise WeightsError(
                f"{error}. No weights are needed here, but the language model's small files are: "
                "config.json, and its vocabulary (qwen.tiktoken, or tokenizer.json and "
                "tokenizer_config.json)"
            ) from error
        self._dtype = DTYPES[config.run.autocast_dtype] if config.run.amp else None
        self.held = self._count()
        self._reserved = self._reserve()
        if sharing.weights and self._dtype:  # gathered in half precision
            unchanged = unchanged_blocks(self.model)
            for block in self.model.shardable_blocks():
                if block not in unchanged:
                    block.to(self._dtype)
        self.card = FakeCuda()
        with self.card:
            on_card(self.model)
            for parameter in self._learning():  # as after a step's first micro-batch
                parameter.grad = torch.empty_like(parameter)
        self._passes: dict[tuple[int, StepSchedule], Pass] = {}

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    def _learning(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _count(self) -> Held:
        to, learning = self.sharing, self._learning()
        trained = sum(p.nbytes for p in learning)
        each = 12 if to.master else 0  # bytes of two moments and a copy, beside half precision
        moments = sum(p.numel() * each for p in learning) if to.master else 2 * trained
        whole = gathered_at_once(self.model, self._dtype, gradients=False)
        return Held(
            frozen=(self.weights - trained) * to.share(to.weights),
            trained=trained * to.share(to.weights),
            gradients=trained * (to.share(to.gradients) + to.buckets),
            moments=moments * to.share(to.moments),
            gathered=whole * to.weights,
        )

    def _reserve(self) -> float:
        """What a run keeps free of activations."""
        if not self.sharing.weights:
            return self.held.gradients + self.held.moments
        slices = 0 if self.sharing.offload else 3 * self.held.trained
        return gathered_at_once(self.model, self._dtype) + slices

    def _sent(self) -> float:
        """Bytes of a block's gradient, whole and added up in fp32, while it is cut in slices."""
        if not self.sharing.weights:
            return 0.0
        blocks = [[p for p in b.parameters() if p.requires_grad]
                  for b in self.model.shardable_blocks()]  # fmt: skip
        return max(sum(p.numel() * (p.itemsize + 4) for p in block) for block in blocks)

    def schedule(self, memory: float) -> StepSchedule:
        """What ``run`` asks for, where a card has so many bytes."""
        free = max(memory - self.held.frozen - self.held.trained, 0.0)
        device = torch.device("cuda")
        return StepSchedule.from_run(self.config.run, self.model, device, self._reserved, free)

    def needed(self, tokens: int, schedule: StepSchedule) -> float:
        """Bytes on a card for micro-batches of so many tokens."""
        done = self.micro_batch(tokens, schedule)
        sending = done.kept + self._sent()
        stepping = self.held.trained if not self.sharing.offload else 0.0  # a square root of each
        return self.held.total + max(done.peak, sending, stepping)

    def micro_batch(self, tokens: int, schedule: StepSchedule) -> Pass:
        """What forward and backward pass of a row take."""
        low, high = _ROWS
        short, long = self.measure(low, schedule), self.measure(high, schedule)
        share = (tokens / self.length - low) / (high - low)
        return Pass(*(max(a + (b - a) * share, 0.0) for a, b in zip(short, long, strict=True)))

    def longest(self, schedule: StepSchedule, memory: float, limit: int = 2**20) -> int:
        """Tokens of the longest row that fits, a multiple of 64; 0 if none does."""
        rows = range(_STEP, limit + 1, _STEP)
        return _STEP * bisect_right(rows, memory, key=lambda tokens: self.needed(tokens, schedule))

    def measure(self, documents: int, schedule: StepSchedule) -> Pass:
        """What forward and backward pass of a row take, on the card of shapes."""
        key = documents, schedule
        if key not in self._passes:
            model, batch = self.model.train(), self.batch(documents)
            autocast = self.card.autocast(self._dtype) if self._dtype else contextlib.nullcontext()
            with self.card, autocast:
                model.set_schedule(schedule)
                model.constant_prefix()
                self._passes[key] = self._run(batch)
                model.set_schedule(StepSchedule())
        return self._passes[key]

    def _run(self, batch: Batch) -> Pass:
        card, peaks, live = self.card, list[int](), list[int]()
        card.restart()
        before = card.live

        def mark(*_: object) -> None:
            peaks.append(card.peak - before)
            live.append(card.live - before)
            card.restart()

        model, count = self.model, 1
        hooks = [m.register_forward_pre_hook(mark) for m in (model.connector, model.language.head)]
        try:
            output = model(batch.pin_memory())
            count = len(peaks)
            mark()
            output.loss_sum.backward()
            del output
            mark()
        finally:
            for hook in hooks:
                hook.remove()
        assert count == 2, "a micro-batch passes the connector and the head once each"
        vision, forward, head, backward = peaks
        return Pass(vision, live[1], forward, head, backward)

    @cached_property
    def _views(self) -> int:
        """Images that the largest picture is shown as."""
        encoder = self.model.encoder
        tiles = self.config.preprocess.tiles.within(
            encoder.num_query_token, encoder.max_txt_len, "model.max_txt_len"
        )
        return 1 + tiles.max * (tiles.max > 1)

    @cached_property
    def length(self) -> int:
        """Tokens of a document."""
        tokens = self._views * self.model.encoder.num_query_token
        shown = len(self.model.encoder.constant_prefix()[0]) + tokens
        return min(self.model.encoder.max_txt_len, max(_DOCUMENT, shown + _STEP))

    def batch(self, documents: int) -> Batch:
        """A packed micro-batch of documents with a picture each, half of whose tokens count."""
        encoder, vision = self.model.encoder, self.model.vision
        prefix, _ = encoder.constant_prefix()
        views = self._views
        opening = [*prefix, *[encoder.tokenizer.image_id] * encoder.num_query_token * views]
        ids = torch.tensor([*opening, *[5] * self.length])[: self.length]
        labels = ids.where(torch.arange(self.length) >= self.length // 2, -100)
        side = self.model.image_size
        pixels = torch.zeros(views * (vision is not None), 3, side, side)
        features = torch.zeros(views * (vision is None), *self.model.features)
        return collate(
            [Sample(str(i), ids, labels, Spans(pixels, features)) for i in range(documents)]
        )

    def flops(self, schedule: StepSchedule) -> float:
        """Operations of a token in training, its share of an image's included, and those of
        recomputed layers twice."""
        every, layers = schedule.recompute_every, list(self.model.language.blocks())
        again = sum(map(count_weights, layers[::every] if every else ()))
        return self.model.training_flops(self.length, self._views) / self.length + 2.0 * again

    def chat(self, tokens: int) -> tuple[float, float]:
        """Bytes of a token's keys and values, and of a pass of so many tokens beside them."""
        with self.card, torch.no_grad():
            ids = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
            self.card.restart()
            before = self.card.live
            _, keys = self.model.language.prefix(ids)
            held = sum(t.nbytes for pair in keys for t in pair)
            return held / tokens, self.card.peak - before - held
