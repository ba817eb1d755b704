"""Models. Importing this package is cheap; PyTorch is imported when a model is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavis.common.registry import CONNECTORS, LANGUAGE_MODELS, MODELS, VISION_ENCODERS
from lavis.models.config import (
    HfConfig,
    LinearConfig,
    MergeConfig,
    MlpConfig,
    PoolConfig,
    Qwen1Config,
    ResamplerConfig,
    VlmConfig,
)
from lavis.models.legacy import MiniGPT4QwenConfig
from lavis.models.vision.config import (
    EvaQFormerConfig,
    FusedConfig,
    HfVisionConfig,
    TimmConfig,
)

if TYPE_CHECKING:
    from lavis.models.loading import load_model, load_model_and_preprocess
    from lavis.models.vlm import VLM

__all__ = ["VLM", "MiniGPT4QwenConfig", "VlmConfig", "load_model", "load_model_and_preprocess"]

MODELS.register("minigpt4qwen", "lavis.models.build:MiniGPT4Qwen", config=MiniGPT4QwenConfig)
MODELS.register("vlm", "lavis.models.build:Assembly", config=VlmConfig)
VISION_ENCODERS.register(
    "eva_qformer", "lavis.models.vision.eva_qformer:EvaQFormer", config=EvaQFormerConfig
)
VISION_ENCODERS.register("hf", "lavis.models.vision.hf:HfVision", config=HfVisionConfig)
VISION_ENCODERS.register("timm", "lavis.models.vision.timm_tower:TimmVision", config=TimmConfig)
VISION_ENCODERS.register("fused", "lavis.models.vision.fused:FusedTowers", config=FusedConfig)
CONNECTORS.register("linear", "lavis.models.connectors:Linear", config=LinearConfig)
CONNECTORS.register("mlp", "lavis.models.connectors:Mlp", config=MlpConfig)
CONNECTORS.register("merge", "lavis.models.connectors:Merge", config=MergeConfig)
CONNECTORS.register("pool", "lavis.models.connectors:Pool", config=PoolConfig)
CONNECTORS.register("resampler", "lavis.models.connectors:Resampler", config=ResamplerConfig)
LANGUAGE_MODELS.register("hf", "lavis.models.language.parts:Hf", config=HfConfig)
LANGUAGE_MODELS.register("qwen1", "lavis.models.language.parts:Qwen1", config=Qwen1Config)

_LAZY = {
    "load_model": "lavis.models.loading",
    "load_model_and_preprocess": "lavis.models.loading",
    "VLM": "lavis.models.vlm",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
