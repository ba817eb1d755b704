"""Any vision encoder with any connector and any language model.

The oracle of features is the library's own class, and of images its own image processor.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.common.config import load_config, load_stages
from lavis.common.errors import ConfigError, DataError, WeightsError
from lavis.common.images import open_image
from lavis.common.registry import LANGUAGE_MODELS, PROCESSORS
from lavis.common.schema import ModelConfig
from lavis.common.typed import parse
from lavis.common.types import Batch, Sample, Spans
from lavis.datasets.collate import collate
from lavis.models import load_model_and_preprocess
from lavis.models.build import Assembly
from lavis.models.config import HfConfig
from lavis.models.language.parts import Hf
from lavis.models.vlm import VLM
from lavis.models.weights.agreement import check_settings
from lavis.models.weights.trained import trainable_state
from lavis.processors.conversation import Turn
from lavis.runners.stages import train_stages
from tests.conftest import REPO
from tests.models.towers import (
    CONNECTORS_OF,
    FOLDERS,
    GRIDS,
    IMAGENET,
    LEADING,
    SHRINK,
    SPOKEN,
    TIMM,
    TOWERS,
    encoder_of,
    fill,
    model_of,
    new_model,
    options,
    pictures,
    stock_features,
    yaml_of,
)  # fmt: skip
from tests.test_parts import loss, prepare, state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision encoders, language models, pictures, and ``run.yaml`` that names no model."""
    folder = tmp_path_factory.mktemp("towers")
    fill(folder)
    return folder


def positions(name: str, side: int) -> int:
    """What an image takes in the text."""
    shrunk = {"merge": (side // SHRINK[side]) ** 2, "pool": (side // SHRINK[side]) ** 2}
    return (shrunk | {"resampler": 7}).get(name, side**2)


@pytest.fixture(scope="module")
def kept() -> dict[Any, Any]:
    """Vision encoders and language models that were read."""
    return {}


@pytest.fixture()
def parts(kept: dict[Any, Any]) -> Any:
    """Vision encoders and language models are read and proved once for all combinations.

    Only for tests that ask for it: others give a language model adapters, which stay in it.
    """
    build_vision, load = Assembly.build_vision, Hf.load

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


def batch(model: VLM, pixels: Tensor | None, features: Tensor | None = None) -> Batch:
    """Two documents with an image each."""
    samples = []
    for i, answer in enumerate(("A cat.", "Two: a red ball and a blue box.")):
        turns = [Turn("user", "<ImageHere> What is it?"), Turn("assistant", answer)]
        ids = model.encoder.encode(turns)
        spans = Spans()
        if features is not None:
            spans = Spans(features=features[i : i + 1])
        elif pixels is not None:
            spans = Spans(pixels[i : i + 1])
        samples.append(Sample(str(i), torch.tensor(ids.input_ids), torch.tensor(ids.labels), spans))
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


@pytest.mark.parametrize(
    ("project", "tower", "one_file"),
    [
        ("qwen3_siglip2", "siglip", False),
        ("qwen3_siglip2", "siglip", True),
        ("llama_clip_mlp", "clip", False),
    ],
)
def test_the_two_stages_of_a_project(
    home: Path, tmp_path: Path, project: str, tower: str, one_file: bool
) -> None:
    """The shipped files, with small weights in place of the real ones."""
    pytest.importorskip("peft")
    said = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
    picture = min((home / "image").rglob("*.png"))
    records = [{"id": str(i), "image": picture.name, "conversations": said} for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    small = [
        f"model.vision.path={home / tower}", f"model.language.path={home / project.split('_')[0]}",
        "model.language.precision=fp32", "run.device=cpu", "run.amp=false", "run.num_workers=0",
        "run.warmup_ratio=0", f"run.output_dir={tmp_path}", "model.max_txt_len=512",
    ]  # fmt: skip
    small += ["model.connector.size=2"] if tower == "siglip" else []
    saved: Path | None = None
    files = REPO / "lavis" / "projects" / project
    for stage, name in (("align", "llava_pretrain_558k"), ("instruct", "llava_instruct_150k")):
        info = f"datasets.{name}.build_info"
        given = [f"{info}.annotations.train.storage={tmp_path / 'data.json'}"]
        given += [f"{info}.images.storage={picture.parent}"]
        if one_file:
            small += [f"stages.{stage}.{item}" for item in given]
            continue
        given += [] if saved is None else [f"model.finetuned={saved}"]
        runner = prepare(home, *small, *given, file=files / f"{stage}.yaml", job=stage)
        before = loss(runner)
        saved = runner.train()
        assert loss(runner) < before
    saved = saved or train_stages(load_stages(files / "stages.yaml", small))[0]
    assert any("lora_" in name for name in state(saved))
    assert any(name.startswith("connector.") for name in state(saved))


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
