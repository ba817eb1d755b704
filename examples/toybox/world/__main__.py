"""Write the toybox's pictures and annotations: ``python -m examples.toybox.world --out DIR``."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.toybox.world.clips import make_clip, write_video
from examples.toybox.world.questions import DRILLS, KINDS, LANGUAGES, Language, Question, ask
from examples.toybox.world.scenes import Scene, draw, in_words, random_scene
from lavis.common.cli import output_folder, positive, run_cli, setup_logging
from lavis.common.errors import DataError

_TEST_KINDS = tuple(kind for kind in KINDS if kind not in DRILLS)
_SHORT_KINDS = tuple(kind for kind in _TEST_KINDS if kind != "description")
_LESSONS: dict[str, dict[str, Any]] = {
    "train": {"turns": 4, "scan": 0.4, "lists": 0.4, "description": 0.3, "shuffled": True},
    "single": {"turns": 1, "scan": 0.0, "lists": 0.0, "description": 0.0},
    "vision": {"turns": 0, "scan": 1.0, "lists": 0, "description": 0.0},
    "text_first": {"turns": 6, "scan": 0.3, "lists": 1, "description": 0.2},
    "text_second": {"turns": 6, "scan": 0.2, "lists": 1, "description": 0.2},
    "text_chat": {
        "turns": 5,
        "scan": 0.1,
        "lists": 0.4,
        "description": 0.4,
        "shuffled": True,
        "more": ("relation", "count", "yesno"),
    },
    "text_last": {
        "turns": 4,
        "scan": 0.05,
        "lists": 0.2,
        "description": 0.3,
        "shuffled": True,
        "more": ("relation", "relation", "relation", "count", "count", "yesno", "colour"),
    },
}
"""Conversations of the training splits: numbers of questions, chances of the long answers. Those
are few: most of a loss that counts tokens would be theirs."""
SIZES = {
    "train": 20_000,
    "single": 25_600,
    "val": 1_000,
    "test": 2_000,
    "test_pairs": 1_000,
    "vision": 60_000,
    "text_first": 20_000,
    "text_second": 36_000,
    "text_chat": 24_000,
    "text_last": 40_000,
    "text_val": 900,
    "clips": 6_000,
    "clips_test": 600,
}
CLIPS = ("clips", "clips_test")
"""Splits that show videos."""


def main() -> int:
    """Parse the command line and write the splits."""
    parser = argparse.ArgumentParser(description="Write the toybox: pictures and annotations.")
    parser.add_argument("--out", required=True, type=output_folder, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--languages", nargs="+", action="extend", choices=LANGUAGES, help="default: all"
    )
    parser.add_argument(
        "--splits", nargs="+", action="extend", choices=SIZES, help="default: all but the videos"
    )
    for split, size in SIZES.items():
        flag, text = f"--{split.replace('_', '-')}", f"records of {split}, default: %(default)s"
        parser.add_argument(flag, type=positive, default=size, metavar="N", help=text)
    args = parser.parse_args()
    setup_logging()
    for split in dict.fromkeys(args.splits or [s for s in SIZES if s not in CLIPS]):
        languages = tuple(dict.fromkeys(args.languages or LANGUAGES))
        write_split(args.out, split, getattr(args, split), args.seed, languages)
    return 0


def write_split(
    out: Path, split: str, count: int, seed: int, languages: Sequence[Language] = LANGUAGES
) -> None:
    """Write ``<split>.json`` and, for splits with pictures, ``image/<split>/*.png``, or ``*.mp4``.

    A split depends on the seed, its name and nothing else; a longer one begins as a shorter one.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder = out if split.startswith("text") else out / "image" / split
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for number in tqdm(range(count), desc=split, unit=" records"):
            rng = random.Random(f"{seed}/{split}/{number}")
            records.append(make_record(rng, split, number, out, languages))
        path = out / f"{split}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"--out: cannot write {out}: {error}") from error


def make_record(
    rng: random.Random,
    split: str,
    number: int,
    out: Path,
    languages: Sequence[Language] = LANGUAGES,
) -> dict[str, Any]:
    """One annotation, its picture, if the split has pictures, written below ``out``.

    Training splits have conversations of several turns; the others one question, tagged with its
    kind and language, which take turns.
    """
    held_out = None if split.startswith("text") else split == "test_pairs"
    record: dict[str, Any] = {"id": f"{split}-{number}"}
    if split in CLIPS:
        frames, questions = make_clip(rng, number, languages, train=split == "clips")
        name = f"{split}/{number:05d}.mp4"
        write_video(frames, out / "image" / name)
        if split != "clips":
            record |= {"kind": questions[0].kind, "language": questions[0].language}
        return record | {"video": name} | _turns(questions)
    scene = random_scene(rng, held_out=held_out)
    if split in _LESSONS:
        questions = _lesson(scene, rng, languages, **_LESSONS[split])
    else:
        kind = _TEST_KINDS[number % len(_TEST_KINDS)]
        language = languages[number // len(_TEST_KINDS) % len(languages)]
        while (question := ask(scene, rng, kind, language)) is None:
            scene = random_scene(rng, held_out=held_out)
        questions = [question]
        record |= {"kind": kind, "language": language}
    if split.startswith("text"):
        return record | {"words": in_words(scene)} | _turns(questions)
    name = f"{split}/{number:05d}.png"
    draw(scene, rng).save(out / "image" / name)
    return record | {"image": name} | _turns(questions)


def _lesson(
    scene: Scene,
    rng: random.Random,
    languages: Sequence[Language],
    *,
    turns: int,
    scan: float,
    lists: float,
    description: float,
    shuffled: bool = False,
    more: tuple[str, ...] = (),
) -> list[Question]:
    """A conversation: a scan, a list, questions of different kinds, a description; each perhaps.

    In this order drills prepare for questions; ``shuffled``, any of them may come first. ``more``
    are kinds that are asked besides, because they are learned last.
    """
    kinds = [*rng.sample(_SHORT_KINDS, turns), *more]
    if lists == 1 or rng.random() < lists:
        kinds.insert(0, "list")
    if rng.random() < scan:
        kinds.insert(0, "scan")
    if rng.random() < description:
        kinds.append("description")
    if shuffled:
        rng.shuffle(kinds)
    made = (ask(scene, rng, kind, rng.choice(languages)) for kind in kinds)
    return [q for q in made if q is not None] or [_must(scene, rng)]


def _must(scene: Scene, rng: random.Random) -> Question:
    question = ask(scene, rng, "count", "en")
    assert question is not None
    return question


def _turns(questions: list[Question]) -> dict[str, Any]:
    first = f"<Img><ImageHere></Img> {questions[0].question}"
    instructions = [first, *(q.question for q in questions[1:])]
    outputs = [q.answer for q in questions]
    if len(questions) == 1:
        return {"instruction": instructions[0], "output": outputs[0]}
    return {"instruction": instructions, "output": outputs}


if __name__ == "__main__":
    run_cli(main)
