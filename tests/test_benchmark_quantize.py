"""The benchmark of packed weights, run end to end on a small model, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.models.test_families import stock

pytest.importorskip("bitsandbytes")


def test_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks import quantize

    monkeypatch.setattr(quantize, "in_child", lambda task, *args: task(*args))
    stock("llama").save_pretrained(tmp_path / "llama")
    setting = ["--language", str(tmp_path / "llama"), "--repeats", "1"]
    assert quantize.main([*setting, "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert list(numbers) == ["fp32", "bf16", "int8", "nf4"]
    weights = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32)  # of two layers
    norms = 2 * 2 * 2 * 32
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    layers = {k: n["layer_bytes"] for k, n in numbers.items()}
    assert layers == {
        "fp32": 2 * (2 * weights + norms),
        "bf16": 2 * weights + norms,
        "int8": weights + 4 * rows + norms,
        "nf4": weights * 4.5 / 8 + norms,
    }
    cosines = [n["cosine"] for n in numbers.values()]
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[1] > 0.99
    assert cosines[2] > 0.95
    assert cosines[3] > 0.5
    assert "nf4" in capsys.readouterr().out
