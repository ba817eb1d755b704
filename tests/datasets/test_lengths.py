"""Token counts: right, kept, and counted anew when anything that they depend on changes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis.common.registry import PROCESSORS
from lavis.common.schema import (
    AnnotationConfig,
    BuildInfo,
    DatasetConfig,
    ImagesConfig,
    PreprocessConfig,
    ProcessorConfig,
    SplitProcessors,
)
from lavis.datasets import lengths
from lavis.datasets.builders import InstructionBuilder
from lavis.datasets.instruction import InstructionDataset
from lavis.processors.config import BaseTextConfig, ImageEvalConfig
from lavis.processors.conversation import ConversationEncoder
from lavis.processors.tokenizer import QwenTokenizer

ASK = "<Img><ImageHere></Img> a"
Encode = Callable[[InstructionDataset, Any], Any]


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where counts are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lavis" / "lengths"


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    for i in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    write(tmp_path, *({"image": f"{i}.png", "instruction": ASK, "output": "b" * 9 * (i + 1)}
                      for i in range(3)))  # fmt: skip
    return tmp_path


@pytest.fixture()
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records that have been encoded."""
    seen: list[str] = []
    original: Encode = InstructionDataset.encode

    def encode(self: InstructionDataset, record: Any) -> Any:
        seen.append(record.sample_id)
        return original(self, record)

    monkeypatch.setattr(InstructionDataset, "encode", encode)
    return seen


def write(root: Path, *records: dict[str, Any]) -> None:
    (root / "ann.json").write_text(json.dumps(records), encoding="utf-8")


def build(
    root: Path, tokenizer: Any, max_txt_len: int = 64, on_bad: str = "error", **block: Any
) -> InstructionDataset:
    builder = InstructionBuilder(
        "demo",
        DatasetConfig(
            BuildInfo({"train": AnnotationConfig("ann.json")}, ImagesConfig(".")), **block
        ),
        PreprocessConfig(SplitProcessors(train=ImageEvalConfig("blip_image_eval", 14))),
        str(root),
    )
    encoder = ConversationEncoder(tokenizer, num_query_token=2, max_txt_len=max_txt_len)
    return builder.build("train", encoder, train=True, seed=3, on_bad=on_bad)


def test_lengths_are_those_of_the_samples(root: Path, cache: Path, tokenizer: Any) -> None:
    for _ in range(2):  # counted, then read
        dataset = build(root, tokenizer)
        assert dataset.lengths == tuple(len(dataset[0, i].input_ids) for i in range(3))  # type: ignore[union-attr]
        assert len(set(dataset.lengths)) > 1


def test_the_second_run_reads_them(
    root: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(root, tokenizer).lengths
    assert len(list(cache.iterdir())) == 1

    def encode(self: Any, record: Any) -> Any:
        raise AssertionError("counted again")

    monkeypatch.setattr(InstructionDataset, "encode", encode)
    assert build(root, tokenizer).lengths == first


def test_reasons_are_kept_too(
    root: Path, cache: Path, tokenizer: Any, encoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(root, {"instruction": "a", "output": "b"}, {"instruction": "a " * 99, "output": "b"})
    kept = [build(root, tokenizer, on_bad="skip").records for _ in range(2)]
    assert [[r.sample_id for r in records] for records in kept] == [["ann.json[0]"]] * 2
    skipped = [m for m in caplog.messages if "skipped 1:\n  ann.json[1]: no answer to " in m]
    assert len(skipped) == 2
    assert skipped[0] == skipped[1]
    assert len(encoded) == 2


@pytest.mark.parametrize("change", ["annotations", "vocabulary", "max_txt_len", "text processor"])
def test_what_they_depend_on_is_counted_anew(
    root: Path, cache: Path, tokenizer: Any, encoded: list[str], change: str
) -> None:
    build(root, tokenizer)
    encoded.clear()
    settings: dict[str, Any] = {}
    if change == "annotations":
        write(root, *({"instruction": "a", "output": "b" * i} for i in (30, 3, 9)))
    elif change == "vocabulary":
        smaller = root / "qwen.tiktoken"
        smaller.write_bytes(b"".join(tokenizer.path.read_bytes().splitlines(True)[:300]))
        tokenizer = QwenTokenizer(smaller)
    elif change == "max_txt_len":
        settings["max_txt_len"] = 50
    else:
        text = BaseTextConfig("base_text", max_words=1)
        settings["text_processor"] = SplitProcessors(train=text)
        write(root, {"instruction": "a", "output": "b"})
        build(root, tokenizer)
        encoded.clear()
    dataset = build(root, tokenizer, **settings)
    assert encoded
    assert dataset.lengths == tuple(len(dataset.encode(r).input_ids) for r in dataset.records)


def test_an_image_that_is_missing_once_does_not_move_lengths_to_other_records(
    root: Path, cache: Path, tokenizer: Any
) -> None:
    picture = (root / "0.png").read_bytes()
    for missing, kept in (("0", [1, 2]), ("2", [0, 1])):
        for i in range(3):
            (root / f"{i}.png").write_bytes(picture)
        (root / f"{missing}.png").unlink()
        dataset = build(root, tokenizer, on_bad="skip")
        assert [r.sample_id for r in dataset.records] == [f"ann.json[{i}]" for i in kept]
        assert dataset.lengths == tuple(len(dataset.encode(r).input_ids) for r in dataset.records)


@pytest.mark.parametrize(
    "content", [b"", b"[21, 2", b"[21]", b'{"a": 1}', b"[1.5, 2, 3]", b"\xff\xfe", b"null"]
)
def test_a_damaged_file_is_counted_anew(
    root: Path, cache: Path, tokenizer: Any, encoded: list[str], content: bytes
) -> None:
    first = build(root, tokenizer).lengths
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    encoded.clear()
    assert build(root, tokenizer).lengths == first
    assert len(encoded) == 3
    assert file.read_bytes() == whole  # mended
    assert list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_logged(
    root: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))
    with caplog.at_level(logging.INFO):
        assert len(build(root, tokenizer).lengths) == 3
    (message,) = caplog.messages
    assert message.startswith("token counts are not kept for the next run: ")


def test_several_processes_count_the_same(
    root: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"instruction": "a", "output": "b c " * (i % 40)} for i in range(600)]
    write(root, *records)
    alone = build(root, tokenizer, on_bad="skip")
    for file in cache.iterdir():
        file.unlink()
    here: list[int] = []
    original: Encode = InstructionDataset.encode

    def encode(self: Any, record: Any) -> Any:
        here.append(os.getpid())  # in this process, or in a copy that is forgotten
        return original(self, record)

    monkeypatch.setattr(lengths, "_PARALLEL_FROM", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(InstructionDataset, "encode", encode)
    shared = build(root, tokenizer, on_bad="skip")
    assert not here
    assert shared.lengths == alone.lengths
    assert [r.sample_id for r in shared.records] == [r.sample_id for r in alone.records]
    assert 0 < len(shared) < 600  # some have an empty answer


class Shout:
    """A third party's text processor."""

    def __init__(self, config: ProcessorConfig) -> None:
        self.config = config

    def __call__(self, text: str) -> str:
        return text + "!"


def test_a_third_partys_text_processor_is_not_trusted_to_stay_the_same(
    root: Path, cache: Path, tokenizer: Any, encoded: list[str]
) -> None:
    if "test_shout" not in PROCESSORS:
        PROCESSORS.register("test_shout", config=ProcessorConfig)(Shout)
    text = SplitProcessors(train=ProcessorConfig("test_shout"))
    for _ in range(2):
        dataset = build(root, tokenizer, text_processor=text)
        assert dataset.lengths == tuple(len(dataset[0, i].input_ids) for i in range(3))  # type: ignore[union-attr]
    assert len(encoded) == 2 * (3 + 3)
    assert not cache.exists()
