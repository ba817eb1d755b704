"""The benchmark of several conversations, at its tiny shape, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("dashscope")  # has the vocabulary


def test_tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import visitors

    monkeypatch.setattr(visitors, "in_child", lambda task, *args: task(*args))
    report = tmp_path / "numbers.json"
    setting = ["--shape", "tiny", "--repeats", "1", "--visitors", "3", "--new-tokens", "5"]
    assert visitors.main([*setting, "--json", str(report)]) == 0
    (numbers,) = json.loads(report.read_text(encoding="utf-8"))
    assert numbers["conversations"] == 3
    assert numbers["same_tokens"] is True
    assert min(numbers["tokens_per_s"].values()) > 0
