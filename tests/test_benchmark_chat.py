"""The chat benchmark, run end to end at its tiny shape, in this process."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import REPO

pytest.importorskip("dashscope")  # has the vocabulary


def test_tiny_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks import chat

    monkeypatch.setattr(chat, "in_child", lambda task, *args: task(*args))
    report, picture = tmp_path / "numbers.json", tmp_path / "turns.png"
    setting = ["--shape", "tiny", "--turns", "4", "--repeats", "1", "--conversations", "6"]
    assert chat.main([*setting, "--json", str(report), "--picture", str(picture)]) == 0
    numbers = json.loads(report.read_text(encoding="utf-8"))
    assert numbers["same_first_token"] == numbers["compared"] == 3  # turns 1, 2, 4
    engine = numbers["engine"]
    assert [e["turn"] for e in engine] == [1, 2, 3, 4]
    assert engine[0]["computed"] == engine[0]["prompt"]
    for before, after in pairwise(engine):
        assert after["prompt"] - after["computed"] == before["prompt"] + before["answer"]
    assert numbers["anew_over_engine"] > 1
    assert numbers["sequence"]["few"] == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "x less than anew" in capsys.readouterr().out
