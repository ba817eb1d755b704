"""The benchmark of a second language model, run end to end on few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.test_parts import save_language


def test_few_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks import second_model

    report, language = tmp_path / "numbers.json", save_language(tmp_path / "llm", "llama", "llama3")
    setting = ["--language", str(language), "--pictures", "4", "--batch-size", "2"]
    assert second_model.main([*setting, "--json", str(report)]) == 0
    numbers = json.loads(report.read_text(encoding="utf-8"))
    assert list(numbers) == [second_model.FILLED, second_model.KEPT, second_model.NO_CACHE]
    assert all(0 < n["begin_cpu_s"] < n["end_cpu_s"] for n in numbers.values())
    assert all(0 < n["begin_s"] < n["end_s"] for n in numbers.values())
    assert "first step begins" in capsys.readouterr().out
