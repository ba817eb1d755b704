"""Adapters under a strategy that shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lavis.common import dist
from lavis.common.schema import RunConfig
from lavis.models.config import LoraConfig
from lavis.models.language.adapters import add_lora
from lavis.runners.strategy import FSDP2Strategy
from tests.models.test_adapters import BF16, FP32, model

pytest.importorskip("peft")


@pytest.mark.parametrize(("frozen", "gathered"), [(BF16, FP32), (FP32, BF16)], ids=str)
def test_adapters_of_a_half_precision_model_are_gathered_in_fp32(
    frozen: torch.dtype, gathered: torch.dtype
) -> None:
    """Of an fp32 model under autocast all is gathered in half precision, to send less."""
    llm: Any = model(dtype=frozen)
    add_lora(llm, LoraConfig(use_dora=True))
    stock = llm.model
    stock.shardable_blocks = llm.blocks
    strategy = FSDP2Strategy(RunConfig(amp=True, autocast_dtype="bf16"), torch.device("cpu"))
    seen = set()
    layer = stock.model.layers[0].self_attn.q_proj

    def look(*_: Any) -> None:
        seen.add((layer.base_layer.weight.dtype, layer.lora_A["default"].weight.dtype))

    layer.register_forward_pre_hook(look)
    with dist.process_group("cpu", always=True):
        sharded = strategy.wrap(stock)
        with torch.autocast("cpu", BF16):
            sharded(input_ids=torch.arange(6)[None]).logits.sum().backward()
        assert {p.grad.dtype for p in stock.parameters() if p.requires_grad} == {FP32}
    assert seen == {(BF16, gathered)}
