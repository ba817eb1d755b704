"""Rows that are decoded together give the tokens that each gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis.chat import ChatSettings
from lavis.chat.engine import TokenChooser
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.types import Spans
from lavis.models.compute.slots import Slots
from lavis.models.decode import Batch, Prompts, Row
from lavis.processors.conversation import Turn
from tests.models.test_families import FAMILIES, close, proved, stock

PICTURE = "<Img><ImageHere></Img> "
QUESTIONS = [PICTURE + "What?", "Hello.", f"{PICTURE}{PICTURE}Which of the two is larger?",
             "a b c d e f g h", PICTURE + "图里有几个物体？", "Why?", "x"]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(model: Any) -> Prompts:
    ids = [model.encoder.prompt([Turn("user", text)]) for text in QUESTIONS]
    images = sum(text.count(PICTURE) for text in QUESTIONS)
    draw = torch.Generator().manual_seed(7)
    return Prompts(ids, Spans(torch.rand(images, 3, 56, 56, generator=draw)))


def soft_tokens(model: Any, prompts: Prompts) -> list[Tensor]:
    with torch.no_grad():
        soft = model.encode_spans(prompts.spans)
    assert soft is not None
    return list(soft.split([text.count(PICTURE) for text in QUESTIONS]))


def alone(model: Any, prompts: Prompts, index: int, **settings: Any) -> list[int]:
    """By ``generate``, everything computed anew."""
    first = sum(text.count(PICTURE) for text in QUESTIONS[:index])
    images = prompts.spans.pixels[first : first + QUESTIONS[index].count(PICTURE)]
    ids: list[int] = model.generate_ids([prompts.ids[index]], images, **settings)[0]
    return ids


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_rows_join_and_leave_in_every_family(name: str) -> None:
    """Also past windows and chunks, after a prefix, and where an earlier row has left its keys."""
    llm, slots = proved(name), Slots()
    torch.manual_seed(2)
    texts = [torch.randint(3, 97, (1, 24)) for _ in range(4)]
    for text in texts:
        text[:, :2] = texts[0][:, :2]
    wanted = [stock(name)(input_ids=text, use_cache=False).logits[0].float() for text in texts]
    prefix = llm.prefix(texts[0][:, :2])[1]

    def check(hidden: Tensor, rows: Sequence[int]) -> None:
        for row, length, got in zip(rows, slots.lengths[-len(rows) :], hidden, strict=True):
            close(llm.logits(got), wanted[row][length - 1])

    def join(rows: Sequence[int], lengths: Sequence[int], known: int = 0) -> None:
        ids = [texts[row][:, known:n] for row, n in zip(rows, lengths, strict=True)]
        positions = torch.cat([torch.arange(known, n) for n in lengths])[None]
        new = [n - known for n in lengths]
        documents = slots.join(new, prefix if known else ())
        hidden = llm.hidden(llm.embed(torch.cat(ids, 1)), positions, documents=documents)
        check(hidden[0, torch.tensor(new).cumsum(0) - 1], rows)

    def step(rows: Sequence[int]) -> None:
        last = torch.tensor([[int(texts[r][0, n]) for r, n in zip(rows, slots.lengths)]])  # noqa: B905
        documents, positions = slots.step(last.device)
        check(llm.hidden(llm.embed(last), positions, documents=documents)[0], rows)

    join([0, 1], [9, 3])
    for _ in range(3):
        step([0, 1])
    slots.leave(0)
    step([1])
    join([2, 3], [3, 5], known=2)
    for _ in range(8):
        step([1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_gets_the_tokens_that_it_gets_alone(
    model: Any, prompts: Prompts, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Greedy ones, drawn ones by their seeds and settings, of any lengths, in any company."""
    model.language.to(dtype)
    request.addfinalizer(lambda: model.language.to(torch.float32))
    drawn = ChatSettings(do_sample=True, temperature=1.5, top_k=50)
    chosen = [None, drawn.changed(seed=1), drawn.changed(seed=2, top_p=0.8), None,
              drawn.changed(seed=1), ChatSettings(repetition_penalty=1.4), None]  # fmt: skip
    lengths = [5, 9, 3, 1, 12, 8, 20]

    def rows() -> list[Row]:
        return [
            Row(ids, soft, n, i, None if settings is None else TokenChooser(settings))
            for i, (ids, soft, n, settings) in enumerate(
                zip(prompts.ids, soft_tokens(model, prompts), lengths, chosen, strict=True)
            )
        ]

    wanted = []
    for row in rows():
        batch = Batch(model)
        ended = batch.join([row])
        while not ended:
            ended = batch.step()
        wanted.append(row.ids)
    for i in (0, 3, 6):
        assert wanted[i] == alone(model, prompts, i, max_new_tokens=lengths[i])
    penalty = alone(model, prompts, 5, max_new_tokens=lengths[5], repetition_penalty=1.4)
    assert wanted[5] == penalty

    batch, waiting, ended = Batch(model), rows(), []
    while waiting or batch.rows:
        if len(batch.rows) < 3 and waiting:
            ended += batch.join([waiting.pop() for _ in range(min(2, len(waiting)))])
        ended += batch.step() if batch.rows else []
    assert sorted(row.number for row in ended) == list(range(7))
    assert [row.ids for row in sorted(ended, key=lambda row: row.number)] == wanted


def test_an_answer_that_ends_makes_room_for_the_next(
    model: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the longest of a batch, and batches are read when there is room."""
    wanted = [alone(model, prompts, i, max_new_tokens=12) for i in range(len(QUESTIONS))]
    stop = wanted[0][2]  # which four of the answers have, in different places
    ends = [a[: a.index(stop)] if stop in a else a for a in wanted]
    template = model.encoder.template
    monkeypatch.setattr(template, "stops", (*template.stops, stop))
    steps: list[int] = []
    step = Batch.step

    def spy(self: Batch) -> list[Row]:
        steps.append(len(self.rows))
        return step(self)

    monkeypatch.setattr(Batch, "step", spy)
    images = prompts.spans.pixels
    read: list[int] = []

    def batches() -> Any:
        for i, ids in enumerate(prompts.ids):
            read.append(sum(steps))
            first = sum(text.count(PICTURE) for text in QUESTIONS[:i])
            yield Prompts([ids], Spans(images[first : first + QUESTIONS[i].count(PICTURE)]))

    got = dict(model.answers(batches(), max_new_tokens=12, size=3))
    assert [got[i] for i in range(len(QUESTIONS))] == ends
    assert read[2] == 0 < read[3] <= read[-1]
    # A row is computed once for each token after the first, the stop that ends it included.
    passes = [min(len(ids) + 1, 12) - 1 for ids in ends]
    assert len(set(passes)) > 2
    assert sum(steps) == sum(passes)
    assert steps[0] == max(steps) == 3
    assert len(steps) < sum(max(passes[i : i + 3]) for i in range(0, len(passes), 3))


def test_what_keeps_nothing_between_passes_answers_the_same(
    model: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = dict(model.answers([prompts], max_new_tokens=6, size=4))
    monkeypatch.setattr(model.language, "caches", False)
    empty = Prompts([])  # whose pictures could not be read
    assert dict(model.answers([empty, prompts], max_new_tokens=6, size=4)) == together


@pytest.mark.parametrize("caches", [True, False])
def test_pictures_and_words_side_by_side(
    model: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, caches: bool
) -> None:
    """Words stand before a picture, between two, and after."""
    monkeypatch.setattr(model.language, "caches", caches)
    words = torch.randint(0, 90, (2, 8, 3), generator=torch.Generator().manual_seed(3))
    picture, ids = prompts.spans.pixels[:1], prompts.ids[0]
    shown = [Spans(words=words[:1]), Spans(picture), Spans(words=words[1:])]
    one_by_one = [Prompts([ids], spans) for spans in shown]
    wanted = [dict(model.answers([one], max_new_tokens=4, size=1))[0] for one in one_by_one]
    assert len({tuple(answer) for answer in wanted}) == 3
    mixed = Prompts([ids] * 3, Spans.join(shown))
    assert dict(model.answers([mixed], max_new_tokens=4, size=3)) == dict(enumerate(wanted))


@pytest.mark.parametrize(("sharded", "together"), [(False, True), (True, False)])
def test_processes_that_share_layers_answer_batch_by_batch(
    model: Any,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    sharded: bool,
    together: bool,
) -> None:
    """Those of DDP, whose graphs are uniform, too, do not."""
    monkeypatch.setattr(model, "uniform_graph", True)
    monkeypatch.setattr(model, "sharded", sharded)
    joined: list[int] = []
    join = Batch.join
    monkeypatch.setattr(Batch, "join", lambda self, new: joined.append(len(new)) or join(self, new))
    monkeypatch.setattr(model, "generate_ids", lambda ids, *_, **__: [[1]] * len(ids))
    answers = dict(model.answers([prompts], max_new_tokens=4, size=3))
    assert len(answers) == len(QUESTIONS)
    assert bool(joined) == together
    assert (set(map(tuple, answers.values())) == {(1,)}) == sharded


def test_prompts_and_answers_must_fit(model: Any, prompts: Prompts) -> None:
    longest = max(map(len, prompts.ids))
    with pytest.raises(ConfigError, match=f"a prompt of {longest} tokens and max_new_tokens 8192 "):
        next(model.answers([prompts], max_new_tokens=8192, size=2))


def test_output_that_is_not_a_number(
    model: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = model.language.head
    monkeypatch.setattr(head, "weight", torch.nn.Parameter(head.weight * torch.nan))
    with pytest.raises(WeightsError, match="is not a number"):
        next(model.answers([prompts], max_new_tokens=2, size=2))
