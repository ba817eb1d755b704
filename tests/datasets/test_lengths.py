"""Token counts: right, whatever counts them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis.common.schema import (
    AnnotationConfig,
    BuildInfo,
    DatasetConfig,
    ImagesConfig,
    PreprocessConfig,
    SplitProcessors,
)
from lavis.datasets import lengths
from lavis.datasets.builders import InstructionBuilder
from lavis.datasets.instruction import InstructionDataset
from lavis.processors.config import ImageEvalConfig
from lavis.processors.conversation import ChatML, ConversationEncoder

ASK = "<Img><ImageHere></Img> a"
Encode = Callable[[InstructionDataset, Any], Any]


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    for i in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    write(tmp_path, *({"image": f"{i}.png", "instruction": ASK, "output": "b" * 9 * (i + 1)}
                      for i in range(3)))  # fmt: skip
    return tmp_path


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
    encoder = ConversationEncoder(
        tokenizer, ChatML(tokenizer), num_query_token=2, max_txt_len=max_txt_len
    )
    return builder.build("train", encoder, train=True, seed=3, on_bad=on_bad)


def test_lengths_are_those_of_the_samples(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer)
    assert dataset.lengths == tuple(len(dataset[0, i].input_ids) for i in range(3))  # type: ignore[union-attr]
    assert len(set(dataset.lengths)) > 1


def test_an_image_that_is_missing_once_does_not_move_lengths_to_other_records(
    root: Path, tokenizer: Any
) -> None:
    picture = (root / "0.png").read_bytes()
    for missing, kept in (("0", [1, 2]), ("2", [0, 1])):
        for i in range(3):
            (root / f"{i}.png").write_bytes(picture)
        (root / f"{missing}.png").unlink()
        dataset = build(root, tokenizer, on_bad="skip")
        assert [r.sample_id for r in dataset.records] == [f"ann.json[{i}]" for i in kept]
        assert dataset.lengths == tuple(len(dataset.encode(r).input_ids) for r in dataset.records)


def test_several_processes_count_the_same(
    root: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"instruction": "a", "output": "b c " * (i % 40)} for i in range(600)]
    write(root, *records)
    alone = build(root, tokenizer, on_bad="skip")
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
