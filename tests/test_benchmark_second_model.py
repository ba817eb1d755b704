"""The benchmark of a second language model, run end to end on few pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lavis.common.config import load_config
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from tests.conftest import REPO
from tests.test_parts import save_language


def test_few_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks import second_model

    # in this process, which imports the libraries once; what the runs change is put back
    configs: list[Any] = []

    def here(task: Any, options: list[str], started: float) -> Any:
        configs.append(load_config(second_model.PROJECT, options))
        return task(options, started)

    monkeypatch.setattr(second_model, "in_child", here)
    monkeypatch.setattr(ImageTextPretrainTask, "train_step", ImageTextPretrainTask.train_step)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(REPO)
    report, language = tmp_path / "numbers.json", save_language(tmp_path / "llm", "llama", "llama3")
    setting = ["--language", str(language), "--pictures", "4", "--batch-size", "2"]
    assert second_model.main([*setting, "--json", str(report)]) == 0
    languages = [(c.model.language.name, c.run.feature_cache.enabled) for c in configs]
    assert languages == [("qwen1", True), ("hf", True), ("hf", True), ("hf", False)]
    first, second, empty = (c.run.feature_cache.dir for c in configs[:3])
    assert first == second != empty
    numbers = json.loads(report.read_text(encoding="utf-8"))
    assert len(numbers) == len(configs)
    assert all(0 < n["begin_cpu_s"] < n["end_cpu_s"] for n in numbers.values())
    assert all(0 < n["begin_s"] < n["end_s"] for n in numbers.values())
    assert "first step begins" in capsys.readouterr().out
