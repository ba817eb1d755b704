"""The toybox that ships: complete, small, and good enough that broken training shows."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cli_demo
import test_model_chat
from examples.toybox.world.__main__ import write_split
from lavis.common.config import load_config
from lavis.common.registry import RUNNERS, TASKS
from lavis.datasets.instruction import ConcatDataset
from lavis.tasks.scoring import predict, score
from tests.conftest import REPO

ASSETS = REPO / "examples" / "toybox"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New pictures: no seed of the shipped weights drew them."""
    out = tmp_path_factory.mktemp("world")
    for split, count in (("train", 1200), ("test", 144)):
        write_split(out, split, count, seed=5)
    return out


def prepare(world: Path, output: Path, *options: str, limit: int | None = None) -> tuple[Any, Any]:
    """The project's own run, on other pictures. Returns its runner and its test questions."""
    annotations = "datasets.toybox.build_info.annotations"
    config = load_config(
        REPO / "lavis" / "projects" / "toybox" / "train.yaml",
        [
            f"env.cache_root={REPO}",
            f"{annotations}.train.storage={world / 'train.json'}",
            f"{annotations}.test.storage={world / 'test.json'}",
            f"datasets.toybox.build_info.images.storage={world / 'image'}",
            f"run.output_dir={output}",
            "run.num_workers=0",
            *options,
        ],
    )
    task = TASKS.get(config.run.task)(config)
    dataset = task.build_datasets()
    (part,) = dataset.datasets
    dataset = ConcatDataset([dataclasses.replace(part, records=part.records[:limit])])
    torch.manual_seed(config.run.seed)
    model = task.build_model(torch.device("cpu"))
    runner = RUNNERS.get(config.run.runner)(config, task, model, dataset, "job")
    return runner, task.build_split("test", train=False)[0]


def exact(runner: Any, questions: Any) -> float:
    """Percent of questions answered exactly."""
    answers = predict(runner.model.eval(), questions, batch_size=48, max_new_tokens=12)
    return float(score([a for a in answers if a.kind != "description"])["overall"])


def test_a_projection_learns_to_join_strangers(world: Path, tmp_path: Path) -> None:
    """The thesis of the project in seconds: falls if gradients, labels or images go astray."""
    runner, questions = prepare(world, tmp_path)
    before = exact(runner, questions)
    runner.train()
    after = exact(runner, questions)
    assert before < 30
    assert after > 70


def test_two_runs_are_one(world: Path, tmp_path: Path) -> None:
    """Bit for bit, given a seed."""
    states = []
    for name in ("one", "other"):
        torch.rand(7)  # whatever was drawn before
        runner, _ = prepare(world, tmp_path / name, "run.warmup_steps=2", limit=96)
        states.append(torch.load(runner.train(), weights_only=True)["model"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_assets_are_complete_and_small() -> None:
    files = [p for p in ASSETS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12 * MEGABYTE
    for name in ("eva_vit_g.pth", "blip2.pth"):
        content = torch.load(ASSETS / name, weights_only=True)
        content = content.get("model", content)
        assert {t.dtype for t in content.values()} == {torch.float16}
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    scores = json.loads((ASSETS / "scores.json").read_text(encoding="utf-8"))
    assert f"{scores['test']['overall']:.1f}" in card


def test_the_commands_answer_without_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # from anywhere
    monkeypatch.setattr("sys.argv", ["test_model_chat.py", "--device", "cpu"])
    assert test_model_chat.main() == 0
    out, err = capsys.readouterr()
    assert "Answering with the toybox" in err and "--checkpoint" in err
    assert out.count("Assistant: ") == 2
    monkeypatch.setattr("sys.argv", ["cli_demo.py", "--device", "cpu"])
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("图里有几个物体？\n:his\n:img nowhere.png\n:exit\n")
    )
    assert cli_demo.main() == 1  # one line failed
    out, err = capsys.readouterr()
    assert "Answering with the toybox" in err and "nowhere.png" in err
    assert out.count("Assistant: ") == 2  # the answer, and in the history
