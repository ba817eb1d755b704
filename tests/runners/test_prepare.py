"""What is pointed out before a run, and that a plan is made without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.common.config import load_config
from lavis.common.registry import TASKS
from lavis.models.build import MiniGPT4Qwen
from lavis.runners.prepare import RunPlan, without_effect
from tests.conftest import DEMO, FIXTURES, REPO


def notes(*options: str, answers: bool = True, cfg: Path = DEMO / "train.yaml") -> list[str]:
    return list(without_effect(load_config(cfg, options), answers=answers))


def test_a_run_without_idle_settings() -> None:
    assert notes() == []
    assert notes("run.num_beams=1", "run.min_new_tokens=1", "run.min_len=0") == []


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["run.num_beams=5"], ["run.num_beams: no effect, since answers are greedy"]),
        (
            ["run.min_len=8", "run.num_beams=2", "run.min_new_tokens=1"],
            ["run.num_beams, run.min_len: no effect, since answers are greedy"],
        ),
        (
            ["run.max_len=30", "run.max_new_tokens=20"],
            ["run.max_len: no effect beside run.max_new_tokens (20)"],
        ),
        (["run.max_len=30"], []),
    ],
)
def test_settings_of_answers(options: list[str], wanted: list[str]) -> None:
    assert notes(*options) == wanted
    assert notes(*options, answers=False) == []


def test_the_originals_file() -> None:
    path = FIXTURES / "upstream_train.yaml"
    assert notes(answers=False, cfg=path) == []
    assert notes(cfg=path) == [
        "run.num_beams, run.min_len: no effect, since answers are greedy",
        "run.max_len: no effect beside run.max_new_tokens (100)",
    ]


def test_layer_decay_of_a_frozen_vit() -> None:
    decay = "run.lr_layer_decay=0.9"
    assert notes(decay) == ["run.lr_layer_decay: no effect, since the ViT is frozen"]
    for trained in ("model.freeze_vit=false", "model.unfreeze_pos_embed=true"):
        assert notes(decay, trained, "model.vit_precision=fp32") == []


def test_a_plan_needs_no_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(MiniGPT4Qwen, "from_config", refuse)
    options = ("run.max_epoch=1", "run.lr_sched=linear_warmup_cosine_lr", "run.warmup_lr=0")
    config = load_config(
        DEMO / "train.yaml",
        [f"env.cache_root={REPO}", "run.warmup_ratio=null", "run.warmup_steps=500", *options],
    )
    task = TASKS.get(config.run.task)(config)
    plan = RunPlan.of(config, task.build_datasets(), torch.device("cpu"))
    assert (plan.step, plan.before, plan.batches.steps_per_epoch) == (0, None, 3)
    assert plan.schedule.lr(0) == 0
    warned = [m for m in caplog.messages if m.startswith("run.")]
    assert [m.partition(":")[0] for m in warned] == ["run.warmup_steps", "run.lr_sched"]
    assert warned[0].endswith("init_lr is not reached. Set run.warmup_steps to at most 3")
