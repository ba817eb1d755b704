"""Tiny vision encoders with random weights, in files as a user downloads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.toybox.world.__main__ import write_split
from lavis.common.registry import VISION_ENCODERS
from lavis.common.typed import parse
from lavis.models.vision.config import VisionConfig
from tests.conftest import REPO
from tests.test_parts import LANGUAGES, model_yaml, save_language

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
FOLDERS = ("siglip", "clip", "dinov2", "dinov2_with_registers", "dinov3_vit", "aimv2_vision_model")
TIMM = {"test_vit": 160, "test_convnext": 160}  # pixels of a side
LEADING = {"clip": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5, "test_vit": 1}
TOWERS = (*FOLDERS, *TIMM, "siglip+dinov2", "eva_qformer")
SPOKEN = ("llama", "qwen3")
CPU = torch.device("cpu")
GRIDS = {"test_vit": 10, "test_convnext": 5, "eva_qformer": 3}  # features of a side; others 4
SHRINK = {4: 2, 10: 2, 5: 5, 3: 3}
CONNECTORS_OF = ("linear", "mlp", "deep", "merge", "pool", "resampler")


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


def connector(name: str, side: int) -> dict[str, Any]:
    """Its block in a YAML file, for a grid of ``side`` x ``side`` features."""
    keys: dict[str, dict[str, Any]] = {
        "deep": {"name": "mlp", "depth": 3}, "merge": {"size": SHRINK[side]},
        "pool": {"size": SHRINK[side], "depth": 1}, "resampler": {"queries": 7, "depth": 1},
    }  # fmt: skip
    return {"name": name} | keys.get(name, {})


def model_of(home: Path, tower: str, connects: str = "linear", spoken: str = "llama") -> Any:
    """The section ``model`` of a YAML file."""
    vision = model_yaml(home)["model"]["vision"]
    return {
        "arch": "vlm",
        "vision": vision if tower == "eva_qformer" else yaml_of(tower, home),
        "connector": connector(connects, GRIDS.get(tower, 4)),
        "language": {"name": "hf", "path": str(home / spoken)},
        "label_mask": "assistant_only",
    }


def options(home: Path, *names: str) -> list[str]:
    """The same for ``run.yaml``, which names no model."""
    return [f"model={json.dumps(model_of(home, *names))}"]


def fill(home: Path) -> None:
    """Vision encoders, language models, pictures, and ``run.yaml`` that names no model."""
    for name in (*FOLDERS, *TIMM):
        save(name, home)
    for name in SPOKEN:
        template, options = LANGUAGES[name]
        save_language(home / name, name, template, **options)
    write_split(home, "train", 6, 0, languages=("en",))
    info = {
        "annotations": {"train": {"storage": str(home / "train.json")}},
        "images": {"storage": str(home / "image")},
    }
    processor = {"name": "blip_image_eval"}
    content: dict[str, Any] = {
        "env": {"cache_root": str(REPO)},
        "preprocess": {"vis_processor": {"train": processor, "eval": processor}},
        "datasets": {"toybox": {"builder": "instruction", "build_info": info}},
        "run": {
            "batch_size_train": 3, "init_lr": 1e-3, "max_epoch": 2, "device": "cpu", "log_freq": 1,
            "lr_sched": "constant_lr", "output_dir": str(home / "out"), "save_every_steps": 1,
        },
    }  # fmt: skip
    (home / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def encoder_of(block: dict[str, Any]) -> Any:
    """A vision encoder of its YAML block, by itself."""
    config: Any = parse(VisionConfig, block, "model.vision", str)
    kind = VISION_ENCODERS.get(config.name)
    encoder = kind(config, "", CPU)
    assert kind.shape(config, "") == (encoder.tokens, encoder.width)
    return encoder.requires_grad_(False).eval()


def pictures(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))
