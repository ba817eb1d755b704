"""The toybox's world: deterministic, honest splits, answers that follow from the scene."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from examples.toybox.world.__main__ import write_split
from examples.toybox.world.questions import DRILLS, KINDS, LANGUAGES, ask
from examples.toybox.world.scenes import (
    COLOURS,
    COMPASS,
    HELD_OUT,
    SHAPES,
    Thing,
    draw,
    in_words,
    random_scene,
)

SCENE = (Thing("big", "red", "circle", 0), Thing("small", "blue", "square", 2))


def _answer(kind: str, language: str, question_part: str, scene: tuple[Thing, ...] = SCENE) -> str:
    """The answer to the first question of a kind that contains a text."""
    for seed in range(300):
        question = ask(scene, random.Random(seed), kind, language)  # type: ignore[arg-type]
        if question is not None and question_part in question.question:
            return question.answer
    raise AssertionError(f"no {kind} question about {question_part!r}")


@pytest.mark.parametrize(
    ("kind", "language", "about", "answer"),
    [
        ("colour", "en", "the square", "Blue."),
        ("colour", "zh", "圆形", "红色。"),
        ("shape", "en", "blue", "A square."),
        ("size", "en", "red circle", "Big."),
        ("size", "zh", "蓝色正方形", "小。"),
        ("count", "en", "How many objects are", "Two."),
        ("count", "zh", "有几个物体", "两个。"),
        ("count", "en", "red objects", "One."),
        ("where", "en", "red circle", "Top left."),
        ("where", "zh", "蓝色正方形", "右上角。"),
        ("naming", "en", "top right", "A small blue square."),
        ("naming", "zh", "左上角", "大的红色圆形。"),
        ("relation", "en", "where is the red circle?", "To the left."),
        ("description", "zh", "描述", "左上角有一个大的红色圆形，右上角有一个小的蓝色正方形。"),
    ],
)
def test_answers_follow_from_the_scene(kind: str, language: str, about: str, answer: str) -> None:
    assert _answer(kind, language, about) == answer


def test_yes_and_no_are_true() -> None:
    answers = set()
    for seed in range(100):
        question = ask(SCENE, random.Random(seed), "yesno", "en")
        assert question is not None
        there = any(f"{t.colour} {t.shape}" in question.question for t in SCENE)
        assert question.answer == ("Yes." if there else "No.")
        answers.add(question.answer)
    assert answers == {"Yes.", "No."}


def test_a_question_that_would_be_ambiguous_is_not_asked() -> None:
    twins = (Thing("big", "red", "circle", 0), Thing("small", "red", "circle", 4))
    for seed in range(50):
        rng = random.Random(seed)
        for kind in ("colour", "shape", "size", "where", "relation"):
            assert ask(twins, rng, kind, "en") is None


def test_held_out_pairs_never_mix_with_the_others() -> None:
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    for seed in range(200):
        for held_out in (True, False):
            scene = random_scene(random.Random(seed), held_out=held_out)
            assert all(((t.colour, t.shape) in HELD_OUT) == held_out for t in scene)
            assert [t.place for t in scene] == sorted({t.place for t in scene})


def test_words_name_every_cell() -> None:
    phrases = in_words(SCENE)
    assert len(phrases) == 9
    assert phrases[:3] == ["northwest big red circle", "north empty", "northeast small blue square"]
    assert phrases[3:] == [f"{p} empty" for p in COMPASS[3:]]


def test_picture_shows_the_colours_in_their_places() -> None:
    image = draw(SCENE, random.Random(0))
    assert image.size == (84, 84)
    red, green, blue = image.getpixel((14, 14))  # type: ignore[misc]
    assert red > 180
    assert max(green, blue) < 80
    red, green, blue = image.getpixel((70, 14))  # type: ignore[misc]
    assert blue > 180
    assert min(image.getpixel((42, 70))) > 200  # type: ignore[type-var, arg-type]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for folder, count in (("a", 20), ("b", 12)):
        write_split(tmp_path / folder, "test", count, seed=5)
    first, second = (json.loads((tmp_path / f / "test.json").read_text()) for f in "ab")
    assert first[:12] == second
    for record in second:
        name = Path("image") / record["image"]
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write_split(tmp_path / "c", "test", 12, seed=6)
    assert json.loads((tmp_path / "c" / "test.json").read_text()) != second


def test_splits_cover_every_kind_in_both_languages(tmp_path: Path) -> None:
    write_split(tmp_path, "test_pairs", 40, seed=0)
    write_split(tmp_path, "text_first", 5, seed=0)
    records = json.loads((tmp_path / "test_pairs.json").read_text())
    asked = {(r["kind"], r["language"]) for r in records}
    assert asked == {(k, lang) for k in KINDS if k not in DRILLS for lang in LANGUAGES}
    assert all(r["instruction"].count("<ImageHere>") == 1 for r in records)
    with Image.open(tmp_path / "image" / records[0]["image"]) as image:
        assert image.size == (84, 84)
    text = json.loads((tmp_path / "text_first.json").read_text())
    assert all("image" not in r and len(r["words"]) == 9 for r in text)


def test_lists_keep_together_what_belongs_together() -> None:
    rows = set()
    for seed in range(200):
        question = ask(SCENE, random.Random(seed), "list", "en")
        assert question is not None
        if question.question == "List colour, shape.":
            rows.add(question.answer)
    assert rows == {"Red circle, blue square.", "Blue square, red circle."}
