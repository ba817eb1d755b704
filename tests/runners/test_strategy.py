"""What a strategy refuses, and what it tells the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lavis.common import dist
from lavis.common.config import load_config
from lavis.common.errors import ConfigError
from lavis.common.registry import MODELS
from lavis.common.schema import RunConfig
from lavis.runners.strategy import DDPStrategy, FSDP2Strategy, Strategy

CPU = torch.device("cpu")


class Model(nn.Module):
    """A language model's head, and something that learns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.uniform_graph = self.sharded = False
        self.language = nn.Module()
        self.language.head = nn.Linear(2, 3, bias=False, dtype=dtype).requires_grad_(False)
        self.connector = nn.Linear(2, 2)


def set_up(model: Model, *, amp: bool = True, autocast: Any = "fp16") -> None:
    groups = [{"params": list(model.connector.parameters()), "weight_decay": 0.0}]
    Strategy(RunConfig(amp=amp, autocast_dtype=autocast), CPU).setup(model, groups)


@pytest.mark.parametrize(
    ("dtype", "own", "other"), [(torch.bfloat16, "bf16", "fp16"), (torch.float16, "fp16", "bf16")]
)
def test_autocast_in_another_half_precision_than_the_frozen_language_models(
    dtype: torch.dtype, own: str, other: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        set_up(Model(dtype), autocast=other)
    assert str(refused.value) == (
        f"run.autocast_dtype is {other}, but the frozen language model is in {own}: with run.amp "
        f"its weights would be in memory twice; set run.autocast_dtype: {own}, or run.amp: false"
    )
    set_up(Model(dtype), autocast=own)
    set_up(Model(dtype), autocast=other, amp=False)
    set_up(Model(torch.float32), autocast=other)
    learning = Model(dtype)
    learning.language.head.requires_grad_(True)  # type: ignore[operator]
    set_up(learning, autocast=other)


def test_whole_copies_generate_without_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DDP a token costs no collective: only the graph of a training step is agreed on."""
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    model = Model(torch.float32)
    DDPStrategy(RunConfig(), CPU).wrap(model)
    assert (model.uniform_graph, model.sharded) == (True, False)


def test_a_sharded_encoder_keeps_its_precision(toy_yaml: Path) -> None:
    """FSDP2 casts what it gathers, as autocast would: not a frozen encoder in half precision."""
    options = ["model.vit_precision=bf16", "run.amp=true", "run.autocast_dtype=bf16"]
    config = load_config(toy_yaml, options)
    model: Any = MODELS.get(config.model.arch).from_config(
        config.model, cache_root=config.env.cache_root, device="cpu"
    )
    images = torch.rand(2, 3, 56, 56)
    wanted = model.encode_query(images)
    with dist.process_group("cpu", always=True):
        strategy = FSDP2Strategy(config.run, CPU)
        sharded = strategy.wrap(model)
        with strategy.micro_batch(last=True):
            got = sharded.encode_query(images)
    assert torch.equal(got, wanted)
    assert sharded.sharded
