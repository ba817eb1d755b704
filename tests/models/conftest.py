"""A copy of the toy's weight files that a test may damage, and a way to load it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis.common.errors import LavisError
from lavis.common.types import Batch, Sample, Spans
from lavis.datasets.collate import collate
from lavis.processors.conversation import Turn
from tests.conftest import TOY, TOY_YAML

Load = Callable[..., Any]

VIT = "eva/eva_vit_g.pth"
BLIP = "blip2/blip2_pretrained_flant5xxl.pth"
LLM = "Qwen7B-chat"
SHARDS = [f"{LLM}/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def model() -> Any:
    """The toy with its checkpoint, in evaluation mode."""
    from lavis.models import load_model

    return load_model(
        "minigpt4qwen",
        "qwen7b_chat",
        is_eval=True,
        checkpoint=TOY / "checkpoint_9.pth",
        options=[
            "model.image_size=56",
            "model.vit_precision=fp32",
            "model.vit_config={embed_dim: 88, depth: 2, num_heads: 4}",
            "model.num_query_token=8",
            f"env.cache_root={TOY / 'cache'}",
        ],
    )


@pytest.fixture()
def ckpt(tmp_path: Path) -> Path:
    """``cache/ckpt`` of the toy, to be damaged."""
    shutil.copytree(TOY / "cache", tmp_path / "cache")
    return tmp_path / "cache" / "ckpt"


@pytest.fixture()
def load(ckpt: Path) -> Load:
    """Load the model from the copy, in evaluation mode; arguments are ``--options`` items."""
    path = ckpt.parent.parent / "toy.yaml"
    path.write_text(TOY_YAML.replace(str(TOY / "cache"), str(ckpt.parent)))

    def _load(*options: str, checkpoint: Path | None = None) -> Any:
        from lavis.models import load_model

        return load_model(
            "minigpt4qwen",
            "qwen7b_chat",
            is_eval=True,
            cfg_path=path,
            options=options,
            checkpoint=checkpoint,
        )

    return _load


def refusal(load: Load, *options: str, checkpoint: Path | None = None) -> str:
    """What the user is told."""
    with pytest.raises(LavisError) as caught:
        load(*options, checkpoint=checkpoint)
    return str(caught.value)


def one_batch(model: Any, image: Tensor | None = None) -> Batch:
    """One document with one image."""
    if image is None:
        image = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    encoded = model.encoder.encode([Turn("user", "<ImageHere> What?"), Turn("assistant", "A cat.")])
    return collate(
        [Sample("x", torch.tensor(encoded.input_ids), torch.tensor(encoded.labels), Spans(image))]
    )
