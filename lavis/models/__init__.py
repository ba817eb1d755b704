"""Models. Importing this package is cheap; PyTorch is imported when a model is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavis.common.registry import MODELS
from lavis.models.config import MiniGPT4QwenConfig

if TYPE_CHECKING:
    from lavis.models.loading import load_model, load_model_and_preprocess
    from lavis.models.minigpt4qwen import MiniGPT4Qwen

__all__ = ["MiniGPT4Qwen", "MiniGPT4QwenConfig", "load_model", "load_model_and_preprocess"]

MODELS.register("minigpt4qwen", "lavis.models.minigpt4qwen:MiniGPT4Qwen", config=MiniGPT4QwenConfig)

_LAZY = {
    "load_model": "lavis.models.loading",
    "load_model_and_preprocess": "lavis.models.loading",
    "MiniGPT4Qwen": "lavis.models.minigpt4qwen",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
