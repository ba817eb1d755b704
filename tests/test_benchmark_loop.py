"""The training loop's benchmark, run end to end in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO


def test_tiny_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks.loop import main

    report = tmp_path / "numbers.json"
    setting = ["--steps", "2", "--repeats", "1", "--batch-size", "1", "--workers", "0"]
    main([*setting, "--json", str(report)])
    numbers = json.loads(report.read_text(encoding="utf-8"))
    assert numbers["share_0"] == numbers["loop_0_cpu_s"] / numbers["step_0_cpu_s"]
    assert min(numbers[f"{name}_s"] for name in ("memory", "loop_0", "step_0")) > 0
    assert "num_workers 0" in capsys.readouterr().out
