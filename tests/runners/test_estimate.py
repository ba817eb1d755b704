"""What a run is said to need is what it takes, by the record of a CPU's allocator."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lavis.common.config import load_config
from lavis.common.registry import MODELS
from lavis.common.schema import Config
from lavis.common.types import Batch
from lavis.models.compute.schedule import StepSchedule
from lavis.models.vlm import VLM
from lavis.runners.estimate import Estimator, Sharing
from tests.conftest import REPO

PROJECT = REPO / "lavis" / "projects" / "toybox" / "train.yaml"
BENCH = [
    f"env.cache_root={REPO}", "model.from_scratch=[vit,qformer,llm]", "model.llm_precision=fp32",
    "model.llm_config={hidden_size: 256, intermediate_size: 1408, num_hidden_layers: 3, "
    "num_attention_heads: 4}", "run.amp=false",
]  # fmt: skip
SETTINGS = {
    "connector": [],
    "every layer again": ["run.recompute=all"],
    "every second layer again": ["run.recompute=2"],
    "logits at once": ["run.supervised_head=false"],
    "adapters": ["model.get_lora=true", "model.lora_r=16"],
    "everything": ["model.freeze_llm=false"],
    "vision": ["model.freeze_vit=false", "model.vit_precision=fp32", "model.freeze_qformer=false"],
    "autocast": ["model.freeze_llm=false", "run.amp=true", "run.autocast_dtype=bf16"],
    "features": ["run.feature_cache.enabled=true"],
}


def config_of(*options: str) -> Config:
    return load_config(PROJECT, [*BENCH, *options])


def measured(config: Config, batch: Batch, schedule: StepSchedule) -> int:
    """The most bytes that a second micro-batch takes at once, by the allocator's own record."""
    model: VLM = MODELS.get(config.model.arch).from_config(
        config.model, cache_root=str(REPO), vision=not config.run.feature_cache.enabled
    )
    model.train().set_schedule(schedule)
    for parameter in model.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.run.amp)
    with autocast, contextlib.ExitStack() as stack:
        model.constant_prefix()
        recorder = stack.enter_context(
            profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        )
        model(batch).loss_sum.backward()
    events: Any = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_row_takes_what_is_said(setting: str) -> None:
    """Of two rows that were tried, a third follows."""
    config = config_of(*SETTINGS[setting])
    made = Estimator(config, Sharing("single", 1))
    schedule, documents = made.schedule(float("inf")), 20
    batch = made.batch(documents)
    said = made.micro_batch(documents * made.length, schedule).peak
    taken = measured(config, batch, schedule)
    assert said == pytest.approx(taken, rel=0.1)
