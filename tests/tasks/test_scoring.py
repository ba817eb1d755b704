"""Scores: normalization, grouping, the blind baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lavis.common.types import NO_FEATURES, NO_WORDS
from lavis.processors.conversation import Turn
from lavis.tasks.scoring import Prediction, normalize, predict, score, table


def _prediction(kind: str, language: str, answer: str, truth: str) -> Prediction:
    return Prediction("id", kind, language, "?", answer, truth, "")


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("a Red  circle!", "The red circle."), ("红色", "红色。"), ("两个。", "两个"), ("ＡＢ", "ab")],
)
def test_normalization_forgives(answer: str, truth: str) -> None:
    assert normalize(answer) == normalize(truth)


def test_normalization_does_not_forgive() -> None:
    assert normalize("red square") != normalize("red circle")
    assert normalize("") != normalize("有。")


def test_scores_by_kind_and_language() -> None:
    pytest.importorskip("sacrebleu")
    scores = score(
        [
            _prediction("colour", "en", "Red.", "red"),
            _prediction("colour", "en", "Blue.", "Red."),
            _prediction("count", "zh", "两个。", "两个"),
            _prediction("description", "en", "a b c d e", "a b c d e"),
        ]
    )
    assert scores["overall"] == pytest.approx(200 / 3)
    assert scores["count"] == 3
    assert scores["kinds"]["colour"]["en"] == {"exact": 50.0, "count": 2}
    assert scores["kinds"]["description"]["en"]["bleu"] == pytest.approx(100)
    lines = table({"test": scores}).splitlines()
    assert lines[1].split() == ["colour", "en", "50.0%"]
    assert lines[-1].split() == ["all", "questions", "66.7%"]


class _Record:
    def __init__(self, number: int) -> None:
        self.sample_id = str(number)
        self.turns = (Turn("user", "<Img><ImageHere></Img> Which?"), Turn("assistant", str(number)))
        self.images = (f"{number}.png",)
        self.tags: dict[str, str] = {}


class _Dataset:
    """Image number i is filled with i."""

    def __init__(self, size: int) -> None:
        self.records = [_Record(i) for i in range(size)]

    def turns(self, record: _Record) -> list[Turn]:
        return list(record.turns)

    def images(self, record: _Record, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert record is self.records[index]
        return torch.full((1, 3, 2, 2), float(record.sample_id)), NO_FEATURES

    def word_ids(self, record: _Record) -> torch.Tensor:
        return NO_WORDS


class _Seer:
    """Answers with the number in the picture."""

    class encoder:  # noqa: N801
        @staticmethod
        def prompt(turns: list[Turn]) -> list[int]:
            return [0] * len(turns[-1].text)

    class tokenizer:  # noqa: N801
        @staticmethod
        def decode(ids: list[int], skip_special_tokens: bool = False) -> str:
            return str(ids[0])

    def generate_ids(self, prompts: Any, images: torch.Tensor, **_: Any) -> list[list[int]]:
        assert len(prompts) == len(images)
        return [[int(image[0, 0, 0])] for image in images]


def test_who_sees_is_right_and_who_is_blind_is_not() -> None:
    dataset: Any = _Dataset(20)
    seen = predict(_Seer(), dataset, batch_size=3, max_new_tokens=1)
    assert [p.right for p in seen] == [True] * 20
    assert {p.question for p in seen} == {"Which?"}
    blind = predict(_Seer(), dataset, batch_size=3, max_new_tokens=1, blind=True)
    assert sum(p.right for p in blind) < 5
    assert sorted(p.answer for p in blind) == sorted(p.truth for p in blind)
