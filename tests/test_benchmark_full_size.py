"""The full-size benchmark, run end to end at its tiny shape."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("dashscope")  # has the vocabulary


@pytest.fixture(autouse=True)
def _from_the_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the measuring process


def test_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.full_size import main

    weights, report = tmp_path / "weights", tmp_path / "numbers.json"
    assert main(["--shape", "tiny", "--dir", str(weights), "--json", str(report)]) == 0
    numbers = json.loads(report.read_text(encoding="utf-8"))
    assert 1e7 < numbers["model_bytes"] < 1e8
    assert 130 < numbers["tokens"] < 170
    assert 11 < numbers["first_loss"] < 13  # random: about log(151936) = 11.9
    assert numbers["load_anonymous_bytes"] <= numbers["load_peak_bytes"]
    assert min(v for k, v in numbers.items() if k.endswith(("_s", "_bytes"))) > 0
    assert "training speed" in capsys.readouterr().out
    assert not list(weights.rglob("*.*"))  # what it wrote is gone


def test_other_weights_are_left_alone(tmp_path: Path) -> None:
    from benchmarks.full_size import main
    from lavis.common.errors import LavisError

    theirs = tmp_path / "ckpt" / "eva" / "eva_vit_g.pth"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"real")
    with pytest.raises(LavisError, match="did not write"):
        main(["--shape", "tiny", "--dir", str(tmp_path)])
    assert theirs.read_bytes() == b"real"


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.full_size import main
    from lavis.common.errors import LavisError

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**7))
    with pytest.raises(LavisError, match=r"0\.01 GB free"):
        main(["--shape", "tiny", "--dir", str(tmp_path / "weights")])
