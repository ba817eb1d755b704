"""EVA ViT-g, a LayerNorm and the Q-Former, under the original's names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from lavis.common.hashing import file_digest, settings_digest
from lavis.models.vision.config import EvaQFormerConfig
from lavis.models.vision.eva import build_vit, fill_constants, interpolate_pos_embed, load_vit
from lavis.models.vision.qformer import build_qformer, qformer_config
from lavis.models.vision.tower import compute_dtype, learns, require_images
from lavis.models.weights.files import load_weights, open_pth, open_shards
from lavis.models.weights.original import BLIP2, QFORMER

_VIT_NORM_EPS = 1e-5
_STOCK_NORM_EPS = 1e-6  # of BLIP-2's class in Transformers
_STOCK_VIT = "vision_model.embeddings.", "vision_model.encoder."
_QFORMER_SETTINGS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "layer_norm_eps", "cross_attention_frequency", "encoder_hidden_size",
)  # fmt: skip


class EvaQFormer(nn.Module):
    """Images -> Q-Former output.

    Attributes:
        width: D, of a feature.
        tokens: Q, features of an image.
        image_size: pixels of a side that it reads.
    """

    def __init__(
        self,
        config: EvaQFormerConfig,
        cache_root: str,
        device: torch.device,
        *,
        home: torch.device | None = None,
    ) -> None:
        """Build it and load its weights, each tensor straight to its final place.

        Args:
            device: where it computes; on ``meta`` no weights are read.
            home: where its weights are until then, if they are going to be sharded.

        Raises:
            WeightsError: a file is missing, damaged, or unfit.
        """
        super().__init__()
        self.config = c = config
        qformer, meta = resolve_qformer(c, cache_root), torch.device("meta")
        self.width, self.tokens = int(qformer.hidden_size), c.num_query_token
        self.image_size = c.image_size
        dtype, device = vit_dtype(c, device), home or device
        vit_device = device if "vit" in c.from_scratch else meta
        self.visual_encoder = build_vit(c, vit_device, dtype)
        with device if "qformer" in c.from_scratch else meta:
            eps = _VIT_NORM_EPS if c.path is None else _STOCK_NORM_EPS
            self.ln_vision = nn.LayerNorm(c.vit_config.embed_dim, eps=eps)
            self.Qformer = build_qformer(qformer)
            self.query_tokens = nn.Parameter(
                torch.randn(1, c.num_query_token, qformer.hidden_size) * qformer.initializer_range
            )
        if device.type == "meta":  # without weights
            return
        if c.path is not None:
            self._load_folder(c.file("path", cache_root), device, dtype)
            return
        if "vit" not in c.from_scratch:
            path = c.file("vit_weights", cache_root)
            load_vit(self.visual_encoder, path, device=device, dtype=dtype)
        if "qformer" not in c.from_scratch:
            load_weights(
                self,
                open_pth(c.file("pretrained", cache_root)),
                QFORMER,
                device=device,
                dtype=torch.float32,
                select=_is_qformer,
            )

    def _load_folder(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Fill it from a folder of BLIP-2 of Transformers; the ViT's numbers become ``dtype``.

        A bias of the keys, which such a ViT may have learned, is left out: it moves all scores of
        a query alike, which the softmax takes back.
        """

        def adapt(key: str, tensor: Tensor) -> Tensor:
            if not key.endswith("position_embedding"):
                return tensor
            return interpolate_pos_embed(tensor, self.visual_encoder.pos_embed.shape[1])

        stored = open_shards(folder)
        vit = {key for key in stored if key.startswith(_STOCK_VIT)}
        for names, select, kind in (
            (vit, _is_vit, dtype),
            (stored.keys() - vit, _is_qformer, torch.float32),
        ):
            load_weights(
                self, stored.only(names), BLIP2, device=device, dtype=kind, select=select,
                adapt=adapt,
            )  # fmt: skip
        fill_constants(self.visual_encoder, device)

    def learning(self, parts: Sequence[str]) -> Iterator[nn.Module | nn.Parameter]:
        """What learns if these of its parts do; all by default."""
        known: dict[str, list[nn.Module | nn.Parameter]] = {
            "vit": [self.visual_encoder],
            "pos_embed": [self.visual_encoder.pos_embed],
            "qformer": [self.ln_vision, self.Qformer],
            "queries": [self.query_tokens],
        }
        for part in parts or known:
            yield from known[part]

    @property
    def keeps_precision(self) -> bool:
        """Whether autocast leaves it alone: it is frozen, and in half precision already.

        It would be cast anew in every micro-batch, and give other features than in chat.
        """
        return not learns(self) and self.visual_encoder.pos_embed.dtype != torch.float32

    def blocks(self) -> Iterator[nn.Module]:
        """Parts of like size that are used one after the other."""
        yield from self.visual_encoder.blocks
        yield from self.Qformer.encoder.layer

    def flops(self, cost: Callable[[nn.Module], float]) -> float:
        """Floating-point operations of an image, given those of a module's use on one token."""
        patches = (self.image_size // self.config.vit_config.patch_size) ** 2 + 1
        return patches * cost(self.visual_encoder) + self.tokens * cost(self.Qformer)

    def encode_vit(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) normalized images -> (N, 1 + patches, width) of the last ViT block.

        Raises:
            DataError: images of another shape.
        """
        require_images(pixel_values, self.image_size)
        device_type = self.query_tokens.device.type
        amp = torch.is_autocast_enabled(device_type) and self.config.enable_autocast
        vit, weight = self.visual_encoder, self.visual_encoder.patch_embed.proj.weight
        # Without a backward pass nothing is kept, and recomputation would only cost.
        vit.grad_checkpointing = self.config.use_grad_checkpoint and learns(vit)
        with torch.autocast(device_type, enabled=amp):
            return vit(pixel_values.to(weight.device, weight.dtype))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, D), what the connector reads."""
        with contextlib.ExitStack() as stack:
            if not learns(self):
                stack.enter_context(torch.no_grad())
            if self.keeps_precision:
                device_type = self.query_tokens.device.type
                stack.enter_context(torch.autocast(device_type, enabled=False))
            image = self.encode_vit(pixel_values)
            image = self.ln_vision(image.to(self.ln_vision.weight.dtype))
            queries = self.query_tokens.expand(len(image), -1, -1)
            return self.Qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state

    @staticmethod
    def shape(config: EvaQFormerConfig, cache_root: str) -> tuple[int, int]:
        """(Q, D), the shape of an image's features."""
        return config.num_query_token, int(resolve_qformer(config, cache_root).hidden_size)

    @staticmethod
    def fingerprint(config: EvaQFormerConfig, cache_root: str, device: torch.device) -> str:
        """A hash of weights and settings, of all that :meth:`forward` depends on.

        Raises:
            WeightsError: a weight file is missing.
        """
        qformer = resolve_qformer(config, cache_root)
        if config.path is None:
            names = {"vit": "vit_weights", "qformer": "pretrained"}
            weights = {k: file_digest(config.file(name, cache_root)) for k, name in names.items()}
        else:
            weights = {p.name: file_digest(p) for p in config.files(cache_root, str)}
        parts = weights | {
            "vit_model": config.vit_model,
            "vit_config": dataclasses.asdict(config.vit_config),
            "image_size": config.image_size,
            "vit_dtype": str(vit_dtype(config, device)),
            "qformer_config": {name: getattr(qformer, name) for name in _QFORMER_SETTINGS},
            "queries": config.num_query_token,
        }
        return settings_digest(parts)


def _is_vit(name: str) -> bool:
    return name.startswith("visual_encoder.")


def _is_qformer(name: str) -> bool:
    return name.startswith(("query_tokens", "ln_vision.", "Qformer."))


def resolve_qformer(config: EvaQFormerConfig, cache_root: str) -> Blip2QFormerConfig:
    """The Q-Former's sizes."""
    return qformer_config(
        config.qformer_config, config.file("bert_config", cache_root), config.vit_config.embed_dim
    )


def vit_dtype(config: EvaQFormerConfig, device: torch.device) -> torch.dtype:
    """What the ViT computes in on a device."""
    return compute_dtype(config.vit_precision, device, "vit_precision")
