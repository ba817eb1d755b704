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
    setting = ["--shape", "tiny", "--turns", "3", "--repeats", "1", "--conversations", "6"]
    assert chat.main([*setting, "--json", str(report), "--picture", str(picture)]) == 0
    numbers = json.loads(report.read_text(encoding="utf-8"))
    assert numbers["same_first_token"] == numbers["compared"] == 3  # turns 1, 2, 3
    engine = numbers["engine"]
    assert [e["turn"] for e in engine] == [1, 2, 3]
    assert engine[0]["computed"] == engine[0]["prompt"]
    for before, after in pairwise(engine):
        assert after["prompt"] - after["computed"] == before["prompt"] + before["answer"]
    assert all(e["first_s"] > 0 and e["tokens_per_s"] > 0 for e in engine)
    anew = {a["turn"]: a for a in numbers["anew"]}
    assert list(anew) == [1, 2, 3]
    assert anew[1]["tokens_per_s"] > 0
    assert anew[3]["tokens_per_s"] > 0
    assert numbers["last_over_second"] == engine[2]["first_s"] / engine[1]["first_s"]
    assert numbers["anew_over_engine"] == anew[3]["first_s"] / engine[2]["first_s"]
    assert numbers["prefill_share_of_peak"] > 0
    assert numbers["memory_bytes"].keys() == {"engine", "anew"}
    sequence = numbers["sequence"]
    assert (sequence["few"], sequence["conversations"]) == (5, 6)
    assert sequence["peak_bytes"] >= sequence["all_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "target: 8 at least" in capsys.readouterr().out
