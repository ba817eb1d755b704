"""A vision encoder of Transformers, from its folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from lavis.common.errors import ConfigError
from lavis.common.hashing import file_digest, settings_digest
from lavis.models.vision.config import KEY, HfVisionConfig
from lavis.models.vision.tower import Tower, compute_dtype, pick_tokens
from lavis.models.weights.files import WeightFile, open_shards
from lavis.models.weights.stock import build_stock, read_config


class _Family(NamedTuple):
    norm: str  # the module after the last block
    layer: int = -1
    class_token: bool = True
    sizes: str = "any"  # image sizes: any; resized: when asked to; own: only what it was made for


FAMILIES = {
    "siglip_vision_model": _Family("post_layernorm", class_token=False, sizes="resized"),
    # The last block is trained for the class token alone (Liu et al. 2023, LLaVA, section 4.1).
    "clip_vision_model": _Family("post_layernorm", layer=-2, sizes="resized"),
    "dinov2": _Family("layernorm"),
    "dinov2_with_registers": _Family("layernorm"),
    "dinov3_vit": _Family("norm"),
    "aimv2_vision_model": _Family("rms_norm", class_token=False, sizes="own"),
}
"""What Transformers' classes do not say of themselves, by ``model_type``."""

_TEXT = re.compile(r"text_model\.|(visual|text)_projection\.|logit_(scale|bias)$")
_IN_LLAVA = re.compile(r"(model\.)?vision_tower\.")
_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


@dataclass(frozen=True)
class _Spec:
    """What a folder's small files say.

    Attributes:
        sizes: of the part that is computed.
        depth: blocks that the files hold.
        leading: tokens before the patches.
        resize: whether position embeddings are interpolated to another image size.
        last_normed: whether the last block's output passes the final norm.
    """

    family: _Family
    sizes: Any
    depth: int
    image_size: int
    leading: int
    resize: bool
    last_normed: bool = True

    @property
    def normed(self) -> bool:
        """Whether the final norm is passed."""
        return self.last_normed and bool(self.sizes.num_hidden_layers == self.depth)

    @property
    def patches(self) -> int:
        """Of an image; what is left over at its edges is not seen."""
        return int(self.image_size // self.sizes.patch_size) ** 2


def read_spec(config: HfVisionConfig, cache_root: str) -> _Spec:
    """Read a folder's small files.

    Raises:
        WeightsError: one is missing or damaged.
        ConfigError: another family, or a setting that this one does not have.
    """
    folder = config.folder(cache_root)
    whole = read_config(folder)
    sizes: Any = copy.deepcopy(getattr(whole, "vision_config", None) or whole)
    family = FAMILIES.get(sizes.model_type)
    if family is None:
        fixed = "; of SigLIP2, those of fixed resolution" * whole.model_type.startswith("siglip2")
        raise ConfigError(
            f"model.vision.path: {folder} holds {whole.model_type}, no vision encoder that is "
            f"known here ({', '.join(FAMILIES)}{fixed})"
        )
    if config.keeps_class and not family.class_token:
        raise ConfigError(f"model.vision.class_token: keep: {sizes.model_type} has none")
    image_size = config.transform(cache_root, KEY).image_size
    own = family.sizes == "any" or getattr(sizes, "is_native", False)
    resize = image_size != sizes.image_size and not own
    if resize and family.sizes == "own":
        raise ConfigError(
            f"model.vision.image_size: {folder} reads {sizes.image_size} pixels, not {image_size}"
        )
    depth, default, last_normed = sizes.num_hidden_layers, family.layer, True
    if hasattr(whole, "vision_feature_layer"):  # LLaVA's, which takes what stands before the norm
        default = _layer_of_llava(whole, family, config)
        last_normed = config.layer is not None or bool(
            getattr(sizes, "tie_last_hidden_states", False)
        )
    kept = config.blocks_of(depth) if config.layer is not None else depth + 1 + default
    sizes.num_hidden_layers = kept
    sizes.vision_use_head = sizes.use_head = False  # what pools patches to one vector
    leading = family.class_token + getattr(sizes, "num_register_tokens", 0)
    return _Spec(family, sizes, depth, image_size, leading, resize, last_normed)


def _layer_of_llava(whole: Any, family: _Family, config: HfVisionConfig) -> int:
    """The layer that a folder of LLaVA reads, counted from the end."""
    layer, strategy = whole.vision_feature_layer, whole.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise ConfigError(
            f"model.vision.path: {config.path} reads the layers {layer} side by side; name one "
            "tower a layer (vision: {name: fused})"
        )
    if family.class_token and config.keeps_class != (strategy == "full"):
        raise ConfigError(
            f"model.vision.class_token: {config.class_token}, but {config.path} was made with "
            f"vision_feature_select_strategy {strategy!r}: set "
            f"{'keep' if strategy == 'full' else 'drop'}"
        )
    return layer if layer < 0 else layer - whole.vision_config.num_hidden_layers - 1


def vision_part(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The vision encoder's weights in a folder of LLaVA, by their own names; of others, all."""
    names = {key[m.end() :]: key for key in weights if (m := _IN_LLAVA.match(key))}
    if not names:
        return weights
    return WeightFile("", {name: partial(weights.__getitem__, key) for name, key in names.items()})


class HfVision(Tower):
    """A vision encoder of Transformers, computed by its own class up to one of its blocks."""

    config: HfVisionConfig

    def __init__(
        self,
        config: HfVisionConfig,
        cache_root: str,
        device: torch.device,
        *,
        home: torch.device | None = None,
    ) -> None:
        """Build it and load its weights.

        Raises:
            WeightsError, ConfigError: as :func:`read_spec`; or weights that do not fit.
        """
        self.spec = spec = read_spec(config, cache_root)
        super().__init__(config, spec.image_size)
        self.tokens, self.width = self.shape(config, cache_root)
        folder = config.folder(cache_root)
        kind, dtype = MODEL_MAPPING[type(spec.sizes)], compute_dtype(config.precision, device)
        model: Any
        if device.type == "meta":
            with device:
                model = kind(spec.sizes).to(dtype)
        else:
            stored = vision_part(open_shards(folder)).items()
            weights = {name: tensor for name, tensor in stored if self._uses(name)}
            model = build_stock(kind, spec.sizes, folder, state_dict=weights, dtype=dtype)
        if not spec.normed or spec.sizes.model_type == "clip_vision_model":
            setattr(model, spec.family.norm, nn.Identity())  # CLIP's is the class token's alone
        if getattr(model.embeddings, "mask_token", None) is not None:
            model.embeddings.mask_token = None  # of its pretraining
        self.visual_encoder = model.to(home or device)

    def _uses(self, name: str) -> bool:
        """Whether a name in the files is of the part that is computed."""
        block = _BLOCK.search(name)
        if block is not None and int(block[1]) >= self.spec.sizes.num_hidden_layers:
            return False
        inner = name.removeprefix("vision_model.")
        return not _TEXT.match(name) and not inner.startswith(("head.", "embeddings.position_ids"))

    def encode(self, pixels: Tensor) -> Tensor:
        resize = {"interpolate_pos_encoding": True} if self.spec.resize else {}
        weight = next(self.visual_encoder.parameters())
        tokens = self.visual_encoder(pixels.to(weight.dtype), **resize).last_hidden_state
        return pick_tokens(tokens, self.spec.leading, keep=self.config.keeps_class)

    def blocks(self) -> Iterable[nn.Module]:
        layers = next(m for m in self.visual_encoder.modules() if isinstance(m, nn.ModuleList))
        return list(layers)

    def flops(self, cost: Callable[[nn.Module], float]) -> float:
        return (self.spec.patches + self.spec.leading) * cost(self.visual_encoder)

    @staticmethod
    def shape(config: HfVisionConfig, cache_root: str) -> tuple[int, int]:
        spec = read_spec(config, cache_root)
        return spec.patches + config.keeps_class, int(spec.sizes.hidden_size)

    @staticmethod
    def fingerprint(config: HfVisionConfig, cache_root: str, device: torch.device) -> str:
        spec, folder = read_spec(config, cache_root), config.folder(cache_root)
        files = [folder / "config.json", *config.files(cache_root, str)]
        parts = [file_digest(path) for path in files]
        parts += [
            str(compute_dtype(config.precision, device)), config.class_token,
            str(spec.sizes.num_hidden_layers), str(spec.image_size),
        ]  # fmt: skip
        if spec.sizes.num_hidden_layers == spec.depth and not spec.normed:
            parts.append("before the final norm")
        return settings_digest(parts)
