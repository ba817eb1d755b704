"""Tiny vision encoders with random weights, in files as a user downloads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
FOLDERS = ("siglip", "clip", "dinov2", "dinov2_with_registers", "dinov3_vit", "aimv2_vision_model")
TIMM = {"test_vit": 160, "test_convnext": 160}  # pixels of a side
LEADING = {"clip": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5, "test_vit": 1}


def randomize(model: nn.Module) -> nn.Module:
    """Weights by which everything matters."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def new_model(name: str) -> Any:
    """The stock class; of SigLIP and CLIP with its text side."""
    torch.manual_seed(0)
    if name in TIMM:
        return randomize(timm.create_model(name))
    options: dict[str, Any] = dict(SIZES)
    if name in ("siglip", "clip"):
        text = TEXT | {"projection_size": 32, "num_attention_heads": 2}
        options = {"text_config": text, "vision_config": SIZES}
    if "registers" in name or "dinov3" in name:
        options["num_register_tokens"] = 4
    if name.startswith("dinov2"):  # larger than what its image processor makes, as the real one
        options |= {"image_size": 42, "mlp_ratio": 2}
    if name.startswith("aimv2"):
        options["is_native"] = False
    return randomize(hf.AutoModel.from_config(hf.AutoConfig.for_model(name, **options)))


def new_processor(name: str) -> Any:
    """The stock image processor."""
    if name == "siglip":
        return hf.SiglipImageProcessor(size={"height": 28, "width": 28}, resample=2)
    if name == "clip":
        return hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    crop = {"height": 28, "width": 28}
    return hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop, **IMAGENET)


def save(name: str, home: Path) -> None:
    """``home/name`` or ``home/name.safetensors``."""
    model = new_model(name)
    if name in TIMM:
        save_file(model.state_dict(), home / f"{name}.safetensors")
        return
    model.save_pretrained(home / name)
    new_processor(name).save_pretrained(home / name)


@torch.no_grad()
def stock_features(name: str, pixels: Tensor, layer: int | None = None) -> Tensor:
    """(N, leading + Q, D), by the stock class alone; ``None`` is the layer that is declared."""
    model = new_model(name)
    if name in TIMM:
        features = model.forward_features(pixels)
        if layer not in (None, -1):
            at = [len(model.feature_info) + layer]
            features = model.forward_intermediates(pixels, indices=at, intermediates_only=True)[0]
        if features.ndim == 4:  # a grid
            features = features.flatten(2).transpose(1, 2)
        return features
    given = getattr(model, "vision_model", model)(pixels, output_hidden_states=True)
    layer = layer or (-2 if name == "clip" else None)
    return given.last_hidden_state if layer in (None, -1) else given.hidden_states[layer]


def yaml_of(name: str, home: Path, **keys: Any) -> dict[str, Any]:
    """Its block in a YAML file."""
    if name == "siglip+dinov2":
        towers = [yaml_of(part, home, **keys) for part in name.split("+")]
        return {"name": "fused", "towers": towers}
    if name in TIMM:
        path, kind = str(home / f"{name}.safetensors"), {"name": "timm", "model": name}
    else:
        path, kind = str(home / name), {"name": "hf"}
    return kind | {"path": path, "precision": "fp32"} | keys
