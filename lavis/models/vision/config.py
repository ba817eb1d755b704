"""What ``model.vision`` may hold in YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.paths import cache_path, require
from lavis.common.registry import VISION_ENCODERS, Registry
from lavis.common.schema import ImageTransform, Key, PartConfig
from lavis.common.typed import Checked, ranged
from lavis.models.weights.shards import folder_files

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ViTConfig(Checked):
    """``model.vit_config``: sizes of the vision encoder, EVA-CLIP ViT-g/14 by default."""

    embed_dim: int = ranged(1408, least=1)
    depth: int = ranged(39, least=1)
    num_heads: int = ranged(16, least=1)
    mlp_ratio: float = ranged(4.3637, least=1)
    patch_size: int = ranged(14, least=1)
    initializer_range: float = ranged(0.02, least=0)  # of the matrices, from scratch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}"
            )


@dataclass(frozen=True)
class QFormerConfig(Checked):
    """``model.qformer_config``: what is not given comes from ``bert_config``, or is BERT-base."""

    hidden_size: int | None = ranged(None, least=1)
    num_hidden_layers: int | None = ranged(None, least=1)
    num_attention_heads: int | None = ranged(None, least=1)
    intermediate_size: int | None = ranged(None, least=1)
    hidden_dropout_prob: float | None = ranged(None, least=0, below=1)
    attention_probs_dropout_prob: float | None = ranged(None, least=0, below=1)
    layer_norm_eps: float | None = ranged(None, least=0)
    cross_attention_frequency: int | None = ranged(None, least=1)
    initializer_range: float | None = ranged(None, least=0)


KEY: Key = "model.vision.{}".format  # for those who are given none


def too_short(setting: str, key: str, precision: str) -> ConfigError:
    """What to raise where weights learn that are in half precision."""
    return ConfigError(
        f"{setting} needs {key}: fp32 ({precision} weights do not train: their updates round "
        "away); run.amp gives the speed of half precision"
    )


def _is_half(precision: str, device: torch.device) -> bool:
    """Whether an encoder is in half precision there: on a CPU, fp16 is computed in fp32."""
    return precision == "bf16" or (precision == "fp16" and device.type != "cpu")


@dataclass(frozen=True)
class VisionConfig(PartConfig):
    """What every vision encoder's block may hold, and what it says before a weight is read.

    Attributes:
        PARTS: what ``train.vision.parts`` may name.
        image_size: pixels of a side that it reads; the encoder's own where it has one.
        enable_autocast: whether ``run.amp`` reaches it.
    """

    REGISTRY: ClassVar[Registry[Any]] = VISION_ENCODERS
    PARTS: ClassVar[tuple[str, ...]] = ()

    image_size: int | None = ranged(None, least=1)
    enable_autocast: bool = True

    def transform(self, cache_root: str, key: Key) -> ImageTransform:
        """How it takes images; reads no weight.

        Raises:
            WeightsError, ConfigError: a small file is missing, or says nothing of use.
        """
        return ImageTransform(self.image_size or 224)

    @property
    def random_parts(self) -> tuple[str, ...]:
        """What starts from random weights."""
        return ()

    def keeps_precision(self, device: torch.device) -> bool:
        """Whether autocast leaves it alone where it is frozen, as it is in half precision there."""
        return False

    def check_training(self, parts: tuple[str, ...]) -> None:
        """Check that these of :attr:`PARTS` can learn; without any, the whole encoder.

        Raises:
            ConfigError: they cannot.
        """


@dataclass(frozen=True)
class EvaQFormerKeys(Checked):
    """EVA ViT-g, a LayerNorm and the Q-Former, by the original's keys."""

    pretrained: str = "ckpt/blip2/blip2_pretrained_flant5xxl.pth"
    vit_model: Literal["eva_clip_g"] = "eva_clip_g"
    vit_weights: str = "ckpt/eva/eva_vit_g.pth"
    vit_config: ViTConfig = ViTConfig()
    image_size: int = ranged(224, least=1)
    drop_path_rate: float = ranged(0.0, least=0, below=1)
    use_grad_checkpoint: bool = False
    vit_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    bert_config: str = "ckpt/bert-base-uncased/config.json"
    qformer_config: QFormerConfig = QFormerConfig()
    num_query_token: int = ranged(32, least=1)
    enable_autocast: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.vit_config.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by vit_config.patch_size "
                f"{self.vit_config.patch_size}"
            )


@dataclass(frozen=True)
class EvaQFormerConfig(EvaQFormerKeys, VisionConfig):
    """``vision: {name: eva_qformer, ...}``.

    Attributes:
        path: a folder of BLIP-2 of Transformers with all weights, in place of ``vit_weights`` and
            ``pretrained``.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("vit", "pos_embed", "qformer", "queries")

    path: str | None = None
    from_scratch: tuple[Literal["vit", "qformer"], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None and self.from_scratch:
            raise ConfigError("from_scratch: weights come from path; remove one of the two")

    @property
    def random_parts(self) -> tuple[str, ...]:
        return self.from_scratch

    def keeps_precision(self, device: torch.device) -> bool:
        return _is_half(self.vit_precision, device)

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        if self.path is not None:
            yield from folder_files(self.file("path", cache_root), key("path"))
            return
        for part, name in (("vit", "vit_weights"), ("qformer", "pretrained")):
            if part not in self.from_scratch:
                yield require(self.file(name, cache_root), key(name), WeightsError)

    def file(self, name: str, cache_root: str) -> Path:
        """The file or folder that a key names."""
        return cache_path(getattr(self, name), cache_root)

    def transform(self, cache_root: str, key: Key) -> ImageTransform:
        if self.path is None:
            return super().transform(cache_root, key)
        from lavis.models.vision.transforms import of_folder

        return of_folder(self.file("path", cache_root), self.image_size, key("path"))

    def check_training(self, parts: tuple[str, ...]) -> None:
        if self.vit_precision == "fp16" and {"vit", "pos_embed"} & set(parts or self.PARTS):
            raise too_short("train.vision", "vision.vit_precision", "fp16")


@dataclass(frozen=True)
class TowerConfig(VisionConfig):
    """What ``hf`` and ``timm`` share.

    Attributes:
        path: relative to ``env.cache_root``.
        layer: features are what this block gives: counted from 1, or from the last one, -1, whose
            output passes the final norm where the library's own class has it. Default: by family.
        class_token: ``keep`` puts it before the patches. Register tokens are dropped.
    """

    path: str = ""
    layer: int | None = None
    class_token: Literal["drop", "keep"] = "drop"  # noqa: S105  no password
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError("path is missing: what holds the vision encoder's weights")
        if self.layer == 0:
            raise ConfigError("layer must not be 0: blocks count from 1, or from the last one, -1")

    @property
    def keeps_class(self) -> bool:
        """Whether the class token is kept."""
        return self.class_token == "keep"  # noqa: S105

    def keeps_precision(self, device: torch.device) -> bool:
        return _is_half(self.precision, device)

    def check_training(self, parts: tuple[str, ...]) -> None:
        if self.precision != "fp32":
            raise too_short("train.vision", "vision.precision", self.precision)

    def blocks_of(self, depth: int) -> int:
        """How many blocks of ``depth`` are computed, if a layer is given.

        Raises:
            ConfigError: there is no such layer.
        """
        layer = depth if self.layer is None else self.layer
        if not 0 < (kept := layer if layer > 0 else depth + 1 + layer) <= depth:
            raise ConfigError(
                f"model.vision.layer: {self.path} has {depth} blocks, of which {layer} is none"
            )
        return kept


@dataclass(frozen=True)
class HfVisionConfig(TowerConfig):
    """``vision: {name: hf, path: ...}``: a vision encoder of Transformers, from its folder."""

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        yield from folder_files(self.folder(cache_root), key("path"))

    def folder(self, cache_root: str) -> Path:
        """The folder of Transformers."""
        return cache_path(self.path, cache_root)

    def transform(self, cache_root: str, key: Key) -> ImageTransform:
        from lavis.models.vision.transforms import of_folder

        return of_folder(self.folder(cache_root), self.image_size, key("path"))


@dataclass(frozen=True)
class TimmConfig(TowerConfig):
    """``vision: {name: timm, model: ..., path: ...}``: a model of timm, from a weight file."""

    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigError("model is missing: what timm calls it, e.g. vit_base_patch16_224")

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        if not self.path.endswith(".safetensors"):
            raise ConfigError(f"{key('path')}: {self.path} is no .safetensors file")
        yield require(cache_path(self.path, cache_root), key("path"), WeightsError)

    def transform(self, cache_root: str, key: Key) -> ImageTransform:
        from lavis.models.vision.transforms import of_timm

        return of_timm(self.model, self.image_size, key)


@dataclass(frozen=True)
class FusedConfig(VisionConfig):
    """``vision: {name: fused, towers: [...]}``: several encoders side by side.

    Their features are concatenated (Karamcheti et al. 2024, "Prismatic VLMs", section 4.2). Images
    come as the first one takes them; the others' normalization is made of it.
    """

    towers: tuple[VisionConfig, ...] = ()

    def __post_init__(self) -> None:
        if len(self.towers) < 2:
            raise ConfigError(f"towers must name two encoders or more, not {len(self.towers)}")
        if self.image_size is not None:
            raise ConfigError("image_size is each tower's: write it there")
        if len({getattr(t, "precision", t.name) for t in self.towers}) > 1:
            raise ConfigError("towers must compute in the same precision")

    def each(self, key: Key) -> Iterator[tuple[VisionConfig, Key]]:
        """The towers, and what the user calls their keys."""
        for number, tower in enumerate(self.towers):
            yield tower, partial(lambda n, name: key(f"towers[{n}].{name}"), number)

    @property
    def random_parts(self) -> tuple[str, ...]:
        return tuple(part for tower in self.towers for part in tower.random_parts)

    def keeps_precision(self, device: torch.device) -> bool:
        return all(tower.keeps_precision(device) for tower in self.towers)

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        for tower, name in self.each(key):
            yield from tower.files(cache_root, name)

    def check_training(self, parts: tuple[str, ...]) -> None:
        for tower in self.towers:
            tower.check_training(())

    def transform(self, cache_root: str, key: Key) -> ImageTransform:
        from lavis.models.vision.transforms import normalization

        found = [tower.transform(cache_root, name) for tower, name in self.each(key)]
        if len(sizes := {t.image_size for t in found}) > 1:
            raise ConfigError(
                f"{key('towers')} read images of {' and '.join(map(str, sorted(sizes)))} pixels; "
                "give them the same image_size"
            )
        mean, std = normalization(found[0])
        return replace(found[0], mean=mean, std=std)
