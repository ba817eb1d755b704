"""evaluate.py from the configuration to the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lavis.common.config import load_config
from lavis.common.errors import ConfigError
from lavis.tasks.evaluate import evaluate
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from tests.conftest import TOY, TOY_YAML


def _task(tmp_path: Path) -> ImageTextPretrainTask:
    records = []
    for i, (kind, language) in enumerate([("colour", "en"), ("colour", "zh"), ("shape", "en")]):
        Image.new("RGB", (60, 60), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        records.append(
            {
                "image": f"{i}.png",
                "instruction": "<Img><ImageHere></Img> $What?",
                "output": "Red.",
                "kind": kind,
                "language": language,
            }
        )
    (tmp_path / "test.json").write_text(json.dumps(records), encoding="utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""{TOY_YAML}
datasets:
  mine:
    builder: instruction
    build_info:
      annotations: {{test: {{storage: {tmp_path / "test.json"}}}}}
      images: {{storage: {tmp_path}}}
run: {{device: cpu, batch_size_eval: 2, max_new_tokens: 4}}
""",
        encoding="utf-8",
    )
    return ImageTextPretrainTask(load_config(path))


def test_writes_answers_scores_and_a_picture(tmp_path: Path) -> None:
    task = _task(tmp_path)
    task.check_paths(("test",))
    out = tmp_path / "out"
    text = evaluate(
        task,
        checkpoint=str(TOY / "checkpoint_9.pth"),
        splits=["test"],
        limit=None,
        baselines=True,
        out=out,
        device=torch.device("cpu"),
    )
    assert "test, blind" in text
    assert "test, untrained" in text
    answers = json.loads((out / "test.json").read_text(encoding="utf-8"))
    assert [a["question"] for a in answers] == ["$What?"] * 3
    assert {a["truth"] for a in answers} == {"Red."}
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"test", "test, blind", "test, untrained"}
    assert scores["test"]["count"] == 3
    assert set(scores["test"]["kinds"]) == {"colour", "shape"}
    with Image.open(out / "test.png") as picture:
        assert picture.width > 500
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colours is not None
        assert {(0, 0, 0), (80, 0, 0), (160, 0, 0)} <= {colour for _, colour in colours}


def test_an_unknown_split_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'tst'; did you mean 'test'"):
        _task(tmp_path).check_paths(("tst",))
