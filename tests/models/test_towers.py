"""Any vision encoder with any connector and any language model.

The oracle of features is the library's own class, and of images its own image processor.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from examples.toybox.world.__main__ import write_split
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError, WeightsError
from lavis.common.images import open_image
from lavis.common.registry import CONNECTORS, LANGUAGE_MODELS, PROCESSORS, TASKS, VISION_ENCODERS
from lavis.common.schema import ModelConfig
from lavis.common.typed import parse
from lavis.common.types import Batch, Sample
from lavis.datasets.collate import collate
from lavis.models import load_model_and_preprocess
from lavis.models.build import Assembly
from lavis.models.config import HfConfig, MergeConfig, PoolConfig
from lavis.models.connectors import squares
from lavis.models.language.parts import Hf
from lavis.models.vision.config import VisionConfig
from lavis.models.vlm import VLM
from lavis.models.weights.agreement import check_settings
from lavis.models.weights.trained import trainable_state
from lavis.processors.conversation import Turn
from tests.conftest import REPO
from tests.models import towers
from tests.models.towers import (
    FOLDERS,
    IMAGENET,
    LEADING,
    TIMM,
    new_model,
    stock_features,
    yaml_of,
)
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
    (home / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return home


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


@pytest.fixture(scope="module")
def parts() -> Any:
    """Vision encoders and language models are read and proved once for all combinations."""
    build_vision, load, kept = Assembly.build_vision, Hf.load, {}

    def vision(config: Any, **places: Any) -> Any:
        key = str(config.vision)
        kept[key] = kept.get(key) or build_vision(config, **places)
        return kept[key].requires_grad_(False)

    def describe(config: HfConfig, *places: Any) -> Any:
        kept[config.path] = kept.get(config.path) or Hf(config, *places)
        return kept[config.path]

    def language(self: Hf, device: torch.device, *, mapped: bool = False) -> Any:
        kept[self] = kept.get(self) or load(self, device, mapped=mapped)
        return kept[self]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assembly, "build_vision", vision)
        patch.setattr(Hf, "load", language)
        patch.setitem(LANGUAGE_MODELS._targets, "hf", describe)
        yield


def build(model: dict[str, Any], *, vision: bool = True) -> VLM:
    config: Any = parse(ModelConfig, model, "model", str)
    torch.manual_seed(5)
    return Assembly.from_config(config, cache_root=str(REPO), vision=vision)


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
    """It learns, its features may be kept, and what it has learned is found again.

    Every encoder and every connector meets both language models.
    """
    spoken = SPOKEN[(TOWERS.index(tower) + CONNECTORS_OF.index(connects)) % 2]
    given, wanted = (
        model_of(home, tower, connects, spoken),
        positions(connects, GRIDS.get(tower, 4)),
    )
    model = build(given).train()
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
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    assert len(gradients) == len(trained)
    assert all(g.abs().sum() > 0 for g in gradients)
    torch.optim.SGD(trained.values(), 1e-3 / max(g.norm().item() for g in gradients)).step()
    after = model(seen).loss_sum.item()
    assert after < output.loss_sum.item()

    torch.save({"model": trainable_state(model)}, tmp_path / "checkpoint.pth")
    cached = build(given, vision=False).train()
    assert cached.vision is None
    assert cached(batch(cached, None, features)).loss_sum.item() != pytest.approx(after, rel=1e-6)
    cached.load_checkpoint(tmp_path / "checkpoint.pth")
    assert cached(batch(cached, None, features)).loss_sum.item() == pytest.approx(after, rel=1e-6)


# --- features and images --------------------------------------------------------------------


def encoder_of(block: dict[str, Any]) -> Any:
    """A vision encoder of its YAML block, by itself."""
    config: Any = parse(VisionConfig, block, "model.vision", str)
    kind = VISION_ENCODERS.get(config.name)
    encoder = kind(config, "", CPU)
    assert kind.shape(config, "") == (encoder.tokens, encoder.width)
    return encoder.requires_grad_(False).eval()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layer", [None, -1, -2])
@pytest.mark.parametrize("name", (*FOLDERS, *TIMM))
def test_features_are_those_of_the_stock_class(
    home: Path, name: str, layer: int | None, keep: bool
) -> None:
    leading = LEADING.get(name, 0)
    block = yaml_of(name, home, layer=layer, class_token="keep" if keep else "drop")
    if keep and not leading:
        with pytest.raises(ConfigError, match=r"class_token: keep: .* has none"):
            encoder_of(block)
        return
    encoder = encoder_of(block)
    pixels = pictures(encoder.image_size)
    wanted = stock_features(name, pixels, layer)
    patches = wanted[:, -encoder.tokens + keep :]
    got = encoder(pixels)
    torch.testing.assert_close(got[:, keep:], patches, rtol=1e-6, atol=1e-6)
    if keep and wanted.shape[1] > patches.shape[1]:
        torch.testing.assert_close(got[:, 0], wanted[:, 0], rtol=1e-6, atol=1e-6)
    depth = {"test_vit": 6, "test_convnext": 4}.get(name, 3)
    assert len(list(encoder.blocks())) == depth - (
        layer == -2 or (layer is None and name == "clip")
    )
    assert encoder.flops(lambda module: 1.0) >= encoder.tokens


def test_two_side_by_side(home: Path) -> None:
    """Each sees what its own image processor would have made of the picture."""
    encoder = encoder_of(yaml_of("siglip+dinov2", home))
    levels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    own = tuple(IMAGENET["image_mean"]), tuple(IMAGENET["image_std"])
    first = (levels - 0.5) / 0.5
    second = torch.stack([(levels[:, i] - own[0][i]) / own[1][i] for i in range(3)], 1)
    wanted = [stock_features("siglip", first), stock_features("dinov2", second)[:, 1:]]
    torch.testing.assert_close(encoder(first), torch.cat(wanted, -1), rtol=1e-5, atol=1e-5)
    assert len(list(encoder.blocks())) == 6


@pytest.mark.parametrize("side", [28, 50])
@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_pixels_are_those_of_the_stock_image_processor(home: Path, name: str, side: int) -> None:
    config = load_config(home / "run.yaml", options(home, name))
    chosen = config.fit("preprocess.vis_processor.eval", config.preprocess.vis_processor.eval)
    assert chosen is not None
    noise = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    ours = PROCESSORS.get(chosen.name)(chosen)(picture)
    for backend in ("pil", "torchvision"):
        stock = AutoImageProcessor.from_pretrained(home / name, backend=backend)
        theirs = stock(picture, return_tensors="pt")["pixel_values"][0]
        # torchvision resizes tensors, not Pillow's pictures: rounding differs by a level
        limit = 1e-6 if side == 28 or backend == "pil" else 1.1 / 255 / 0.26
        assert (ours - theirs).abs().max() <= limit


def test_another_image_size(home: Path) -> None:
    for name in ("siglip", "clip", "dinov2", "dinov3_vit"):
        encoder = encoder_of(yaml_of(name, home, image_size=42))
        assert encoder(pictures(42)).shape[1] == encoder.tokens == 36
    model = new_model("siglip").vision_model
    wanted = model(pictures(42), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(
        encoder_of(yaml_of("siglip", home, image_size=42))(pictures(42)), wanted
    )
    assert encoder_of(yaml_of("test_convnext", home, image_size=64)).tokens == 4
    with pytest.raises(DataError, match=r"images have the shape .* not \(N, 3, 28, 28\)"):
        encoder_of(yaml_of("siglip", home))(pictures(42))


def test_half_precision(home: Path) -> None:
    """A frozen one in half precision is left alone by autocast; fp16 is fp32 on a CPU."""
    pixels = pictures(28)
    exact = encoder_of(yaml_of("siglip", home))
    half = encoder_of(yaml_of("siglip", home, precision="bf16"))
    widened = encoder_of(yaml_of("siglip", home, precision="fp16"))
    alone, wanted = half(pixels), exact(pixels)
    assert alone.dtype == torch.bfloat16
    assert (alone.float() - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(widened(pixels), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(pixels), alone)
        assert not torch.equal(exact(pixels).float(), wanted)
    block = yaml_of("siglip", home, enable_autocast=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder_of(block)(pixels), wanted)


# --- whole runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("siglip", "merge", "llama"), ("siglip+dinov2", "resampler", "qwen3")]
)
def test_a_run_with_and_without_kept_features(
    home: Path, tmp_path: Path, names: tuple[str, str, str]
) -> None:
    given = [*options(home, *names), f"run.output_dir={tmp_path}"]
    cache_in = "run.feature_cache={enabled: true, dtype: fp32, dir: %s}"
    plain = prepare(home, *given, job="plain")
    kept = prepare(home, *given, cache_in % (tmp_path / "features"), job="kept")
    kept.model.load_state_dict(plain.model.state_dict(), strict=False)
    assert kept.model.vision is None
    assert loss(kept) == pytest.approx(loss(plain), rel=1e-6)

    path = plain.train()
    step = plain.folder / "checkpoint_step_3.pth"
    resumed = prepare(home, *given, f"run.resume_ckpt_path={step}", job="resumed")
    again = state(resumed.train())
    assert again.keys() == state(path).keys()
    assert all(torch.equal(t, state(path)[k]) for k, t in again.items())


@pytest.mark.parametrize("tower", ["dinov3_vit", "clip", "test_vit", "siglip+dinov2"])
def test_the_vision_side_learns(home: Path, tmp_path: Path, tower: str) -> None:
    """All of it has a gradient; a checkpoint holds it, and serves a folder of the same name."""
    given = [*options(home, tower), f"run.output_dir={tmp_path}"]
    given += ["model.train={vision: 1e-3, connector: 1e-3}", "run.lr_layer_decay=0.5"]
    runner = prepare(home, *given, "run.max_epoch=1")
    scales = {g["lr_scale"] for g in runner.strategy.optimizer.param_groups}
    depth = {"test_vit": 6, "clip": 2}.get(tower, 3)
    assert scales == {0.5**n for n in range(depth + 2)}
    before = {n: p.clone() for n, p in runner.model.named_parameters()}
    path = runner.train()
    after = dict(runner.model.named_parameters())
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == {
        n for n in before if not n.startswith("language.")
    }
    other = prepare(home, *given, job="other")
    other.model.load_checkpoint(path)
    assert loss(other) == loss(runner)
    layer = "model.vision.towers[0].layer" if "+" in tower else "model.vision.layer"
    vision = yaml_of(tower, home, layer=1)
    changed = prepare(home, *given, f"model.vision={json.dumps(vision)}", job="changed")
    with pytest.raises(WeightsError, match=re.escape(layer.replace("[0]", ".0"))):
        changed.model.load_checkpoint(path)


def test_another_folder_or_precision_is_pointed_out(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = parse(ModelConfig, model_of(home, "siglip+dinov2"), "model", str)
    saved = {"config": {"model": model_of(home, "siglip+dinov2")}}
    towers_now = [
        replace(t, path=f"/else/{i}", precision="bf16") for i, t in enumerate(config.vision.towers)
    ]
    check_settings(
        "x.pth", saved, replace(config, vision=replace(config.vision, towers=tuple(towers_now)))
    )
    for key in ("0.path", "1.path", "0.precision"):
        assert f"model.vision.towers.{key} was" in caplog.text


@pytest.mark.parametrize("names", [("clip", "pool", "qwen3"), ("siglip+dinov2", "mlp", "llama")])
def test_chat_is_what_a_cold_start_gives(home: Path, names: tuple[str, str, str]) -> None:
    """The engine keeps images, keys and values; `generate` computes the whole prompt anew."""
    model, processors, _ = load_model_and_preprocess(
        "vlm", is_eval=True, cfg_path=home / "run.yaml", options=options(home, *names)
    )
    torch.manual_seed(3)
    for parameter in model.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    picture = min((home / "image").rglob("*.png"))
    pixels = processors["eval"](open_image(picture))[None]
    conversation = Conversation(
        ChatEngine(model, processors["eval"]), ChatSettings(max_new_tokens=6)
    )
    conversation.show(picture)
    for question in ("What is it?", "Why?"):
        answer = conversation.ask(question)
        answer.read()
        assert answer.ids
        settings = answer._settings.generation()
        assert answer.ids == model.generate_ids([answer.prompt], pixels, **settings)[0]


# --- mistakes -------------------------------------------------------------------------------


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
        ("llama", {}, "holds llama, no vision encoder that is known here (siglip_vision_model, "),
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
