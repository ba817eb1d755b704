"""The vision encoder: EVA-CLIP ViT-g/14 (Fang et al. 2022) without its final norm and head."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from lavis.common.errors import WeightsError
from lavis.models.vision.config import EvaQFormerConfig
from lavis.models.weights.files import load_weights, open_pth
from lavis.models.weights.original import VIT

logger = logging.getLogger(__name__)
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def build_vit(config: EvaQFormerConfig, device: torch.device, dtype: torch.dtype) -> Eva:
    """Build the encoder on ``device`` (``meta`` for weights that come from a file)."""
    sizes = config.vit_config
    vit = Eva(
        img_size=config.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=sizes.mlp_ratio,
        drop_path_rate=config.drop_path_rate,
        num_classes=0,
        global_pool="",
        use_abs_pos_emb=True,
        use_rot_pos_emb=False,
        use_post_transformer_norm=False,
        use_fc_norm=False,
        device=device,
        dtype=dtype,
    )
    if "vit" in config.from_scratch:
        _init_weights(vit, sizes.initializer_range)
    return vit


@torch.no_grad()
def _init_weights(vit: Eva, std: float) -> None:
    """Random matrices, and positions as 2-D sines, which a small encoder need not find first
    (as Beyer et al. 2022, "Better plain ViT baselines")."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
    grid = list(vit.patch_embed.grid_size)
    sines = build_sincos2d_pos_embed(grid, dim=vit.embed_dim, interleave_sin_cos=True)
    vit.pos_embed[0, -sines.shape[0] :] = sines.to(vit.pos_embed)


def load_vit(vit: Eva, path: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill an encoder on the meta device from the original's ``eva_vit_g.pth``.

    Position embeddings of another grid are interpolated; blocks past the model's depth are
    ignored, and their number is logged.

    Raises:
        WeightsError: the file is damaged or does not fit.
    """
    depth, source = len(vit.blocks), open_pth(path)
    blocks = {key: int(block[1]) for key in source if (block := _BLOCK.match(key))}
    extra = {key: number for key, number in blocks.items() if number >= depth}
    if count := len(set(extra.values())):
        logger.info("%s: %d blocks past depth %d are not used", path.name, count, depth)
    load_weights(
        vit,
        source,
        VIT,
        device=device,
        dtype=dtype,
        adapt=lambda key, t: (
            interpolate_pos_embed(t, vit.pos_embed.shape[1]) if key == "pos_embed" else t
        ),
        extra_dropped=extra.__contains__,
    )
    fill_constants(vit, device)


def fill_constants(model: nn.Module, device: torch.device) -> None:
    """Compute what no file holds of a timm model that was built on the meta device.

    Raises:
        WeightsError: a module does not say how.
    """
    for module in model.modules():
        buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if b.is_meta]
        for name, buffer in buffers:
            setattr(module, name, torch.empty_like(buffer, device=device))
        if not buffers:
            continue
        init: Any = getattr(module, "init_non_persistent_buffers", None)
        if init is None:
            raise WeightsError(f"{type(module).__name__} does not say how to compute its {name}")
        init()


def interpolate_pos_embed(pos_embed: Tensor, num_positions: int) -> Tensor:
    """Resize a square grid of position embeddings bicubically, keeping the class token's.

    Args:
        pos_embed: (1, 1 + G * G, C).
        num_positions: 1 + the wanted G * G.

    Raises:
        WeightsError: one of the grids is not square.
    """
    if pos_embed.ndim != 3 or pos_embed.shape[1] == num_positions:
        return pos_embed
    old, new = (round((n - 1) ** 0.5) for n in (pos_embed.shape[1], num_positions))
    if old**2 != pos_embed.shape[1] - 1 or new**2 != num_positions - 1:
        raise WeightsError(
            f"pos_embed of {pos_embed.shape[1]} positions cannot be resized to {num_positions}: "
            "not a class token and a square grid"
        )
    logger.info("position embeddings interpolated from %d x %d to %d x %d", old, old, new, new)
    resized: Tensor = resample_abs_pos_embed(pos_embed, [new, new], antialias=False)
    return resized
