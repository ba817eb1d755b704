"""Any vision encoder with any connector and any language model.

The oracle of features is the library's own class, and of images its own image processor.
"""

from __future__ import annotations

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor

from examples.toybox.world.__main__ import write_split
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError, LavisError, WeightsError
from lavis.common.registry import CONNECTORS, PROCESSORS, VISION_ENCODERS
from lavis.common.types import Batch, Sample
from lavis.datasets.collate import collate
from lavis.models import load_model_and_preprocess
from lavis.models.build import Assembly
from lavis.models.config import HfConfig
from lavis.models.language.parts import Hf
from lavis.models.vision.fused import renormalize
from lavis.models.vlm import VLM
from lavis.models.weights.trained import trainable_state
from lavis.processors.conversation import Turn
from tests.conftest import REPO
from tests.models import towers
from tests.models.towers import FOLDERS, LEADING, TIMM, stock_features, yaml_of
from tests.test_parts import LANGUAGES, loss, model_yaml, prepare, save_language, state

TOWERS = (*FOLDERS, *TIMM, "siglip+dinov2", "eva_qformer")
SPOKEN = ("llama", "qwen3")
CPU = torch.device("cpu")
GRIDS = {"test_vit": 10, "test_convnext": 5, "eva_qformer": 3}  # features of a side; others 4
SHRINK = {4: 2, 10: 2, 5: 5, 3: 3}
CONNECTORS_OF = ("linear", "mlp", "deep", "merge", "pool", "resampler")


def connector(name: str, side: int) -> dict[str, Any]:
    """Its block in a YAML file, for a grid of ``side`` x ``side`` features."""
    keys: dict[str, dict[str, Any]] = {
        "deep": {"name": "mlp", "depth": 3}, "merge": {"size": SHRINK[side]},
        "pool": {"size": SHRINK[side], "depth": 1}, "resampler": {"queries": 7, "depth": 1},
    }  # fmt: skip
    return {"name": name} | keys.get(name, {})


def positions(name: str, side: int) -> int:
    """What an image takes in the text."""
    shrunk = {"merge": (side // SHRINK[side]) ** 2, "pool": (side // SHRINK[side]) ** 2}
    return (shrunk | {"resampler": 7}).get(name, side**2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision encoders, language models, pictures, and ``run.yaml``."""
    home = tmp_path_factory.mktemp("towers")
    for name in (*FOLDERS, *TIMM):
        towers.save(name, home)
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
    content["model"] = model_yaml(home / "llama")["model"]
    del content["model"]["vision"], content["model"]["connector"]
    (home / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return home


def options(home: Path, tower: str, connects: str = "linear", spoken: str = "llama") -> list[str]:
    """What makes another model of ``run.yaml``."""
    vision = model_yaml(home)["model"]["vision"]
    vision = vision if tower == "eva_qformer" else yaml_of(tower, home)
    given = {"connector": connector(connects, GRIDS.get(tower, 4)), "vision": vision}
    listed = [f"model.{part}={json.dumps(block)}" for part, block in given.items()]
    return [*listed, f"model.language.path={home / spoken}"]


@pytest.fixture(scope="module")
def parts(home: Path) -> Any:
    """Vision encoders and language models are loaded and proved once for all combinations."""
    vision, language = Assembly.build_vision, Hf.load
    encoders: dict[str, Any] = {}
    models: dict[str, Any] = {}

    def build_vision(config: Any, **places: Any) -> Any:
        key = str(config.vision)
        encoders[key] = encoders.get(key) or vision(config, **places)
        return encoders[key].requires_grad_(False)

    def load(self: Hf, device: torch.device, *, mapped: bool = False) -> Any:
        key = str(self.path)
        models[key] = models.get(key) or language(self, device, mapped=mapped)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assembly, "build_vision", build_vision)
        patch.setattr(Hf, "load", load)
        yield


def build(home: Path, *given: str, vision: bool = True) -> VLM:
    config = load_config(home / "run.yaml", given)
    torch.manual_seed(5)
    return Assembly.from_config(config.model, cache_root=str(REPO), vision=vision)  # type: ignore[arg-type]


def pictures(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def batch(model: VLM, pixels: Tensor | None, features: Tensor | None = None) -> Batch:
    """Two documents with an image each."""
    samples = []
    for i, answer in enumerate(("A cat.", "Two: a red ball and a blue box.")):
        turns = [Turn("user", "<ImageHere> What is it?"), Turn("assistant", answer)]
        ids = model.encoder.encode(turns)
        image: dict[str, Any] = {"pixel_values": torch.empty(0, 3, 1, 1)}
        if features is not None:
            image["query_features"] = features[i : i + 1]
        elif pixels is not None:
            image["pixel_values"] = pixels[i : i + 1]
        samples.append(
            Sample(str(i), torch.tensor(ids.input_ids), torch.tensor(ids.labels), **image)
        )
    return collate(samples)


# --- every combination ----------------------------------------------------------------------


@pytest.mark.parametrize("connects", CONNECTORS_OF)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.usefixtures("parts")
def test_every_combination(home: Path, tmp_path: Path, tower: str, connects: str) -> None:
    for spoken in SPOKEN:
        given = options(home, tower, connects, spoken)
        model = build(home, *given).train()
        wanted = positions(connects, GRIDS.get(tower, 4))
        pixels = pictures(model.image_size)
        features = model.encode_query(pixels)
        assert features.shape == (2, *model.features)
        assert model.encoder.num_query_token == wanted
        assert model.encode_image(pixels).shape == (2, wanted, model.language.width)

        seen = batch(model, pixels)
        output = model(seen)
        (output.loss_sum / output.num_tokens).backward()
        trained = model.trainable_parameters()
        assert {n.split(".")[0] for n in trained} == {"connector"}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
        torch.optim.SGD(trained.values(), 1e-3 / max(p.grad.norm() for p in trained.values())).step()  # type: ignore[union-attr]
        after = model(seen).loss_sum.item()
        assert after < output.loss_sum.item()

        torch.save({"model": trainable_state(model)}, tmp_path / f"{spoken}.pth")
        cached = build(home, *given, vision=False).train()
        assert cached.vision is None
        cached.load_checkpoint(tmp_path / f"{spoken}.pth")
        kept = batch(cached, None, features)
        assert cached(kept).loss_sum.item() == pytest.approx(after, rel=1e-6)
