"""Options of ``minigpt4qwen``, as they stand under ``model`` in YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.packages import check_packages
from lavis.common.paths import cache_path, require
from lavis.common.schema import ModelConfig
from lavis.common.typed import only, require_range
from lavis.models.shards import check_download, llm_files

Part = Literal["vit", "qformer", "llm"]


@dataclass(frozen=True)
class ViTConfig:
    """``model.vit_config``: sizes of the vision encoder, EVA-CLIP ViT-g/14 by default."""

    embed_dim: int = 1408
    depth: int = 39
    num_heads: int = 16
    mlp_ratio: float = 4.3637
    patch_size: int = 14
    initializer_range: float = 0.02  # of the matrices, from scratch

    def __post_init__(self) -> None:
        require_range(self, 1, "embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")
        require_range(self, 0, "initializer_range")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}"
            )


@dataclass(frozen=True)
class QFormerConfig:
    """``model.qformer_config``: what is not given comes from ``bert_config``, or is BERT-base."""

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    layer_norm_eps: float | None = None
    cross_attention_frequency: int | None = None
    initializer_range: float | None = None

    def __post_init__(self) -> None:
        require_range(
            self, 1, "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "cross_attention_frequency",
        )  # fmt: skip
        require_range(self, 0, "hidden_dropout_prob", "attention_probs_dropout_prob", below=1)
        require_range(self, 0, "initializer_range", "layer_norm_eps")


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters of the language model (Hu et al. 2021)."""

    r: int
    alpha: int
    dropout: float


@dataclass(frozen=True)
class MiniGPT4QwenConfig(ModelConfig):
    """The ``model`` section. Paths are relative to ``cache/``.

    ``from_scratch`` names parts that start from random weights and so need no weight file.
    """

    DEFAULTS: ClassVar[dict[str, str]] = {
        "qwen7b_chat": "minigpt4qwen_qwen7b_chat.yaml",
        "qwen14b_chat": "minigpt4qwen_qwen14b_chat.yaml",
        "toybox": "minigpt4qwen_toybox.yaml",
    }

    model_type: str = "qwen7b_chat"
    from_scratch: tuple[Part, ...] = ()
    load_pretrained: bool = True  # false: the Q-Former from scratch
    pretrained: str = "ckpt/blip2/blip2_pretrained_flant5xxl.pth"
    load_finetuned: bool = False
    finetuned: str | None = None
    # vision encoder
    vit_model: Literal["eva_clip_g"] = "eva_clip_g"
    vit_weights: str = "ckpt/eva/eva_vit_g.pth"
    vit_config: ViTConfig = ViTConfig()
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    freeze_vit: bool = True
    unfreeze_pos_embed: bool = False
    # Q-Former
    bert_config: str = "ckpt/bert-base-uncased/config.json"
    qformer_config: QFormerConfig = QFormerConfig()
    num_query_token: int = 32
    qformer_text_input: bool = only(
        False, "the Q-Former reads no text here, as in every recipe of the original; remove the key"
    )
    freeze_qformer: bool = True
    freeze_queries: bool = True
    # projection
    freeze_proj: bool = False
    # language model
    llm_model: str = "ckpt/Qwen7B-chat"
    llm_config: dict[str, Any] | None = None  # over its config.json
    llm_embedding_std: float | None = None  # from scratch; default: initializer_range
    llm_precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"  # auto: as stored
    freeze_llm: bool = True
    llm_grad_ckpt: bool = False
    llm_device_map: Literal["cpu", "auto"] = "cpu"  # auto: spread over the visible GPUs
    get_lora: bool = False
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    # text
    max_txt_len: int = 512
    label_mask: Literal["chatml_delimiters", "assistant_only"] = "chatml_delimiters"
    prompt: str = only("", "it had no effect in the original; put it into the question")
    apply_lemmatizer: bool = only(False, "answers are returned as generated; remove the key")
    enable_autocast: bool = True  # whether run.amp reaches the vision encoder

    def __post_init__(self) -> None:
        if self.image_size % self.vit_config.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by vit_config.patch_size "
                f"{self.vit_config.patch_size}"
            )
        require_range(
            self, 1, "image_size", "num_query_token", "max_txt_len", "lora_r", "lora_alpha"
        )
        require_range(self, 0, "drop_path_rate", "lora_dropout", below=1)
        require_range(self, 0, "llm_embedding_std")
        if self.load_finetuned and not self.finetuned:
            raise ConfigError("load_finetuned is true but finetuned names no checkpoint")
        trained = "freeze_vit: false" if not self.freeze_vit else "unfreeze_pos_embed: true"
        if self.vit_precision == "fp16" and (not self.freeze_vit or self.unfreeze_pos_embed):
            raise ConfigError(
                f"{trained} needs vit_precision: fp32 (fp16 weights do not train: their updates "
                "round away); run.amp gives the speed of half precision"
            )

    def is_from_scratch(self, part: Part) -> bool:
        """Whether a part starts from random weights."""
        return part in self.from_scratch or (part == "qformer" and not self.load_pretrained)

    @property
    def lora(self) -> LoraOptions | None:
        """The adapter options, or ``None`` without adapters."""
        if not self.get_lora:
            return None
        return LoraOptions(self.lora_r, self.lora_alpha, self.lora_dropout)

    @property
    def trained_vision(self) -> tuple[str, ...]:
        """The settings by which some of the vision side is trained."""
        frozen = {
            "freeze_vit: false": self.freeze_vit,
            "unfreeze_pos_embed: true": not self.unfreeze_pos_embed,
            "freeze_qformer: false": self.freeze_qformer,
            "freeze_queries: false": self.freeze_queries,
        }
        return tuple(setting for setting, is_frozen in frozen.items() if not is_frozen)

    @property
    def trains(self) -> bool:
        """Whether any part is trained."""
        return (
            bool(self.trained_vision)
            or not self.freeze_proj
            or not self.freeze_llm
            or self.get_lora
        )

    def vision_files(self, cache_root: str) -> Iterator[Path]:
        """The weight files of the vision side, checked.

        Raises:
            WeightsError: one is missing.
        """
        if not self.is_from_scratch("vit"):
            yield require(self.path("vit_weights", cache_root), "model.vit_weights", WeightsError)
        if not self.is_from_scratch("qformer"):
            yield require(self.path("pretrained", cache_root), "model.pretrained", WeightsError)

    def files(self, cache_root: str) -> Iterator[Path]:
        """Every file that building the model reads, checked.

        Raises:
            WeightsError, ConfigError: one is missing, or the language model is of another kind;
                no weight has been read yet.
        """
        yield from self.vision_files(cache_root)
        folder = self.path("llm_model", cache_root)
        yield from llm_files(folder, weights=not self.is_from_scratch("llm"))
        if self.load_finetuned:
            yield require(self.path("finetuned", cache_root), "model.finetuned", WeightsError)

    def check_files(self, cache_root: str) -> None:
        """Check every path, and the packages that some settings need, before any weight is read.

        Raises:
            WeightsError: a file is missing or not complete.
            ConfigError: a package is missing, or the language model is of another kind.
        """
        if self.get_lora:
            check_packages("lora", "model.get_lora: true")
        if self.llm_device_map == "auto":
            check_packages("multi-gpu-chat", "model.llm_device_map: auto")
        for path in self.files(cache_root):
            check_download(path)

    def path(self, key: str, cache_root: str) -> Path:
        """The path that a key of this section names."""
        return cache_path(getattr(self, key), cache_root)
