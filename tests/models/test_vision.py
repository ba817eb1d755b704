"""The vision encoder gives in training what it gives in chat, and recomputes nothing in vain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavis.common.config import load_config
from lavis.models.vision.frozen import FrozenVision
from tests.conftest import TOY
from tests.models.conftest import Load

IMAGES = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("precision", "reached"), [("bf16", False), ("fp32", True)])
def test_autocast_leaves_a_frozen_encoder_in_half_precision_alone(
    load: Load, precision: str, reached: bool
) -> None:
    model = load(f"model.vit_precision={precision}", checkpoint=TOY / "checkpoint_9.pth")
    alone = model.encode_query(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        training = model.encode_query(IMAGES)
    assert torch.equal(alone, training) is not reached
    assert training.dtype == torch.float32
    model.vision.query_tokens.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(alone, model.encode_query(IMAGES))  # what learns is reached


def test_features_are_kept_apart_only_where_autocast_reaches_them(toy_yaml: Path) -> None:
    def fingerprint(*options: str) -> str:
        config = load_config(toy_yaml, ["run.autocast_dtype=bf16", *options])
        return FrozenVision(config).describe(torch.device("cpu"))[0]

    half = "model.vit_precision=bf16"
    assert fingerprint(half) == fingerprint(half, "run.amp=true")
    assert fingerprint() != fingerprint("run.amp=true")


def test_a_frozen_encoder_recomputes_nothing(load: Load) -> None:
    model = load("model.use_grad_checkpoint=true", checkpoint=TOY / "checkpoint_9.pth")
    vision = model.vision
    assert vision.config == replace(vision.config, use_grad_checkpoint=True)
    for learns in (False, True):
        vision.visual_encoder.pos_embed.requires_grad_(learns)
        model.encode_query(IMAGES)
        assert vision.visual_encoder.grad_checkpointing is learns
