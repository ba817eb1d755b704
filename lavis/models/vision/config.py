"""What ``model.vision`` may hold in YAML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.paths import cache_path, require
from lavis.common.registry import VISION_ENCODERS, Registry
from lavis.common.schema import PartConfig
from lavis.common.typed import require_range

if TYPE_CHECKING:
    import torch


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


Key = Callable[[str], str]
"""Says what the user calls a key of a part's block, for messages."""


@dataclass(frozen=True)
class VisionConfig(PartConfig):
    """What every vision encoder's block may hold, and what it says before a weight is read.

    Attributes:
        PARTS: what ``train.vision.parts`` may name.
        image_size: pixels of a side that it reads.
        enable_autocast: whether ``run.amp`` reaches it.
    """

    REGISTRY: ClassVar[Registry[Any]] = VISION_ENCODERS
    PARTS: ClassVar[tuple[str, ...]] = ()

    image_size: int = 224
    enable_autocast: bool = True

    @property
    def depth(self) -> int:
        """Blocks that ``run.lr_layer_decay`` tells apart, of ``visual_encoder.blocks``."""
        return 0

    @property
    def random_parts(self) -> tuple[str, ...]:
        """What starts from random weights."""
        return ()

    def keeps_precision(self, device: torch.device) -> bool:
        """Whether autocast leaves it alone where it is frozen, as it is in half precision there."""
        return False

    def without_files(self) -> Self:
        """The same sizes, for an encoder on the meta device whose weights nobody reads."""
        return self

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        """The weight files, checked.

        Raises:
            WeightsError: one is missing.
        """
        return iter(())

    def check_training(self, parts: tuple[str, ...]) -> None:
        """Check that these of :attr:`PARTS` can learn; without any, the whole encoder.

        Raises:
            ConfigError: they cannot.
        """


@dataclass(frozen=True)
class EvaQFormerKeys:
    """EVA ViT-g, a LayerNorm and the Q-Former, by the original's keys."""

    pretrained: str = "ckpt/blip2/blip2_pretrained_flant5xxl.pth"
    vit_model: Literal["eva_clip_g"] = "eva_clip_g"
    vit_weights: str = "ckpt/eva/eva_vit_g.pth"
    vit_config: ViTConfig = ViTConfig()
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    bert_config: str = "ckpt/bert-base-uncased/config.json"
    qformer_config: QFormerConfig = QFormerConfig()
    num_query_token: int = 32
    enable_autocast: bool = True

    def __post_init__(self) -> None:
        if self.image_size % self.vit_config.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by vit_config.patch_size "
                f"{self.vit_config.patch_size}"
            )
        require_range(self, 1, "image_size", "num_query_token")
        require_range(self, 0, "drop_path_rate", below=1)


@dataclass(frozen=True)
class EvaQFormerConfig(EvaQFormerKeys, VisionConfig):
    """``vision: {name: eva_qformer, ...}``."""

    PARTS: ClassVar[tuple[str, ...]] = ("vit", "pos_embed", "qformer", "queries")

    from_scratch: tuple[Literal["vit", "qformer"], ...] = ()

    @property
    def depth(self) -> int:
        """Blocks of the ViT."""
        return self.vit_config.depth

    @property
    def random_parts(self) -> tuple[str, ...]:
        """What starts from random weights."""
        return self.from_scratch

    def keeps_precision(self, device: torch.device) -> bool:
        """Whether the ViT does: on a CPU, fp16 is computed in fp32."""
        return self.vit_precision == "bf16" or (
            self.vit_precision == "fp16" and device.type != "cpu"
        )

    def without_files(self) -> Self:
        """As its base says."""
        return replace(self, from_scratch=("vit", "qformer"))

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        """The weight files, checked.

        Raises:
            WeightsError: one is missing.
        """
        for part, name in (("vit", "vit_weights"), ("qformer", "pretrained")):
            if part not in self.from_scratch:
                yield require(self.path(name, cache_root), key(name), WeightsError)

    def path(self, name: str, cache_root: str) -> Path:
        """The path that a key names."""
        return cache_path(getattr(self, name), cache_root)

    def check_training(self, parts: tuple[str, ...]) -> None:
        """Check that these parts can learn.

        Raises:
            ConfigError: the ViT's weights are too short.
        """
        if self.vit_precision == "fp16" and {"vit", "pos_embed"} & set(parts or self.PARTS):
            raise ConfigError(
                "train.vision needs vision.vit_precision: fp32 (fp16 weights do not train: their "
                "updates round away); run.amp gives the speed of half precision"
            )
