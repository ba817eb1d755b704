"""What does not fit is refused, by name, before weights are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavis.common.config import load_config
from lavis.common.errors import ConfigError, LavisError, WeightsError
from lavis.common.registry import CONNECTORS, TASKS, VISION_ENCODERS
from lavis.common.schema import ModelConfig
from lavis.common.typed import parse
from lavis.models.config import MergeConfig, PoolConfig
from lavis.models.connectors import squares
from lavis.models.vision.config import VisionConfig
from tests.models.towers import CPU, encoder_of, fill, model_of, options, yaml_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision encoders, language models, pictures, and ``run.yaml`` that names no model."""
    folder = tmp_path_factory.mktemp("towers")
    fill(folder)
    return folder


def refusal(home: Path, block: dict[str, Any], *given: str, **model: Any) -> str:
    """What a user is told before weights are read, of a vision encoder's block."""
    content = model_of(home, "siglip") | {"vision": block} | model
    config = load_config(home / "run.yaml", [f"model={json.dumps(content)}", *given])
    with pytest.raises(LavisError) as caught:
        TASKS.get(config.run.task)(config).check_paths()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tower", "keys", "message"),
    [
        ("nowhere", {}, "model.vision.path: no folder"),
        ("siglip", {"layer": 4}, "model.vision.layer: .* has 3 blocks, of which 4 is none"),
        ("siglip", {"layer": -4}, "model.vision.layer: .* has 3 blocks, of which -4 is none"),
        ("siglip", {"class_token": "keep"}, "model.vision.class_token: keep: siglip_vision_model"),
        ("aimv2_vision_model", {"image_size": 42}, "model.vision.image_size: .* reads 28 pixels"),
        ("test_vit", {"image_size": 64}, "model.vision.image_size is 64, but test_vit reads 160"),
        ("test_vit", {"model": "test_vitt"}, "model.vision.model: timm .*; did you mean 'test_vi"),
        ("test_vit", {"model": "test_resnet"}, "model.vision.model: test_resnet gives no features"),
        ("test_vit", {"path": "x.pth"}, "model.vision.path: x.pth is no .safetensors file"),
    ],
)
def test_what_cannot_be(home: Path, tower: str, keys: dict[str, Any], message: str) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(pattern, refusal(home, yaml_of(tower, home) | keys))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen3", "holds qwen3, no vision encoder that is known here (siglip_vision_model, "),
        ("siglip2", "; of SigLIP2, those of fixed resolution)"),
        ("own", "model_type 'own' is unknown to Transformers"),
    ],
)
def test_another_family(home: Path, tmp_path: Path, kind: str, message: str) -> None:
    shutil.copytree(home / "siglip", tmp_path / "siglip")
    (tmp_path / "siglip" / "config.json").write_text(f'{{"model_type": "{kind}"}}', "utf-8")
    assert message in refusal(home, yaml_of("siglip", tmp_path))


def test_towers_that_do_not_fit(home: Path) -> None:
    block = yaml_of("siglip+dinov2", home)
    first, second = block["towers"]

    def told(**keys: Any) -> str:
        return refusal(home, {"name": "fused", "towers": [first, second | keys]})

    assert "model.vision.towers read images of 28 and 42 pixels" in told(image_size=42)
    assert "numbers of features (16, 17)" in told(class_token="keep")
    assert "model.vision.towers[1]: model.vision.layer: " in told(layer=9)
    assert "model.vision.towers[1].path: no folder" in told(path="nowhere")
    for wrong, message in (
        ({"towers": [first]}, "model.vision.towers must name two encoders or more, not 1"),
        ({"image_size": 28}, "model.vision.image_size is each tower's"),
        ({"towers": [first, second | {"precision": "bf16"}]}, "compute in the same precision"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse(ModelConfig, model_of(home, "siglip") | {"vision": block | wrong}, "model", str)


def test_a_connector_that_needs_a_grid(home: Path) -> None:
    tokens, keep = CONNECTORS.get("merge").tokens, {"class_token": "keep"}
    told = refusal(home, yaml_of("clip", home) | keep, connector={"name": "pool"})
    assert "model.connector.name: pool needs a square grid, and the vision encoder gives 17" in told
    told = refusal(home, yaml_of("siglip", home), connector={"name": "merge", "size": 3})
    assert "model.connector.size is 3, which does not divide the grid of 4 x 4" in told
    assert told.endswith("take one of 2, 4")
    assert tokens(MergeConfig("merge", size=3), 81) == 9


def test_squares_are_neighbours() -> None:
    """Row by row, and so within each square."""
    grid = torch.arange(16).view(1, 16, 1)
    wanted = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert squares(grid, 2)[0, :, :, 0].tolist() == wanted
    pool = CONNECTORS.get("pool")(PoolConfig("pool", depth=1), 1, 1)
    torch.nn.init.ones_(pool[0].weight)
    torch.nn.init.zeros_(pool[0].bias)
    assert pool(grid.float())[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_files_that_do_not_fit(home: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[dict[str, Tensor]], None]) -> str:
        folder = tmp_path / name
        shutil.copytree(home / "siglip", folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError) as caught:
            encoder_of(yaml_of("siglip", tmp_path) | {"path": str(folder)})
        return str(caught.value)

    layer = "vision_model.encoder.layers.1.mlp.fc1.bias"
    extra = {"vision_model.encoder.extra.weight": torch.ones(2)}
    assert "1 missing: encoder.layers.1.mlp.fc1.bias" in changed("a", lambda w: w.pop(layer))  # type: ignore[arg-type]
    assert "1 not part of the model" in changed("b", lambda w: w.update(extra))
    assert "does not fit" in changed("c", lambda w: w.update({layer: torch.ones(3)}))
    file = tmp_path / "test_vit.safetensors"
    weights = load_file(home / file.name)
    weights.pop("blocks.0.attn.qkv.weight")
    save_file(weights, file)
    with pytest.raises(WeightsError, match=r"1 missing: blocks\.0\.attn\.qkv\.weight"):
        encoder_of(yaml_of("test_vit", tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_factor": 1.0}, "pixels must be rescaled by 1/255"),
        ({"size": {"height": 28, "width": 32}}, "no squares of one size"),
        ({"resample": 5}, "resample"),
        (None, "has no preprocessor_config.json"),
    ],
)
def test_an_image_processor_that_is_none(
    home: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    folder = tmp_path / "siglip"
    shutil.copytree(home / "siglip", folder)
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    if change is not None:
        file.write_text(json.dumps(content | change), encoding="utf-8")
    told = refusal(home, yaml_of("siglip", tmp_path))
    assert message in told and str(folder) in told


def test_images_of_another_kind(home: Path) -> None:
    block, key = yaml_of("siglip", home), "preprocess.vis_processor.train"
    told = refusal(home, block, f"{key}.image_size=64")
    assert f"{key}.image_size is 64, but model.vision.image_size is 28; they must be equal" in told
    told = refusal(home, block, f"{key}.mean=[0.1, 0.2, 0.3]")
    assert (
        f"{key}.mean is [0.1, 0.2, 0.3], but the vision encoder's mean is [0.5, 0.5, 0.5]" in told
    )
    told = refusal(home, block, f"{key}.interpolation=bicubic")
    assert "but the vision encoder's interpolation is bilinear; remove the key" in told
    config = load_config(home / "run.yaml", options(home, "siglip"))
    (part,) = TASKS.get(config.run.task)(config).build_split("train", train=True)
    chosen = part.vis_processor.config
    assert (chosen.image_size, chosen.mean, chosen.interpolation) == (28, (0.5,) * 3, "bilinear")


def test_short_weights_do_not_learn(home: Path) -> None:
    for precision in ("fp16", "bf16"):
        for tower in ("siglip", "siglip+dinov2"):
            model = model_of(home, tower) | {"train": {"vision": 1e-4}}
            model["vision"] = yaml_of(tower, home, precision=precision)
            with pytest.raises(ConfigError, match=r"train\.vision needs vision\.precision: fp32"):
                parse(ModelConfig, model, "model", str)


def test_features_are_kept_apart_by_what_makes_them(home: Path) -> None:
    blocks = [yaml_of("siglip", home), yaml_of("clip", home), yaml_of("siglip+dinov2", home)]
    blocks += [
        yaml_of("siglip", home, **k)
        for k in ({"layer": 2}, {"image_size": 42}, {"precision": "bf16"})
    ]
    blocks += [yaml_of("clip", home, class_token="keep"), yaml_of("test_vit", home)]
    blocks += [yaml_of("test_vit", home, layer=-2), yaml_of("siglip+dinov2", home, layer=2)]
    prints = []
    for block in blocks:
        config: Any = parse(VisionConfig, block, "vision", str)
        prints.append(VISION_ENCODERS.get(config.name).fingerprint(config, "", CPU))
        assert VISION_ENCODERS.get(config.name).fingerprint(config, "", CPU) == prints[-1]
    assert len(set(prints)) == len(prints)
