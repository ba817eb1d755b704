"""Scores: normalization, grouping, the blind baseline."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.toybox.world.__main__ import make_record
from lavis.common.errors import DataError
from lavis.common.types import Spans
from lavis.datasets.annotations import Record
from lavis.processors.conversation import Turn
from lavis.tasks.scoring import Prediction, normalize, predict, score, table


def _prediction(kind: str, language: str, answer: str, truth: str) -> Prediction:
    return Prediction("id", kind, language, "?", answer, truth, "")


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("a Red  circle!", "The red circle."), ("红色", "红色。"), ("两个。", "两个"),
        ("ＡＢ", "ab"), ("A.", "A"), ("(A)", "a"), ("An owl", "owl."), ("a T-shirt", "t shirt"),
        ('the "red" circle', "red circle"), ("“红色”！", "「红色」"), ("好的～", "好的"),
        ("**Red**", "red"), ("# Red", "red"), ("`cat`", "cat"), ("don’t", "don't"),
        ("x=5", "x = 5"), ("50 %", "50%"), ("\u22125", "-5"), ("- 5", "-5"), ("5 - 3", "5-3"),
        ("covid-19", "Covid 19"), ("a cat - black", "cat, black"), ("1, 2", "1,2"),
        ("3.5.", "3.5"), ("½", "1/2"), ("\u2764\ufe0f", "\u2764"), ("cat\u200b", "cat"),
        ("…", "..."),
    ],
)  # fmt: skip
def test_normalization_forgives(answer: str, truth: str) -> None:
    assert normalize(answer) == normalize(truth)


def test_normalization_does_not_forgive() -> None:
    assert normalize("red square") != normalize("red circle")
    assert normalize("") != normalize("有。")


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("A", "<"), ("An", "A"), ("The", "a"), ("Option", "Option A"), ("B", "A, B"), ("!", "?"),
        ("", "。"), ("+", "-"), ("<", ">"), ("=", "≠"), ("a = b", "a != b"), ("😀", "🐱"),
        ("a 😀", "a 🐱"), ("👍🏽", "👍🏿"), ("🏴\U000e0067\U000e007f", "🏴\U000e0077\U000e007f"),
        ("5", "-5"), ("It is 5 degrees", "It is -5 degrees"), ("答案是5", "答案是-5"),
        ("$5", "-$5"),
        (".5", "-.5"), ("x", "-x"), ("53", "5-3"), ("O", "O-"), ("O+", "O-"), ("C++", "C#"),
        ("C", "C++"), ("C", "C#"), ("35", "3.5"), ("3 5", "3.5"), ("3:5", "3.5"), ("5", ".5"),
        ("12", "1/2"), ("1 2", "1/2"), ("50", "50%"), ("5", "$5"), ("¥5", "$5"), ("5", "5°"),
        ("5", "~5"), ("3 4", "3*4"), ("102", "10²"), ("11/2", "1½"), ("23", "2^3"), ("R D", "R&D"),
    ],
)  # fmt: skip
def test_signs_that_mean_something_count(answer: str, truth: str) -> None:
    assert normalize(answer) != normalize(truth)
    assert normalize(truth) == normalize(truth.upper()) == normalize(f" {truth} ")


def test_the_toyboxs_answers_are_told_apart_as_ever() -> None:
    """Sentences without signs: words alone decide, without articles."""
    records = [make_record(random.Random(i), "text_val", i, Path()) for i in range(900)]
    texts = {r["output"] for r in records}
    assert len(texts) > 200
    for text in texts:
        words = re.sub(r"\W+", " ", text.lower()).split()
        assert normalize(text) == " ".join(w for w in words if w not in ("a", "an", "the"))


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
    assert scores["skipped"] == []
    lines = table({"test": scores}).splitlines()
    assert lines[1].split() == ["colour", "en", "50.0%"]
    assert lines[-1].split() == ["all", "questions", "66.7%"]


TRUTH, ANSWER = "左边有一个红色的圆形，右边有一个方形。", "左边有一个蓝色的圆形，右边有一个方形。"


@pytest.mark.parametrize("language", ["zh", "zh-CN", "zh_Hant_TW", "Chinese", "中文", "cmn", "-"])
def test_chinese_is_scored_alike_whatever_it_is_called(language: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    wanted = sacrebleu.corpus_bleu([ANSWER], [[TRUTH]], tokenize="zh").score
    assert 50 < wanted < 95
    scores = score([_prediction("description", language, ANSWER, TRUTH)])
    assert scores["kinds"]["description"][language]["bleu"] == pytest.approx(wanted)
    assert (scores["overall"], scores["count"]) == (None, 0)
    lines = [line.split() for line in table({"test": scores}).splitlines()]
    assert lines[1:] == [
        ["description", language, "BLEU", f"{wanted:.1f}"],
        ["all", "questions", "-"],
    ]


@pytest.mark.parametrize(
    ("truth", "answer", "tokenize"),
    [
        ("赤い円が左にあります。", "青い円が左にあります。", "char"),
        ("왼쪽에 빨간 원이 있습니다.", "왼쪽에 파란 원이 있습니다.", "char"),
        ("A red circle, the Chinese word 圆 on it.", "A red circle, the word 圆 on it.", "13a"),
        ("用 PyTorch 训练 transformer 模型。", "用 PyTorch 训练一个模型。", "zh"),
        ("Красный круг слева, синий справа.", "Красный круг слева, зелёный справа.", "13a"),
    ],
)
def test_the_script_chooses_the_words_of_bleu(truth: str, answer: str, tokenize: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    scores = score([_prediction("description", "-", answer, truth)])
    wanted = sacrebleu.corpus_bleu([answer], [[truth]], tokenize=tokenize).score
    assert scores["kinds"]["description"]["-"]["bleu"] == pytest.approx(wanted)


def _record(number: int) -> Record:
    turns = Turn("user", "<Img><ImageHere></Img> Which?"), Turn("assistant", str(number))
    return Record(str(number), turns, images=(Path(f"{number}.png"),))


class _Dataset:
    """Image number i is filled with i."""

    def __init__(self, size: int) -> None:
        self.records = [_record(i) for i in range(size)]

    def turns(self, record: Record) -> list[Turn]:
        return list(record.turns)

    def spans(self, record: Record, epoch: int, index: int) -> Spans:
        assert record.turns is self.records[index].turns
        return Spans(torch.full((1, 3, 2, 2), float(record.images[0].stem)))


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

    def answers(self, batches: Any, **_: Any) -> Any:
        number = 0
        for prompts in batches:
            assert len(prompts.ids) == len(prompts.spans.pixels)
            for image in prompts.spans.pixels:
                yield number, [int(image[0, 0, 0])]
                number += 1


def test_who_sees_is_right_and_who_is_blind_is_not() -> None:
    dataset: Any = _Dataset(20)
    seen = predict(_Seer(), dataset, batch_size=3, max_new_tokens=1)
    assert [p.right for p in seen] == [True] * 20
    assert {p.question for p in seen} == {"Which?"}
    blind = predict(_Seer(), dataset, batch_size=3, max_new_tokens=1, blind=True)
    assert sum(p.right for p in blind) < 5
    assert sorted(p.answer for p in blind) == sorted(p.truth for p in blind)


def test_what_was_asked_before_a_bad_picture_is_answered() -> None:
    """Also what is under way when the picture is met: batches are read ahead."""

    class Ahead(_Seer):
        def answers(self, batches: Any, **_: Any) -> Any:
            yield from super().answers(list(batches))

    class Damaged(_Dataset):
        def spans(self, record: Record, epoch: int, index: int) -> Any:
            if record.sample_id == "4":
                raise DataError("damaged")
            return super().spans(record, epoch, index)

    dataset: Any = Damaged(6)
    kept: list[str] = []
    with pytest.raises(DataError, match=r"^4: damaged"):
        predict(
            Ahead(), dataset, batch_size=2, max_new_tokens=1,
            keep=lambda new: kept.extend(p.answer for p in new),
        )  # fmt: skip
    assert kept == ["0", "1", "2", "3"]
