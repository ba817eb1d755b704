"""Public benchmarks, read from the files that their authors publish.

| builder | ``annotations.<split>.storage`` | ``images.storage`` |
|---|---|---|
| ``gqa`` | ``testdev_balanced_questions.json`` | folder of ``<imageId>.jpg`` |
| ``vqav2`` | the questions' file and the annotations' file | ``val2014`` |
| ``textvqa`` | ``TextVQA_0.5.1_val.json`` | ``train_images`` |
| ``pope`` | ``coco_pope_{random,popular,adversarial}.json`` | ``val2014`` |
| ``mme`` | the folder that has ``existence``, ``count``, ... in it | none |
| ``mmbench`` | ``mmbench_dev_en.tsv``, with or without rotated options | a folder to unpack to |
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis.common.errors import ConfigError, DataError, raised_as
from lavis.common.paths import is_file, replaces
from lavis.common.types import IMAGE_PLACEHOLDER, BadSample, Reference
from lavis.datasets.annotations import NOT_JSON, Record, as_object, read_lines, read_text
from lavis.datasets.builders import InstructionBuilder
from lavis.datasets.config import BenchmarkConfig
from lavis.processors.conversation import IMAGE, ConversationEncoder, Turn

MME_DIVISIONS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
        "artwork", "OCR",
    ),
    "cognition": (
        "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
    ),
}  # fmt: skip
_SHORT = "{question}\nAnswer the question using a single word or phrase."
_LETTER = "{question}\nAnswer with the option's letter from the given choices directly."
_ROTATION = 1_000_000  # MMBench adds it to a question's index for each order of its options


@dataclass(frozen=True)
class Question:
    """A benchmark's question about one image."""

    sample_id: str
    text: str
    image: Path
    truth: str
    kind: str
    reference: Reference = Reference()


Asked = Iterator[Question | BadSample]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked and scored.

    Attributes:
        read: questions out of the files of a split and the folder of images.
        score: the name of its metric.
        prompt: around the question, unless the YAML has another.
        in_folders: whether ``storage`` names a folder, which holds the images, too.
    """

    read: Callable[[Sequence[Path], Path], Asked]
    score: str
    prompt: str = _SHORT
    in_folders: bool = False


@dataclass(frozen=True)
class BenchmarkBuilder(InstructionBuilder):
    """Builds the splits of a public benchmark."""

    config: BenchmarkConfig

    def check_paths(self, splits: tuple[str, ...]) -> None:
        """As for any data set; all but MME need a folder of images."""
        super().check_paths(splits)
        key = f"datasets.{self.name}.build_info.images.storage"
        if self._media_root is None and not self._in_folders:
            raise ConfigError(
                f"{key} is missing: name the folder of the images (docs/evaluate.md says which)"
            )
        if self._media_root is not None and self._in_folders:
            raise ConfigError(f"{key}: the images are read where the annotations are; remove it")

    def _records(
        self, split: str, encoder: ConversationEncoder
    ) -> Iterator[tuple[str, Iterable[Record | BadSample]]]:
        asked = self._benchmark.read(self._annotation_files(split), self._media_root or Path())
        prompt = self.config.prompt or self._benchmark.prompt
        yield self.name, [q if isinstance(q, BadSample) else _record(q, prompt) for q in asked]

    @property
    def _benchmark(self) -> Benchmark:
        return _BENCHMARKS[self.config.builder]

    @property
    def _score(self) -> str:
        return self.config.score or self._benchmark.score

    @property
    def _in_folders(self) -> bool:
        return self._benchmark.in_folders


def _record(question: Question, prompt: str) -> Record | BadSample:
    if IMAGE_PLACEHOLDER in question.text:
        return BadSample(question.sample_id, f"the question holds {IMAGE_PLACEHOLDER}")
    if not is_file(question.image):
        return BadSample(question.sample_id, f"no image {question.image!s:.300}")
    asked = prompt.replace("{question}", question.text)
    return Record(
        question.sample_id,
        (Turn("user", f"{IMAGE} {asked}"), Turn("assistant", question.truth)),
        images=(question.image,),
        tags={"kind": question.kind},
        reference=question.reference,
    )


def _gqa(paths: Sequence[Path], images: Path) -> Asked:
    """Of an unbalanced file, the balanced questions, which alone count towards the accuracy."""

    def question(sample_id: str, raw: dict[str, Any]) -> Question:
        structural = _text(as_object(raw.get("types")), "structural")
        return Question(
            sample_id,
            _text(raw, "question"),
            images / f"{_name(raw, 'imageId')}.jpg",
            _text(raw, "answer"),
            structural,
            Reference(division="open" if structural == "query" else "binary"),
        )

    for path in paths:
        rows = _json(path)
        balanced = ((k, v) for k, v in rows.items() if as_object(v).get("isBalanced", True))
        yield from _each(path.name, balanced, question)


def _vqav2(paths: Sequence[Path], images: Path) -> Asked:
    files = [_json(path) for path in paths]
    questions = [file for file in files if "questions" in file]
    answers = {
        as_object(row).get("question_id"): row
        for file in files
        for row in _rows(file.get("annotations") or [])
    }
    if not questions or not answers:
        missing = "annotations" if questions else "questions"
        raise DataError(
            f"{', '.join(map(str, paths))}: VQAv2 has a file of questions and one of annotations; "
            f"there is none with `{missing}`. Name both in `storage: [..., ...]`"
        )

    for file in questions:
        subset = str(file.get("data_subtype", "")).replace("test-dev", "test")

        def question(sample_id: str, raw: dict[str, Any], subset: str = subset) -> Question:
            found = as_object(answers.get(raw.get("question_id"), {}))
            given = [_text(as_object(a), "answer") for a in _rows(found.get("answers") or [])]
            name = _name(raw, "image_id").zfill(12)
            names = (f"COCO_{subset}_{name}.jpg", f"{name}.jpg")
            files = [images / name for name in names]
            return Question(
                sample_id,
                _text(raw, "question"),
                next(filter(is_file, files), files[0]),
                _commonest(given),
                str(found.get("answer_type", "question")),
                Reference(answers=tuple(given)),
            )

        yield from _each("questions", enumerate(_rows(file["questions"])), question)


def _textvqa(paths: Sequence[Path], images: Path) -> Asked:
    def question(sample_id: str, raw: dict[str, Any]) -> Question:
        given = [str(answer) for answer in _rows(raw.get("answers") or [])]
        image = images / f"{_name(raw, 'image_id')}.jpg"
        reference = Reference(answers=tuple(given))
        text = _text(raw, "question")
        return Question(sample_id, text, image, _commonest(given), "question", reference)

    for path in paths:
        yield from _each(path.name, enumerate(_rows(_json(path).get("data"))), question)


def _pope(paths: Sequence[Path], images: Path) -> Asked:
    """JSON lines, whatever the files are called; the end of the name is the setting."""
    for path in paths:
        setting = path.stem.rpartition("_")[2]

        def question(sample_id: str, raw: dict[str, Any], setting: str = setting) -> Question:
            image = images / _name(raw, "image")
            return Question(sample_id, _text(raw, "text"), image, _text(raw, "label"), setting)

        yield from _each(path.name, read_lines(read_text(path)), question)


def _mme(paths: Sequence[Path], _: Path) -> Asked:
    """A folder for each category; images beside the texts, or in ``images`` beside
    ``questions_answers_YN``. A text has a line for each question: the question, a tab, Yes or No.
    """
    for folder in paths:
        found = False
        for division, categories in MME_DIVISIONS.items():
            for category in categories:
                texts = folder / category / "questions_answers_YN"
                split = texts.is_dir()
                texts, images = (texts, texts.parent / "images") if split else (texts.parent,) * 2
                for path in sorted(texts.glob("*.txt")):
                    found = True
                    yield from _mme_pair(path, images, category, division)
        if not found:
            raise DataError(
                f"{folder} has no category of MME with texts in it (existence, count, ...): name "
                "the folder that holds them, such as MME_Benchmark"
            )


def _mme_pair(path: Path, images: Path, category: str, division: str) -> Asked:
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    found = (images / f"{path.stem}{end}" for end in (".jpg", ".png", ".jpeg"))
    image = next(filter(is_file, found), images / f"{path.stem}.jpg")
    group = f"{category}/{path.stem}"
    for number, line in enumerate(lines):
        text, _, truth = (part.strip() for part in line.partition("\t"))
        sample_id = f"{group}[{number}]"
        if len(lines) != 2 or not truth:
            why = f"{path} must hold two lines of a question, a tab and Yes or No"
            yield BadSample(sample_id, why)
            continue
        reference = Reference(group=group, group_size=2, division=division)
        yield Question(sample_id, text, image, truth, category, reference)


def _mmbench(paths: Sequence[Path], images: Path) -> Asked:
    csv.field_size_limit(1 << 30)  # a field holds a whole image
    for path in paths:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
        sizes = Counter(_base(row) for row in rows)
        packed = {row.get("index"): row.get("image") or "" for row in rows}

        def question(
            sample_id: str,
            raw: dict[str, Any],
            sizes: Counter[str] = sizes,
            packed: dict[Any, str] = packed,
        ) -> Question:
            options = {c: raw[c] for c in string.ascii_uppercase if _given(raw, c)}
            hint = [raw["hint"]] if _given(raw, "hint") else []
            listed = [f"{letter}. {text}" for letter, text in options.items()]
            image = packed.get(raw.get("image"), raw.get("image") or "")  # or another row's index
            division = next((raw[k] for k in ("l2-category", "L2-category") if _given(raw, k)), "")
            return Question(
                sample_id,
                "\n".join([*hint, _text(raw, "question"), *listed]),
                _unpack(image, images),
                _text(raw, "answer"),
                raw["category"] if _given(raw, "category") else "question",
                Reference(
                    options=options,
                    group=_base(raw),
                    group_size=sizes[_base(raw)],
                    division=division,
                ),
            )

        yield from _each(path.name, ((row.get("index"), row) for row in rows), question)


def _base(row: dict[str, Any]) -> str:
    """The index of a question whose options stand in their first order."""
    index = row.get("index") or ""
    if not index.isdecimal():
        raise DataError(f"an index of MMBench must be a number, not {index!r:.60}")
    return str(int(index) % _ROTATION)


def _given(row: dict[str, Any], key: str) -> bool:
    return (row.get(key) or "nan").strip().lower() not in ("", "nan")


def _unpack(packed: str, folder: Path) -> Path:
    """Write an image to a file that is named after its content, unless it is there."""
    with raised_as(DataError, "`image` is no image in base64", ValueError):
        content = base64.b64decode(packed, validate=True)
    if not content:
        raise DataError("`image` is empty")
    path = folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.jpg"
    if not path.exists():
        with (
            raised_as(DataError, f"{path} cannot be written", OSError),
            replaces(path) as temporary,
        ):
            temporary.write_bytes(content)
    return path


def _each(
    name: str, rows: Iterable[tuple[Any, Any]], question: Callable[[str, dict[str, Any]], Question]
) -> Asked:
    for number, raw in rows:
        sample_id = f"{name}[{number}]"
        try:
            if isinstance(raw, DataError):  # a line that does not parse
                raise raw
            yield question(sample_id, as_object(raw))
        except DataError as error:
            yield BadSample(sample_id, str(error))


def _json(path: Path) -> dict[str, Any]:
    with raised_as(DataError, f"{path} is not valid JSON", *NOT_JSON):
        data = json.loads(read_text(path))
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold an object, as the benchmark's file, not a list")
    return data


def _rows(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"must hold a list, as the benchmark's file, not {value!r:.60}")
    return value


def _text(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"`{key}` must be a text, not {value!r:.60}")
    return value.strip()


def _name(raw: dict[str, Any], key: str) -> str:
    """A number or a file's name."""
    value = raw.get(key)
    if not isinstance(value, str | int) or str(value) in ("", ".", "..") or "/" in str(value):
        raise DataError(f"`{key}` must be the name of an image, not {value!r:.60}")
    return str(value)


def _commonest(answers: Sequence[str]) -> str:
    if not (given := [answer for answer in answers if answer.strip()]):
        raise DataError("has no answers (a test split's are not published), and cannot be scored")
    return Counter(given).most_common(1)[0][0]


_BENCHMARKS = {
    "gqa": Benchmark(_gqa, "gqa"),
    "vqav2": Benchmark(_vqav2, "vqa"),
    "textvqa": Benchmark(_textvqa, "textvqa"),
    "pope": Benchmark(_pope, "pope"),
    "mme": Benchmark(_mme, "mme", "{question}", in_folders=True),
    "mmbench": Benchmark(_mmbench, "mmbench", _LETTER),
}
