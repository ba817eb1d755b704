"""The training step's benchmark, run end to end at its tiny shape, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO

pytest.importorskip("dashscope")  # has the vocabulary
pytest.importorskip("lavis.models.compute.schedule")


def test_tiny_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks import train_step

    monkeypatch.setattr(train_step, "in_child", lambda task, *args: task(*args))
    report, picture = tmp_path / "numbers.json", tmp_path / "rungs.png"
    setting = ["--shape", "tiny", "--samples", "3", "--repeats", "1", "--budget", "300"]
    assert train_step.main([*setting, "--json", str(report), "--picture", str(picture)]) == 0
    numbers = json.loads(report.read_text(encoding="utf-8"))
    rungs = {rung["name"]: rung for rung in numbers["rungs"]}
    assert list(rungs) == [name for name in train_step.RUNGS if name != "compile"]
    assert 11 < rungs["reference"]["loss"] < 13  # random: about log(151936) = 11.9
    assert max(rung["loss_difference"] for rung in rungs.values()) < 1e-5
    assert max(rung["gradient_difference"] for rung in rungs.values()) < 1e-5
    assert rungs["head"]["micro_batches"] == 3
    assert rungs["features"]["micro_batches"] == 2 - (sum(numbers["tokens"]) <= 300)
    done = [rung["flops_over_useful"] for rung in rungs.values() if rung["name"] != "packing"]
    assert done == sorted(done, reverse=True)  # every saving saves
    assert 1 < done[-1] < 1.1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "+ features once" in capsys.readouterr().out
