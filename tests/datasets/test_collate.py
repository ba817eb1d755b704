"""Samples -> one packed row, with exact tensors."""

from __future__ import annotations

import torch

from lavis.common.types import IGNORE_INDEX, BadSample, Sample, Spans
from lavis.datasets.collate import collate


def sample(name: str, ids: list[int], labels: list[int], *images: float) -> Sample:
    pixels = [torch.full((3, 2, 2), value) for value in images]
    spans = Spans(torch.stack(pixels)) if pixels else Spans()
    return Sample(name, torch.tensor(ids), torch.tensor(labels), spans)


def test_two_documents() -> None:
    first = sample("one", [11, 13, 17], [11, -100, 17], 0.25)
    second = sample("two", [19, 23], [19, 23])
    third = sample("three", [29, 31, 37, 41], [-100, -100, 37, 41], 0.5, 0.75)
    batch = collate([first, second, third])
    assert batch.input_ids.tolist() == [[11, 13, 17, 19, 23, 29, 31, 37, 41]]
    # the first position of a document has nothing before it in its own document
    assert batch.labels.tolist() == [[-100, -100, 17, -100, 23, -100, -100, 37, 41]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.lengths == (3, 2, 4)
    assert batch.spans.pixels.shape == (3, 3, 2, 2)
    assert batch.spans.pixels[:, 0, 0, 0].tolist() == [0.25, 0.5, 0.75]
    assert batch.sample_ids == ("one", "two", "three")
    assert batch.bad == ()
    assert batch.num_tokens == 9
    assert batch.num_supervised == 4


def test_samples_are_left_as_they_were() -> None:
    alone = sample("one", [11, 13], [11, 13])
    collate([alone])
    assert alone.labels.tolist() == [11, 13]


def test_bad_samples_are_carried_along_by_name() -> None:
    bad = BadSample("broken", "why")
    batch = collate([bad, sample("one", [11, 13], [11, 13]), bad])
    assert batch.bad == (bad, bad)
    assert batch.sample_ids == ("one",)
    assert batch.input_ids.tolist() == [[11, 13]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, 13]]


def test_nothing_but_bad_samples() -> None:
    batch = collate([BadSample("broken", "why")])
    assert batch.num_supervised == 0
    # two tokens: something to compute, in step with other processes
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 2)
    assert batch.bad == (BadSample("broken", "why"),)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert len(batch.spans.pixels) == 0
    assert batch.sample_ids == ()


def test_a_process_without_samples() -> None:
    batch = collate([])
    assert batch.input_ids.shape == (1, 2)
    assert (batch.num_supervised, batch.sample_ids, batch.bad) == (0, (), ())


def test_text_only() -> None:
    assert len(collate([sample("one", [11, 13], [11, 13])]).spans.pixels) == 0


def described(name: str, *phrases: list[int]) -> Sample:
    spans = Spans(words=torch.tensor([phrases]))
    return Sample(name, torch.tensor([11]), torch.tensor([11]), spans)


def test_spans_of_pictures_and_of_words_keep_their_order() -> None:
    batch = collate(
        [
            described("one", [5, 6], [7, -1]),
            sample("two", [11], [11], 0.25, 0.5),
            described("three", [8, 9, 10], [4, -1, -1]),
        ]
    )
    assert batch.spans.described == (True, False, False, True)
    assert batch.spans.words.tolist() == [[[5, 6, -1], [7, -1, -1]], [[8, 9, 10], [4, -1, -1]]]
    assert len(batch.spans.pixels) == 2
