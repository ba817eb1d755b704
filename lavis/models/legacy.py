"""The original's model section: all keys on one level, mapped onto the same parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from lavis.common.typed import only, ranged
from lavis.models.config import (
    ConnectorConfig,
    LanguageConfig,
    LinearConfig,
    LoraConfig,
    PartsConfig,
    PartTraining,
    Precision,
    Qwen1Config,
)
from lavis.models.vision.config import EvaQFormerConfig, EvaQFormerKeys, VisionConfig, too_short


@dataclass(frozen=True)
class MiniGPT4QwenConfig(EvaQFormerKeys, PartsConfig):
    """``arch: minigpt4qwen``: the original's keys, all on one level.

    ``from_scratch`` names parts that start from random weights and so need no weight file.
    """

    DEFAULTS: ClassVar[dict[str, str]] = {
        "qwen7b_chat": "minigpt4qwen_qwen7b_chat.yaml",
        "qwen14b_chat": "minigpt4qwen_qwen14b_chat.yaml",
        "toybox": "minigpt4qwen_toybox.yaml",
    }

    LEARNS_BY: ClassVar[str] = "freeze_*"
    WITHOUT_LORA: ClassVar[str] = "set model.get_lora: false"

    model_type: str = "qwen7b_chat"
    from_scratch: tuple[Literal["vit", "qformer", "llm"], ...] = ()
    load_pretrained: bool = True  # false: the Q-Former from scratch
    freeze_vit: bool = True
    unfreeze_pos_embed: bool = False
    qformer_text_input: bool = only(
        False, "the Q-Former reads no text here, as in every recipe of the original; remove the key"
    )
    freeze_qformer: bool = True
    freeze_queries: bool = True
    freeze_proj: bool = False
    # language model
    llm_model: str = "ckpt/Qwen7B-chat"
    llm_config: dict[str, Any] | None = None  # over its config.json
    # from scratch; default: initializer_range
    llm_embedding_std: float | None = ranged(None, least=0)
    llm_precision: Precision = "auto"  # auto: as stored
    freeze_llm: bool = True
    llm_grad_ckpt: bool = False
    llm_device_map: Literal["cpu", "auto"] = "cpu"  # auto: spread over the visible GPUs
    get_lora: bool = False
    lora_r: int = ranged(8, least=1)
    lora_alpha: int = ranged(32, least=1)
    lora_dropout: float = ranged(0.05, least=0, below=1)
    lora_targets: tuple[str, ...] | Literal["all"] = ("q_proj", "v_proj")
    lora_use_rslora: bool = False
    lora_use_dora: bool = False
    prompt: str = only("", "it had no effect in the original; put it into the question")
    apply_lemmatizer: bool = only(False, "answers are returned as generated; remove the key")

    def __post_init__(self) -> None:
        super().__post_init__()
        trained = "freeze_vit: false" if not self.freeze_vit else "unfreeze_pos_embed: true"
        if self.vit_precision == "fp16" and (not self.freeze_vit or self.unfreeze_pos_embed):
            raise too_short(trained, "vit_precision", "fp16")

    @property
    def parts(self) -> tuple[VisionConfig, ConnectorConfig, LanguageConfig]:
        scratch = {*self.from_scratch, *(() if self.load_pretrained else ("qformer",))}
        vision = EvaQFormerConfig(
            "eva_qformer",
            from_scratch=tuple(part for part in ("vit", "qformer") if part in scratch),
            **{f.name: getattr(self, f.name) for f in fields(EvaQFormerKeys)},
        )
        language = Qwen1Config(
            "qwen1",
            path=self.llm_model,
            precision=self.llm_precision,
            grad_ckpt=self.llm_grad_ckpt,
            device_map=self.llm_device_map,
            config=self.llm_config,
            embedding_std=self.llm_embedding_std,
            from_scratch="llm" in scratch,
        )
        return vision, LinearConfig("linear", init="pytorch"), language

    def key(self, part: str, name: str) -> str:
        if part != "language" or name == "from_scratch":
            return f"model.{name}"
        return "model.llm_model" if name == "path" else f"model.llm_{name}"

    @property
    def training(self) -> Mapping[str, PartTraining]:
        learn: dict[str, PartTraining] = {}
        if parts := tuple(self._vision_parts.values()):
            learn["vision"] = PartTraining(parts=parts)
        if not self.freeze_proj:
            learn["connector"] = PartTraining()
        if not self.freeze_llm:
            learn["language"] = PartTraining()
        elif self.get_lora:
            options = {f.name: getattr(self, f"lora_{f.name}") for f in fields(LoraConfig)}
            learn["language"] = PartTraining(lora=LoraConfig(**options))
        return learn

    @property
    def trained_vision(self) -> tuple[str, ...]:
        return tuple(self._vision_parts)

    @property
    def _vision_parts(self) -> dict[str, str]:
        frozen = {
            "freeze_vit: false": ("vit", self.freeze_vit),
            "unfreeze_pos_embed: true": ("pos_embed", not self.unfreeze_pos_embed),
            "freeze_qformer: false": ("qformer", self.freeze_qformer),
            "freeze_queries: false": ("queries", self.freeze_queries),
        }
        return {setting: part for setting, (part, is_frozen) in frozen.items() if not is_frozen}
