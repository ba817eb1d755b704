"""Validation of data that cannot all be read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.common.errors import DataError
from tests.conftest import DEMO
from tests.runners.test_runner import SHORT, prepare
from tests.runners.test_settings import validate

KEY = "datasets.demo.build_info"


def _runner(tmp_path: Path, *broken: int, **options: str) -> Any:
    """Four records to validate on, of which some have a broken picture."""
    shutil.copytree(DEMO / "image", tmp_path / "image")
    records = json.loads((DEMO / "annotations.json").read_text(encoding="utf-8"))[:4]
    for i in broken:
        records[i]["image"] = f"broken{i}.png"
        (tmp_path / "image" / f"broken{i}.png").write_bytes(b"<html>")
    (tmp_path / "valid.json").write_text(json.dumps(records), encoding="utf-8")
    return prepare(
        tmp_path, *SHORT, "run.max_epoch=1", "run.valid_splits=[valid]", "run.batch_size_eval=2",
        f"{KEY}.annotations.valid.storage={tmp_path / 'valid.json'}",
        f"{KEY}.images.storage={tmp_path / 'image'}",
        *(f"run.{key}={value}" for key, value in options.items()),
    )  # fmt: skip


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_sample_stops_it_by_name(tmp_path: Path, workers: str) -> None:
    """The epoch is saved, but no loss of the rest is."""
    runner = _runner(tmp_path, 3, num_workers=workers)
    with pytest.raises(DataError, match=r"^valid.json\[3\].*broken3.png is not an image .*skip"):
        runner.train()
    saved = torch.load(runner.folder / "checkpoint_latest.pth", weights_only=True)
    assert saved["progress"]["step"] == saved["progress"]["steps_per_epoch"]
    assert saved["metrics"] == {}
    assert not (runner.folder / "checkpoint_best.pth").exists()


def test_bad_samples_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = _runner(tmp_path, 0, 1, on_bad_sample="skip")  # a batch of nothing is among them
    metrics = validate(runner)
    logged = [m.partition(" (")[0] for m in caplog.messages if m.startswith("skipped")]
    assert logged == ["skipped valid.json[0]", "skipped valid.json[1]"]
    whole = _runner(tmp_path / "whole")
    parts: Any = whole.dataset.evaluated["valid"]
    parts[0] = dataclasses.replace(parts[0], records=parts[0].records[2:])
    expected = validate(whole)
    assert set(expected) == {"valid_loss"}
    assert metrics == {"valid_loss": pytest.approx(expected["valid_loss"]), "valid_skipped": 2.0}
    runner.train()
    lines = [json.loads(line) for line in (runner.folder / "log.txt").read_text().splitlines()]
    assert [line["valid_skipped"] for line in lines if "valid_loss" in line] == [2.0]


def test_the_loss_of_nothing_is_an_error(tmp_path: Path) -> None:
    runner = _runner(tmp_path, 0, 1, 2, 3, on_bad_sample="skip")
    with pytest.raises(DataError, match=r"run.valid_splits \(valid\): .* 4 samples could not be"):
        validate(runner)
