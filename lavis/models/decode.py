"""Prompts that are answered together, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lavis.common.device import to_device
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.types import Spans
from lavis.models.compute.slots import Slots
from lavis.processors.conversation import Turn

if TYPE_CHECKING:
    from lavis.models.vlm import VLM

NOT_A_NUMBER = (
    "the language model's output is not a number: its weights are damaged, or its "
    "precision is too small (model.language.precision, in the original's keys model.llm_precision: "
    "bf16 or fp32 instead of fp16)"
)

_JOIN = 8
"""New rows wait until one in so many places is free: a pass over their prompts costs the rows that
are under way a token's time."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts, and what their image spans show.

    Attributes:
        ids: of each prompt, image spans included.
        spans: of all prompts.
    """

    ids: Sequence[list[int]]
    spans: Spans = Spans()


@dataclass(eq=False)
class Row:
    """A prompt and its answer.

    Attributes:
        prompt: token ids, image spans included.
        soft: (N, Q, C) soft tokens of its spans, in order.
        max_new_tokens: longest answer.
        number: its caller's.
        choose: the next token out of (V,) logits and the answer so far; by default the likeliest.
        ids: the answer so far, without the token that stops it.
    """

    prompt: Sequence[int]
    soft: Tensor | None
    max_new_tokens: int
    number: int = 0
    choose: Callable[[Tensor, Sequence[int]], int] | None = None
    ids: list[int] = field(default_factory=list)


class Batch:
    """Rows that are computed together; they join and leave between tokens.

    Each has its own length, positions, images, and way to choose tokens. What a row computes
    differs from what it computes alone by no more than the rounding of products of another size.

    Attributes:
        rows: that are under way.
    """

    def __init__(self, model: VLM) -> None:
        """Take a model in evaluation mode whose language model packs and caches."""
        self.rows: list[Row] = []
        self._model = model
        self._slots = Slots()
        self._stops = frozenset(model.encoder.template.stops)

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Compute the prompts of rows and the first tokens of their answers.

        Returns:
            Those that end there.

        Raises:
            WeightsError: the language model's output is not a number.
        """
        model, language = self._model, self._model.language
        prefix = model.constant_prefix()
        if prefix is not None and any(
            tuple(row.prompt[: prefix.length]) != prefix.ids for row in rows
        ):
            prefix = None
        known, keys = (prefix.length, prefix.keys_and_values) if prefix else (0, ())
        lengths = [len(row.prompt) - known for row in rows]
        ids = torch.tensor([i for row in rows for i in row.prompt[known:]])
        soft = [row.soft for row in rows if row.soft is not None]
        embeds = model.embed(ids[None], torch.cat(soft) if soft else None)
        positions = torch.cat([torch.arange(known, known + n) for n in lengths])[None]
        documents = self._slots.join(lengths, keys)
        positions = to_device(positions, model.device)
        hidden = language.hidden(embeds, positions, documents=documents)
        ends = to_device(torch.tensor(lengths).cumsum(0) - 1, hidden.device)
        self.rows += rows
        return self._choose(language.logits(hidden[0, ends]), rows)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Compute the next token of every row; result and errors as :meth:`join`."""
        language, device = self._model.language, self._model.device
        last = to_device(torch.tensor([[row.ids[-1] for row in self.rows]]), device)
        documents, positions = self._slots.step(device)
        hidden = language.hidden(language.embed(last), positions, documents=documents)
        return self._choose(language.logits(hidden[0]), list(self.rows))

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Row]:
        """Add a token to each row, out of (R, V) logits; those that end leave."""
        likeliest = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)
        ended = []
        for row, scores, token in zip(rows, logits, likeliest.tolist(), strict=True):
            if token < 0:
                raise WeightsError(NOT_A_NUMBER)
            if row.choose is not None:
                token = row.choose(scores, row.ids)
            if token not in self._stops:
                row.ids.append(token)
            if token in self._stops or len(row.ids) == row.max_new_tokens:
                ended.append(row)
        for row in ended:
            place = self.rows.index(row)
            self._slots.leave(place)
            last = self.rows.pop()
            if last is not row:
                self.rows[place] = last
        return ended


def answers(
    model: VLM, batches: Iterable[Prompts], max_new_tokens: int, size: int
) -> Iterator[tuple[int, list[int]]]:
    """The likeliest answers, cut before the token that stops them, in the order in which they end.

    Where the language model packs and caches, an answer that ends makes room for the next prompt.
    Otherwise, and where processes hold parts of each other's layers, a batch waits for its longest.

    Args:
        batches: read when there is room.
        size: rows at once.

    Yields:
        A prompt's number, counted through all batches, and its answer's ids.

    Raises:
        DataError, ConfigError, WeightsError: as ``generate_ids``; output that is not a number.
    """
    if model.sharded or not (model.language.packs and model.language.caches):
        number = 0
        for prompts in batches:
            yield from enumerate(_one_by_one(model, prompts, max_new_tokens), start=number)
            number += len(prompts.ids)
        return
    batch, waiting = Batch(model), _rows(model, batches, max_new_tokens)
    while True:
        ended: list[Row] = []
        free = size - len(batch.rows)
        if free * _JOIN >= size and (new := list(islice(waiting, free))):
            ended += batch.join(new)
        if batch.rows:
            ended += batch.step()
        elif not ended:
            return
        yield from ((row.number, row.ids) for row in ended)


def _rows(model: VLM, batches: Iterable[Prompts], max_new_tokens: int) -> Iterator[Row]:
    number = 0
    spans = model.encoder.num_query_token
    for prompts in batches:
        if not prompts.ids:
            continue
        require_context(model.context, max(map(len, prompts.ids)), max_new_tokens)
        with torch.no_grad():
            soft = model.encode_spans(prompts.spans)
        counts = [ids.count(model.tokenizer.image_id) // spans for ids in prompts.ids]
        parts = [None] * len(counts) if soft is None else soft.split(counts)
        for ids, part in zip(prompts.ids, parts, strict=True):
            yield Row(ids, part, max_new_tokens, number=number)
            number += 1


def _one_by_one(model: VLM, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    """Who has nothing to ask computes all the same: sharded models wait for each other."""
    ids = prompts.ids or [model.encoder.prompt([Turn("user", "")])]
    made = model.generate_ids(ids, prompts.spans, max_new_tokens=max_new_tokens)
    return made[: len(prompts.ids)]


def require_context(context: int, longest: int, max_new_tokens: int) -> None:
    """Check that prompts and answers fit.

    Raises:
        ConfigError: they do not.
    """
    if longest + max_new_tokens > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} "
            f"pass this language model's context of {context}"
        )
