"""Schedules at points computed by hand, and who gets weight decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lavis.common.errors import ConfigError
from lavis.common.optim import build_schedule, parameter_groups
from lavis.common.schema import RunConfig
from lavis.models.vision.tower import layers_above

RUN: dict[str, Any] = {
    "init_lr": 1.0,
    "min_lr": 0.1,
    "warmup_lr": 0.2,
    "warmup_steps": 4,
    "lr_decay_rate": 0.5,
    "max_epoch": 5,
}
COS_36, COS_72 = (1 + math.sqrt(5)) / 4, (math.sqrt(5) - 1) / 4


def rates(name: str, steps: list[int], **changes: Any) -> list[float]:
    schedule = build_schedule(RunConfig(lr_sched=name, **(RUN | changes)), steps_per_epoch=10)
    return [schedule.lr(step) for step in steps]


@pytest.mark.parametrize(
    "name", ["constant_lr", "linear_warmup_step_lr", "linear_warmup_cosine_lr"]
)
def test_warm_up_inside_epoch_0(name: str) -> None:
    assert rates(name, [0, 1, 2, 3, 4, 9]) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    # 20 steps of warm-up end with epoch 0, at 0.2 + 0.8 * 9 / 20
    assert rates(name, [5, 9], warmup_steps=20) == pytest.approx([0.4, 0.56])


def test_constant() -> None:
    assert rates("constant_lr", [5, 10, 49], warmup_steps=20) == pytest.approx([0.4, 1.0, 1.0])


def test_step() -> None:
    wanted = [1.0, 0.5, 0.5, 0.25, 0.125, 0.1, 0.1]  # 0.0625 is below min_lr
    assert rates("linear_warmup_step_lr", [9, 10, 19, 20, 30, 40, 49]) == pytest.approx(wanted)


def test_cosine_by_epoch() -> None:
    # 0.1 + 0.9 * (1 + cos(epoch / 5 * pi)) / 2
    epochs = [0.1 + 0.45 * (1 + c) for c in (1.0, COS_36, COS_72, -COS_72, -COS_36)]
    got = rates("linear_warmup_cosine_lr", [9, 10, 19, 20, 30, 40, 49])
    wanted = [epochs[0], epochs[1], epochs[1], *epochs[2:4], epochs[4], epochs[4]]
    assert got == pytest.approx(wanted)


def test_cosine_by_step() -> None:
    name = "linear_warmup_cosine_lr_step-wise"
    assert rates(name, [0, 2, 4]) == pytest.approx([0.2, 0.6, 1.0])
    # a half and three quarters of the 46 steps after the warm-up
    assert rates(name, [27, 50]) == pytest.approx([0.55, 0.1])
    # warm-up reaches into epoch 1; then 20 and 10 of 30 steps of a cosine
    assert rates(name, [12, 20], warmup_steps=20) == pytest.approx([0.68, 1.0])
    assert rates(name, [30, 40], warmup_steps=20) == pytest.approx([0.775, 0.325])


def test_warm_up_by_ratio_and_from_init_lr() -> None:
    name = "linear_warmup_cosine_lr_step-wise"
    assert rates(name, [5, 10], warmup_ratio=0.2) == pytest.approx([0.6, 1.0])
    assert rates(name, [0, 3], warmup_lr=-1.0) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    "name",
    [
        "constant_lr",
        "linear_warmup_step_lr",
        "linear_warmup_cosine_lr",
        "linear_warmup_cosine_lr_step-wise",
    ],
)
@pytest.mark.parametrize("none", [{"warmup_steps": 0}, {"warmup_ratio": 0.0}])
def test_no_warm_up_starts_at_init_lr(name: str, none: dict[str, Any]) -> None:
    assert rates(name, [0], warmup_lr=0.0, max_epoch=1, **none) == [1.0]


def notes(name: str, **changes: Any) -> list[str]:
    run = RunConfig(lr_sched=name, **(RUN | changes))
    return list(build_schedule(run, 10).notes())


STEPWISE = "linear_warmup_cosine_lr_step-wise"
EPOCHWISE = "linear_warmup_cosine_lr"
FIRST = f"but an epoch has 10 steps and {EPOCHWISE} warms up in the first one only: "


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        (STEPWISE, {"lr_decay_rate": 1}, []),
        (EPOCHWISE, {"lr_decay_rate": 1}, []),
        ("linear_warmup_step_lr", {}, []),
        ("constant_lr", {"lr_decay_rate": 1, "min_lr": 0}, []),
        (STEPWISE, {}, [f"run.lr_decay_rate has no effect with run.lr_sched: {STEPWISE}"]),
        (
            "constant_lr",
            {"lr_decay_rate": 1},
            ["run.min_lr has no effect with run.lr_sched: constant_lr"],
        ),
        (
            "linear_warmup_step_lr",
            {"lr_decay_rate": 1},
            ["run.lr_sched: linear_warmup_step_lr stays at init_lr with run.lr_decay_rate: 1"],
        ),
        (
            EPOCHWISE,
            {"lr_decay_rate": 1, "max_epoch": 1},
            [
                f"run.lr_sched: {EPOCHWISE} decays from epoch to epoch, so a run of one epoch "
                f"keeps init_lr; {STEPWISE} decays by step"
            ],
        ),
        (
            EPOCHWISE,
            {"lr_decay_rate": 1, "warmup_lr": -1},
            [
                "run.warmup_steps: 4 steps warm nothing up, since run.warmup_lr (-1) starts at "
                "init_lr; set run.warmup_lr: 0"
            ],
        ),
        (STEPWISE, {"lr_decay_rate": 1, "warmup_lr": -1, "warmup_steps": 0}, []),
        (
            EPOCHWISE,
            {"lr_decay_rate": 1, "warmup_steps": 20},
            [
                f"run.warmup_steps: 20, {FIRST}the rate jumps at its end. Set run.warmup_steps to "
                f"at most 10, or run.lr_sched: {STEPWISE}"
            ],
        ),
        (  # the step-wise schedule would refuse it
            EPOCHWISE,
            {"lr_decay_rate": 1, "warmup_steps": 500},
            [
                f"run.warmup_steps: 500, {FIRST}the rate jumps at its end. Set run.warmup_steps to "
                "at most 10"
            ],
        ),
        (
            STEPWISE,
            {"lr_decay_rate": 1, "warmup_ratio": 0.1},
            ["run.warmup_steps: run.warmup_ratio decides (5 steps)"],
        ),
    ],
)
def test_notes(name: str, changes: dict[str, Any], wanted: list[str]) -> None:
    assert notes(name, **changes) == wanted


def test_the_advice_of_a_note_works() -> None:
    """What it recommends is accepted and needs no note."""
    assert "in the first one only: init_lr is not reached. " in notes(
        EPOCHWISE, lr_decay_rate=1, max_epoch=1, warmup_steps=11
    )[0]  # fmt: skip
    assert rates(STEPWISE, [49], warmup_steps=20)
    assert notes(EPOCHWISE, lr_decay_rate=1, warmup_steps=10) == []
    assert notes(STEPWISE, lr_decay_rate=1, warmup_steps=20) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_lr": 1.5}, "min_lr must be at most 1.0 (init_lr), not 1.5"),
        ({"warmup_lr": 2.0}, "warmup_lr must be at most 1.0 (init_lr), not 2.0"),
        ({"lr_decay_rate": 1.01}, "lr_decay_rate must be at most 1, not 1.01"),
        ({"lr_layer_decay": 2.0}, "lr_layer_decay must be at most 1, not 2.0"),
    ],
)
def test_rates_that_would_rise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**(RUN | changes))
    assert str(caught.value) == message


def test_warm_up_that_does_not_fit() -> None:
    with pytest.raises(ConfigError) as caught:
        rates("linear_warmup_cosine_lr_step-wise", [0], warmup_steps=50)
    assert str(caught.value) == (
        "run.warmup_steps: 50 steps of warm-up do not fit into a run of 50 steps"
    )


def _parameters(*names_and_shapes: tuple[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in names_and_shapes}


def _names(groups: list[dict[str, Any]], parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    by_id = {id(p): n for n, p in parameters.items()}
    return [[by_id[id(p)] for p in group["params"]] for group in groups]


def test_who_gets_weight_decay() -> None:
    parameters = _parameters(
        ("llm_proj.weight", (3, 2)),
        ("llm_proj.bias", (3,)),
        ("query_tokens", (1, 2, 3)),
        ("ln_vision.weight", (3,)),
        ("ln_vision.table", (3, 3)),  # a norm by name, not by shape
        ("Qformer.encoder.layer.0.output_query.LayerNorm.weight", (3, 3)),
        ("llm_model.model.layers.0.input_layernorm.weight", (3, 3)),
        ("visual_encoder.blocks.0.norm1.weight", (3, 3)),
        ("visual_encoder.blocks.0.attn.q_bias", (3, 1)),
        ("scale", (7,)),
        ("frozen.weight", (3, 2)),
    )
    parameters["frozen.weight"].requires_grad_(False)
    groups = parameter_groups(parameters.items(), weight_decay=0.05)
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.05, 1.0), (0.0, 1.0)]
    assert _names(groups, parameters) == [
        ["llm_proj.weight", "query_tokens"],
        [
            "llm_proj.bias",
            "ln_vision.weight",
            "ln_vision.table",
            "Qformer.encoder.layer.0.output_query.LayerNorm.weight",
            "llm_model.model.layers.0.input_layernorm.weight",
            "visual_encoder.blocks.0.norm1.weight",
            "visual_encoder.blocks.0.attn.q_bias",
            "scale",
        ],
    ]


def test_two_groups_even_if_one_is_empty() -> None:
    """So that the optimizer's state fits the original's."""
    parameters = _parameters(("query_tokens", (1, 2, 3)))
    groups = parameter_groups(parameters.items(), weight_decay=0.05)
    assert _names(groups, parameters) == [["query_tokens"], []]


def test_layer_decay() -> None:
    parameters = _parameters(
        ("visual_encoder.pos_embed", (1, 2, 3)),
        ("visual_encoder.patch_embed.proj.bias", (3,)),
        ("visual_encoder.blocks.0.mlp.fc1.weight", (3, 3)),
        ("visual_encoder.blocks.1.mlp.fc1.weight", (3, 3)),
        ("visual_encoder.blocks.1.mlp.fc1.bias", (3,)),
        ("llm_proj.weight", (3, 3)),
        ("llm_proj.bias", (3,)),
    )
    groups = parameter_groups(parameters.items(), 0.05, 0.5, layers_above(parameters))
    got = {
        name: (group["lr_scale"], group["weight_decay"])
        for group, names in zip(groups, _names(groups, parameters), strict=True)
        for name in names
    }
    assert got == {
        "visual_encoder.pos_embed": (0.125, 0.05),
        "visual_encoder.patch_embed.proj.bias": (0.125, 0.0),
        "visual_encoder.blocks.0.mlp.fc1.weight": (0.25, 0.05),
        "visual_encoder.blocks.1.mlp.fc1.weight": (0.5, 0.05),
        "visual_encoder.blocks.1.mlp.fc1.bias": (0.5, 0.0),
        "llm_proj.weight": (1.0, 0.05),
        "llm_proj.bias": (1.0, 0.0),
    }
