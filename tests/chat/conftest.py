"""Two models to talk to: the toybox, and the original's random toy model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lavis.chat import Answer, ChatEngine
from lavis.common.cli import REPOSITORY, TOYBOX
from tests.conftest import TOY


@pytest.fixture(scope="session")
def toybox() -> ChatEngine:
    """The embedded model."""
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen", "toybox", is_eval=True, options=[f"env.cache_root={REPOSITORY}"]
    )
    model.load_checkpoint(TOYBOX / "checkpoint.pth")
    return ChatEngine(model, processors["eval"])


@pytest.fixture(scope="session")
def fixture(toy_yaml: Any) -> ChatEngine:
    """Random weights, whose answers are whatever: what one reads changes all that follows."""
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen", "qwen7b_chat", is_eval=True, cfg_path=toy_yaml
    )
    model.load_checkpoint(TOY / "checkpoint_9.pth")
    return ChatEngine(model, processors["eval"])


@pytest.fixture(params=["toybox", "fixture"])
def engine(request: pytest.FixtureRequest) -> ChatEngine:
    """Either."""
    return request.getfixturevalue(request.param)


class Pictures:
    """Pictures as tensors, by the images that were made of them."""

    def __init__(self, engine: ChatEngine) -> None:
        self.engine = engine
        self._pixels: dict[int, Tensor] = {}

    def __call__(self, name: str) -> Any:
        """Encode one of the toybox's pictures."""
        pixels = self.engine._processor(Image.open(TOYBOX / "image" / f"{name}.png").convert("RGB"))
        image = self.engine.encode_image(pixels, name)
        self._pixels[image.number] = pixels
        return image

    def cold(self, answer: Answer, prompt: list[int], **settings: Any) -> list[int]:
        """The answer's ids when everything is computed anew, by ``generate_ids``."""
        pixels = [self._pixels[image.number] for image in answer.images]
        stack = torch.stack(pixels) if pixels else None
        return self.engine.model.generate_ids([prompt], stack, **settings)[0]


@pytest.fixture()
def pictures(engine: ChatEngine) -> Pictures:
    """Pictures to show."""
    return Pictures(engine)
