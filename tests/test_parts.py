"""Models of parts, as a YAML makes them: any language model behind the toybox's frozen eyes."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import test_model_chat
import train
from examples.toybox.world.__main__ import write_split
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError, LavisError, WeightsError
from lavis.common.registry import LANGUAGE_MODELS, RUNNERS, TASKS
from lavis.common.types import DTYPES
from lavis.models import load_model_and_preprocess
from lavis.models.build import Assembly
from lavis.models.config import HfConfig
from lavis.models.generation import Generator
from lavis.models.language.parts import Hf
from lavis.models.weights.agreement import check_settings
from lavis.processors.contracts import Piece, Turn
from lavis.processors.templates import TokenizerTemplate
from lavis.tools.export import export
from tests.conftest import REPO
from tests.gguf_files import write_gguf
from tests.processors.families import FAMILIES
from tests.test_extend import write_page

TOYBOX = REPO / "examples" / "toybox"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "vocab_size": 700,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LANGUAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", {}),
    "qwen3": ("qwen3", {"hidden_size": 48, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"layer_types": ["sliding_attention", "full_attention"]}),
}
GGUF = "gguf/model.gguf"
CHECKPOINT = "checkpoint_latest.pth"


def save_language(
    folder: Path, family: str, template: str, *, stored: str = "fp32", **options: Any
) -> Path:
    """A folder as a user downloads it, with random weights."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **(SIZES | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(DTYPES[stored]).save_pretrained(folder)
    return FAMILIES[template].save(folder)


@pytest.fixture(scope="module")
def gguf_file(home: Path) -> Path:
    """A file as a user downloads it, and the folder it was made of, ``home/unpacked``."""
    folder = save_language(home / "unpacked", "qwen2", "chatml")
    (home / GGUF).parent.mkdir()
    model = AutoModelForCausalLM.from_pretrained(folder)
    return write_gguf(home / GGUF, model, (FAMILIES["chatml"], folder, "gpt2", "qwen2"))


def model_yaml(language: Path) -> dict[str, Any]:
    toybox = yaml.safe_load(
        (REPO / "lavis/configs/models/minigpt4qwen_toybox.yaml").read_text(encoding="utf-8")
    )
    keys = (
        "pretrained", "vit_weights", "vit_config", "image_size", "vit_precision",
        "qformer_config", "num_query_token",
    )  # fmt: skip
    return {
        "model": {
            "arch": "vlm",
            "vision": {"name": "eva_qformer"} | {k: toybox["model"][k] for k in keys},
            "connector": {"name": "linear"},
            "language": {"name": "hf", "path": str(language)},
            "label_mask": "assistant_only",
        },
        "preprocess": {"vis_processor": toybox["preprocess"]["vis_processor"]},
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("parts"), *LANGUAGES)


def make_home(home: Path, *names: str) -> Path:
    """Pictures, language models, and ``run.yaml`` for Llama."""
    for name in names:
        template, options = LANGUAGES[name]
        save_language(home / name, name, template, **options)
    for split, count in (("train", 8), ("test", 3)):
        write_split(home, split, count, 0, languages=("en",))
    annotations = {s: {"storage": str(home / f"{s}.json")} for s in ("train", "test")}
    info = {"annotations": annotations, "images": {"storage": str(home / "image")}}
    content = model_yaml(home / "llama") | {
        "env": {"cache_root": str(REPO)},
        "datasets": {"toybox": {"builder": "instruction", "build_info": info}},
        "run": {
            "batch_size_train": 4, "init_lr": 1e-3, "max_epoch": 2, "device": "cpu", "log_freq": 1,
            "lr_sched": "linear_warmup_cosine_lr_step-wise", "output_dir": str(home / "out"),
            "max_new_tokens": 8,
        },
    }  # fmt: skip
    (home / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return home


def prepare(home: Path, *options: str, job: str = "job", file: Path | None = None) -> Any:
    """What ``train.py`` does before training."""
    config = load_config(file or home / "run.yaml", options)
    task = TASKS.get(config.run.task)(config)
    task.check_paths()
    dataset = task.build_datasets()
    torch.manual_seed(config.run.seed)
    model = task.build_model(torch.device("cpu"), dataset, start=True)
    return RUNNERS.get(config.run.runner)(config, task, model, dataset, job)


def language(home: Path, name: str) -> str:
    return f"model.language.path={home / name}"


def state(path: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return saved


def loss(runner: Any) -> float:
    runner.model.eval()
    batch = next(iter(runner._loader([[(0, i) for i in range(4)]])))
    with torch.no_grad():
        return float(runner.model(batch).loss_sum)


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("depth", [0, 2])
def test_trains_saves_and_loads(home: Path, tmp_path: Path, name: str, depth: int) -> None:
    connector = "{name: linear}" if not depth else f"{{name: mlp, depth: {depth}}}"
    options = [language(home, name), f"run.output_dir={tmp_path}"]
    options.append(f"model.connector={connector}")
    runner = prepare(home, *options, "run.save_every_steps=1")
    before = loss(runner)
    frozen = {n: p.clone() for n, p in runner.model.named_parameters() if not p.requires_grad}
    path = runner.train()
    after = loss(runner)
    assert after < before
    names = {"llm_proj.weight", "llm_proj.bias"}
    if depth:
        names = {f"connector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    assert state(path).keys() == names
    own = dict(runner.model.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in frozen.items())

    other = prepare(home, *options, job="other")
    other.model.load_checkpoint(path)
    assert loss(other) == after

    step = runner.folder / "checkpoint_step_3.pth"
    resumed = prepare(home, *options, f"run.resume_ckpt_path={step}", job="resumed").train()
    assert all(torch.equal(t, state(path)[k]) for k, t in state(resumed).items())


def test_features_serve_every_language_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ``model.language.path`` is another; no image is encoded again."""
    options = [f"run.output_dir={tmp_path}", "run.feature_cache={enabled: true, dtype: fp32}"]
    options.append(f"run.feature_cache.dir={tmp_path / 'features'}")
    first = prepare(home, *options)
    plain = prepare(home, f"run.output_dir={tmp_path}", job="plain")
    plain.model.load_state_dict(first.model.state_dict(), strict=False)
    assert loss(first) == pytest.approx(loss(plain), rel=1e-5)

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded anew")

    monkeypatch.setattr(Assembly, "build_vision", refuse)
    for name in ("qwen3", "gemma2"):
        runner = prepare(home, *options, language(home, name), job=name)
        assert runner.model.vision is None
        runner.train()


def test_a_gguf_file_is_the_folder_it_was_made_of(
    home: Path, gguf_file: Path, tmp_path: Path
) -> None:
    """Trained, saved, loaded and asked: the same numbers, and nothing is read for the sizes."""
    options = [f"run.output_dir={tmp_path}", "run.max_epoch=1"]
    packed = prepare(home, *options, language(home, GGUF), job="packed")
    folder = prepare(home, *options, language(home, "unpacked"), job="unpacked")
    assert loss(packed) == pytest.approx(loss(folder), rel=1e-6)
    texts = [Turn("user", "<ImageHere>What is it? <|im_end|>"), Turn("assistant", "A cat.")]
    assert packed.model.encoder.encode(texts) == folder.model.encoder.encode(texts)
    before, path = loss(packed), packed.train()
    assert loss(packed) < before
    trained, wanted = state(path), state(folder.train())
    assert trained.keys() == wanted.keys() == {"llm_proj.weight", "llm_proj.bias"}
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=1e-6)

    resumed = prepare(home, *options, language(home, GGUF), job="resumed")
    resumed.model.load_checkpoint(path)
    assert loss(resumed) == loss(packed)
    assert packed.model.chat("cat", max_new_tokens=5) == resumed.model.chat("cat", max_new_tokens=5)

    adapted = prepare(home, *options, language(home, GGUF), ADAPTED, job="adapted")
    assert sum("lora_" in name for name in state(adapted.train())) == 2 * 2 * 7


@pytest.mark.parametrize("kind", ["nf4", "int8", "gguf"])
def test_adapters_and_connector_learn_beside_packed_weights(
    home: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    path = language(home, "llama")
    if kind == "gguf":
        folder = save_language(tmp_path / "whole", "qwen2", "chatml", intermediate_size=64)
        model = AutoModelForCausalLM.from_pretrained(folder)
        words = (FAMILIES["chatml"], folder, "gpt2", "qwen2")
        file = write_gguf(tmp_path / "x.gguf", model, words, blocks="Q8_0")
        path = f"model.language.path={file}"
    lora = "{lora: {r: 4, targets: all}, lr: 1e-2}"
    options = [path, f"model.train={{connector: {{}}, language: {lora}}}", "run.seed=3"]
    options += [f"run.output_dir={tmp_path}", "run.grad_norm_clip=1"]
    plain = prepare(home, *options, job="plain")
    options.append(f"model.language.quantize={kind}")
    runner = prepare(home, *options)
    assert runner.model.training_flops(10, 1) == plain.model.training_flops(10, 1)
    packed = {n: b.clone() for n, b in runner.model.named_buffers() if b.dtype == torch.uint8}
    before = loss(runner)
    saved = runner.train()
    assert loss(runner) < before
    adapters = [k for k in state(saved) if "lora_" in k]
    assert len(adapters) == 2 * 2 * 7  # two layers of seven, a pair of each
    assert all(t.dtype == torch.float32 for t in state(saved).values())
    assert sum(float(state(saved)[k].abs().sum()) > 0 for k in adapters) == len(adapters)
    assert not any("packed" in k for k in state(saved))
    for name, buffer in packed.items():
        assert torch.equal(dict(runner.model.named_buffers())[name], buffer), name
    later = ("model.load_finetuned=true", f"model.finetuned={saved}")
    again = prepare(home, *options, *later, job="again")
    assert loss(again) == loss(runner)
    with caplog.at_level("WARNING"):
        prepare(home, *options[:-1], *later, job="unpacked")
    assert f"model.language.quantize was {kind}, now None" in caplog.text


def test_a_gguf_file_that_is_none(home: Path, gguf_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:-4000])
    with pytest.raises(WeightsError, match=r"broken\.gguf cannot be read"):
        prepare(home, f"model.language.path={broken}")
    with pytest.raises(WeightsError, match=r"model\.language\.path: no file .*absent\.gguf"):
        prepare(home, f"model.language.path={tmp_path / 'absent.gguf'}")


# --- what learns ----------------------------------------------------------------------------

ADAPTED = (
    "model.train={connector: {lr: 2e-3, weight_decay: 0.1}, "
    "language: {lr: 2e-4, lora: {r: 4, dropout: 0, targets: all}}}"
)


def test_each_part_at_its_rate(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = [ADAPTED, f"run.output_dir={tmp_path}", "run.max_epoch=1"]
    runner = prepare(home, *options, "run.lr_sched=constant_lr")
    told = [m for m in caplog.messages if m.startswith("learns: ")]
    count = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert told == [
        "learns: connector, 4,128 parameters, learning rate 0.002, weight decay 0.1",
        f"learns: language, {count:,} parameters, learning rate 0.0002, weight decay 0.05",
    ]
    before = {n: p.clone() for n, p in runner.model.named_parameters()}
    path = runner.train()
    names = {id(p): n for n, p in runner.model.named_parameters()}
    for group in runner.strategy.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            connector = name.startswith("connector.")
            assert group["lr"] == pytest.approx(2e-3 if connector else 2e-4)
            decay = 0.1 if connector else 0.05
            assert group["weight_decay"] == (0 if name.endswith("bias") else decay)
    changed = {n for n, p in runner.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith("connector.") or "lora_" in n}
    assert len(state(path)) == len(changed) == 2 + 2 * 2 * 7

    other = prepare(home, *options, job="other")
    assert loss(other) != loss(runner)
    other.model.load_checkpoint(path)
    assert loss(other) == loss(runner)
    names = ["up_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    written = ADAPTED.replace("targets: all", f"targets: [{', '.join(names)}]")
    by_name = prepare(home, written, *options[1:], f"run.resume_ckpt_path={path}", job="by name")
    assert loss(by_name) == loss(runner)
    fewer = prepare(home, written.replace("up_proj, ", ""), *options[1:], job="fewer")
    with pytest.raises(WeightsError, match=r"4 tensors that are not part .*up_proj\.lora_A"):
        fewer.model.load_checkpoint(path)
    with pytest.raises(WeightsError, match=r"set model\.train\.language\.lora\.alpha: 32"):
        prepare(home).model.load_checkpoint(path)


@pytest.mark.parametrize("amp", [False, True])
def test_adapters_of_a_half_precision_model_resume_bit_for_bit(
    home: Path, tmp_path: Path, amp: bool
) -> None:
    """What learns, and its moments, are fp32; dropout and DoRA's norms go on as they were."""
    lora = "{r: 4, dropout: 0.1, targets: all, use_dora: true, use_rslora: true}"
    options = [
        f"model.train={{connector: 2e-3, language: {{lora: {lora}}}}}",
        "model.language.precision=bf16", f"run.amp={amp}".lower(), "run.autocast_dtype=bf16",
        f"run.output_dir={tmp_path}", "run.save_every_steps=1",
    ]  # fmt: skip
    runner = prepare(home, *options)
    assert runner.model.language.head.weight.dtype == torch.bfloat16
    start = {n: p.clone() for n, p in runner.model.trainable_parameters().items()}
    path = runner.train()
    assert not any(torch.equal(p, start[n]) for n, p in runner.model.trainable_parameters().items())
    saved = torch.load(path, weights_only=True)
    moments = [v for s in saved["optimizer"]["state"].values() for v in s.values()]
    assert {t.dtype for t in (*saved["model"].values(), *moments)} == {torch.float32}
    step = runner.folder / "checkpoint_step_3.pth"
    resumed = prepare(home, *options, f"run.resume_ckpt_path={step}", job="resumed").train()
    again = torch.load(resumed, weights_only=True)
    assert all(torch.equal(t, saved["model"][k]) for k, t in again["model"].items())
    for i, entries in again["optimizer"]["state"].items():
        assert all(torch.equal(v, saved["optimizer"]["state"][i][k]) for k, v in entries.items())


def test_one_rate(home: Path, tmp_path: Path) -> None:
    options = (f"run.output_dir={tmp_path}", "run.max_epoch=1", "run.lr_sched=constant_lr")
    runner = prepare(home, "model.train={connector: 3e-3}", *options)
    assert set(runner.model.trainable_parameters()) == {"connector.weight", "connector.bias"}
    runner.train()
    groups = [g for g in runner.strategy.optimizer.param_groups if g["params"]]
    assert [g["lr"] for g in groups] == pytest.approx([3e-3, 3e-3])
    assert [g["weight_decay"] for g in groups] == [0.05, 0]


def test_a_part_with_a_schedule_of_its_own(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = [
        "model.train={connector: {lr: 2e-3}, language: {lr: 1e-3, lr_sched: constant_lr, "
        "warmup_steps: 2, warmup_lr: 0, lora: {r: 2}}, vision: {lr: 1e-4, min_lr: 5e-5, "
        "parts: [queries]}}",
        "run.lr_sched=linear_warmup_cosine_lr_step-wise", "run.init_lr=2e-3", "run.min_lr=1e-3",
        "run.warmup_steps=0", "run.max_epoch=2", f"run.output_dir={tmp_path}",
    ]  # fmt: skip
    runner = prepare(home, *options)
    assert any(
        m.startswith("learns: language") and m.endswith("constant_lr of its own")
        for m in caplog.messages
    )
    names = {id(p): n.partition(".")[0] for n, p in runner.model.named_parameters()}
    seen: dict[str, list[float]] = {}

    def see(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for part, rate in {
            (names[id(p)], g["lr"]) for g in optimizer.param_groups for p in g["params"]
        }:
            seen.setdefault(part, []).append(rate)

    runner.strategy.optimizer.register_step_pre_hook(see)
    path = runner.train()
    steps = len(seen["connector"])
    cosine = [0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    assert steps > 3
    assert seen["connector"] == pytest.approx([1e-3 + 1e-3 * c for c in cosine])
    assert seen["vision"] == pytest.approx([5e-5 + 5e-5 * c for c in cosine])
    assert seen["language"] == pytest.approx([0, 5e-4] + [1e-3] * (steps - 2))
    resumed = prepare(home, *options, f"run.resume_ckpt_path={path}", "run.max_epoch=3", job="more")
    resumed.train()
    assert {g["part"] for g in resumed.strategy.optimizer.param_groups} == {
        "", "language", "vision",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("min_lr: 1", r"model\.train\.connector: .*min_lr must be at most"),
        ("lr_sched: cosine", r"model\.train\.connector: lr_sched: .*linear_warmup_cosine_lr"),
        ("warmup_ratio: 1.5", r"model\.train\.connector: .*warmup_ratio"),
    ],
)
def test_a_schedule_that_cannot_be(home: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(home, f"model.train={{connector: {{lr: 1e-3, {setting}}}}}")


def test_a_trained_qformer_is_loaded_but_neither_cached_nor_exported(
    home: Path, tmp_path: Path
) -> None:
    train = "model.train={connector: {}, vision: {parts: [qformer], lr: 1e-3}}"
    options = (f"run.output_dir={tmp_path}", "run.max_epoch=1")
    runner = prepare(home, train, *options)
    path = runner.train()
    assert any("bert" in name for name in state(path))
    later = ("model.load_finetuned=true", f"model.finetuned={path}")
    assert loss(prepare(home, *later, job="later")) == loss(runner)
    with pytest.raises(LavisError, match=r"run\.feature_cache: model\.finetuned .* holds"):
        prepare(home, *later, "run.feature_cache.enabled=true")
    with pytest.raises(ConfigError, match=r"only parts of arch minigpt4qwen .*not of vlm"):
        export(path, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


# --- parts of one's own ---------------------------------------------------------------------


def test_a_vision_encoder_of_ones_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of docs/extend.md, with keys that no built-in one has: all that a run does with it."""
    write_page(tmp_path, monkeypatch)
    torch.manual_seed(3)
    vit = timm.create_model("test_vit", img_size=64, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    content = yaml.safe_load((home / "run.yaml").read_text(encoding="utf-8"))
    content["imports"] = ["extend_page.eyes"]
    weights = str(tmp_path / "vit.safetensors")
    eyes = {"name": "eyes", "weights": weights, "model": "test_vit", "image_size": 64}
    content["model"] |= {"vision": eyes, "train": {"connector": 1e-3}}
    for processor in content["preprocess"]["vis_processor"].values():
        processor["image_size"] = 64
    content["run"] |= {"output_dir": str(tmp_path), "max_epoch": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    learn = "model.train.vision={lr: 1e-4}"
    runner = prepare(tmp_path, learn)
    assert runner.model.features == (17, 64)
    vit.eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(runner.model.encode_query(images), vit.forward_features(images))
    before = loss(runner)
    path = runner.train()
    trained = {"llm_proj.weight", "llm_proj.bias", *(f"vision.vit.{n}" for n in vit.state_dict())}
    assert state(path).keys() == trained
    other = prepare(tmp_path, learn, job="other")
    other.model.load_checkpoint(path)
    assert loss(other) == loss(runner) < before
    config = runner.config.model
    changed = replace(config, vision=replace(config.vision, model="test_vit2"))
    with pytest.raises(WeightsError, match=r"set model\.vision\.model: test_vit \(now test_vit2\)"):
        check_settings(path, torch.load(path, weights_only=True), changed)

    cached = ["run.feature_cache.enabled=true", f"run.feature_cache.dir={tmp_path / 'features'}"]
    frozen = prepare(tmp_path, *cached, job="cached")
    assert (frozen.model.vision, frozen.model.features) == (None, (17, 64))
    frozen.train()
    with pytest.raises(WeightsError, match=r"^model\.vision\.weights: .*nowhere"):
        prepare(tmp_path, "model.vision.weights=nowhere")
    with pytest.raises(
        ConfigError, match=r"train\.vision\.parts: unknown 'vit' \(it learns as a w"
    ):
        prepare(tmp_path, "model.train={vision: {parts: [vit]}}")


@dataclass(frozen=True)
class MineConfig(HfConfig):
    """A language model's, with a key of its own."""

    depth: int = 1


@dataclass(frozen=True)
class BareConfig:
    """Derived from nothing."""

    name: str


def test_a_language_model_of_ones_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in (("mine", MineConfig), ("bare", BareConfig)):
        monkeypatch.setitem(LANGUAGE_MODELS._targets, name, Hf)
        monkeypatch.setitem(LANGUAGE_MODELS._configs, name, config)
    runner = prepare(home, "model.language.name=mine", "model.language.depth=2")
    assert runner.model.config.language == MineConfig("mine", path=str(home / "llama"), depth=2)
    with pytest.raises(ConfigError) as caught:
        prepare(home, "model.language={name: bare}")
    assert str(caught.value) == (
        "--options: model.language.name: BareConfig, the configuration of 'bare', must be derived "
        "from lavis.models.config.LanguageConfig"
    )


# --- late faults ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("model.train={connecter: 1e-3}", "model.train.connecter: .*did you mean 'connector'"),
        (
            "model.train={vision: {parts: [qfomer]}}",
            r"^--options: model\.train\.vision\.parts: unknown 'qfomer'; did you mean 'qformer'",
        ),
        ("model.train={connector: {parts: [last]}}", "train.connector.parts: unknown 'last'"),
        ("model.train={connector: -1}", "model.train.connector.lr must be at least 0, not -1"),
        ("model.train={connector: {lr: -1}}", "model.train.connector.lr must be at least 0"),
        ("model.train={connector: {rate: 1}}", "unknown key 'model.train.connector.rate'"),
        ("model.train={connector: {lora: {r: 4}}}", "model.train.connector.lora: only"),
        (
            "model.train={language: {lora: {r: 4, targets: [q_pro]}}}",
            "model.train.language.lora.targets: no layer q_pro.*did you mean 'q_proj'",
        ),
        (
            "model.language.quantize=nf4 run.model.train={language: 1e-4}",
            "model.train.language: weights do not train under language.quantize: nf4",
        ),
        (
            "model.language.quantize=int4",
            "model.language.quantize: 'int4' is not one of nf4, int8, gguf",
        ),
        ("model.language.quantize=gguf", "model.language.quantize: gguf keeps the blocks of a"),
        (
            "model.language.quantize=nf4 run.model.language.path=x.gguf",
            "model.language.quantize: nf4 would quantize a .gguf file a second time",
        ),
        (
            "model.language={name: qwen1, from_scratch: true, quantize: int8}",
            "model.language.quantize: a language model from scratch",
        ),
        ("model.language.path=''", "model.language.path is missing"),
        ("model.language.path=nowhere", "model.language.path: .*nowhere"),
        ("model.language.path=HOME/unknown", "model_type 'nope' is unknown"),
        ("model.language.path=HOME/bare", "HOME/bare.*no tokenizer"),
        ("model.language.path=HOME/mute", "no chat template"),
        ("model.language.path=HOME/narrow", "the tokenizer has .* tokens, the language model 60"),
        ("model.language.path=HOME/empty", "model.language.path: .*neither model"),
        ("model.language.template='nowhere:Mine'", "model.language.template: 'nowhere:Mine'"),
        ("model.connector.name=liner", "model.connector.name: .*did you mean 'linear'"),
        ("model.language.nme=x", "unknown key 'model.language.nme'.*'name'"),
        (
            "model.train={vision: 1e-4} run.feature_cache.enabled=true",
            r"run.feature_cache: the vision side is trained \(model.train.vision\)",
        ),
    ],
)
def test_told_before_a_weight_is_read(
    home: Path, option: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    faulty(home)
    for name in ("load_vit", "load_weights"):
        monkeypatch.setattr(f"lavis.models.vision.eva_qformer.{name}", read)
    monkeypatch.setattr("lavis.models.language.hf.open_shards", read)
    options = option.replace("HOME", str(home)).split(" run.")
    options[1:] = [o if o[:6] == "model." else f"run.{o}" for o in options[1:]]
    with pytest.raises(LavisError, match=told.replace("HOME", str(home))):
        prepare(home, *options)


def faulty(home: Path) -> None:
    """Folders that cannot be used."""
    if (home / "unknown").exists():
        return
    for name in ("unknown", "bare", "mute", "narrow", "empty"):
        folder = home / name
        folder.mkdir()
        for file in (home / "llama").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    config = (home / "llama" / "config.json").read_text(encoding="utf-8")
    (home / "unknown/config.json").write_text(config.replace('"llama"', '"nope"'))
    (home / "narrow/config.json").write_text(
        config.replace('"vocab_size": 700', '"vocab_size": 60')
    )
    for file in (home / "bare").glob("tokenizer*"):
        file.unlink()
    (home / "mute/chat_template.jinja").unlink()
    (home / "empty/model.safetensors").unlink()


# --- agreement ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    return prepare(home, "run.max_epoch=1", job="trained").train()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("model.connector={name: mlp}", r"set .*model\.connector\.name: linear \(now mlp\)"),
        ("model.language.path=HOME/qwen3", r"llm_proj\.weight has shape.*model\.language\.path"),
        (
            "model.train={connector: 1e-3, language: {lora: {r: 4}}}",
            r"model\.train\.language\.lora\.r: nothing \(now 4\)",
        ),
    ],
)
def test_a_checkpoint_of_other_parts(home: Path, trained: Path, option: str, told: str) -> None:
    runner = prepare(home, option.replace("HOME", str(home)))
    with pytest.raises(WeightsError, match=told):
        runner.model.load_checkpoint(trained)


def test_a_checkpoint_of_another_language_model_as_wide(
    home: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = prepare(home, language(home, "gemma2"))
    runner.model.load_checkpoint(trained)
    (told,) = [m for m in caplog.messages if "model.language.path was" in m]
    assert "llama" in told
    assert "gemma2" in told


# --- chat -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGES)
def test_answers_are_those_of_a_cold_start(home: Path, name: str) -> None:
    model, processors, _ = load_model_and_preprocess(
        "vlm", is_eval=True, cfg_path=home / "run.yaml", options=[language(home, name)]
    )
    engine = ChatEngine(model, processors["eval"])
    with Image.open(TOYBOX / "image/scene.png") as file:
        pixels = processors["eval"](file.convert("RGB"))
    image = engine.encode_image(pixels, "scene")
    conversation = Conversation(engine, ChatSettings(max_new_tokens=6))
    conversation.show(image)

    def check(question: str) -> str:
        answer = conversation.ask(question)
        text = answer.read()
        cold = model.generate_ids([answer.prompt], pixels[None], max_new_tokens=6)[0]
        assert answer.ids == cold
        return text

    first = check("How many objects are there?")
    check("What colour is it? <|im_end|>")
    conversation.undo()
    check("Where is the box?")
    conversation.undo()
    conversation.undo()
    assert check("How many objects are there?") == first
    asked = {"prompt": "How many objects are there?", "image": pixels}
    assert model.generate(asked, max_new_tokens=6) == [first]
    said, history = model.chat(
        "<Img><ImageHere></Img> How many objects are there?", image_tensor=pixels, max_new_tokens=6
    )
    assert said == first
    assert len(history) == 1


def load(home: Path, *options: str) -> tuple[Any, Any]:
    model, processors, _ = load_model_and_preprocess(
        "vlm", is_eval=True, cfg_path=home / "run.yaml", options=options
    )
    return model, processors["eval"]


@pytest.fixture()
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that a model was given."""
    seen: list[list[int]] = []

    def spy(self: Any, prompts: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        seen.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(Generator, "generate_ids", spy)
    return seen


@pytest.mark.parametrize("name", ["mistral", "llama2-first", "llama3", "gemma2", "qwen3", "phi3"])
def test_a_question_with_markers_is_no_markup(
    home: Path, tmp_path: Path, name: str, asked: list[list[int]]
) -> None:
    """Only what begins as the template's own prompts do is markup; a user can type a marker."""
    family = FAMILIES[name]
    model, _ = load(home, f"model.language.path={save_language(tmp_path, 'llama', name)}")
    encoder = model.encoder
    marker = family.ask.strip()
    for text in (f"What does {marker} mean?", f"Say {marker}", marker, f"a {family.begin}b"):
        asked.clear()
        model.generate({"text": text})
        model.generate({"prompt": text})
        assert asked == [encoder.prompt([Turn("user", text)])] * 2, text

    prompt = f"{family.begin}<ImageHere>cat{family.ask}"
    asked.clear()
    model.generate({"text": prompt})
    model.generate({"text": f"{prompt}A"})  # an answer that is begun
    assert asked[0] == encoder.prompt([Turn("user", "<ImageHere>cat")])
    assert model.tokenizer.decode(asked[1]).endswith("A")
    for wrong in (f"{family.begin}cat", f"{prompt}A{family.end}"):
        with pytest.raises(DataError, match="a prompt in markup ends with"):
            model.generate({"text": wrong})


# --- the system prompt ----------------------------------------------------------------------


def test_a_system_prompt_is_trained_and_asked(
    home: Path, tmp_path: Path, asked: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    said = "model.language.system=Be brief."
    plain, runner = prepare(home), prepare(home, said, f"run.output_dir={tmp_path}", job="system")
    encoder = runner.model.encoder
    assert (plain.model.encoder.system, encoder.system) == (None, "Be brief.")
    turns = [Turn("user", "cat"), Turn("assistant", "dog")]
    pieces = encoder.template.pieces(turns, system="Be brief.", ask=False)
    assert encoder.encode(turns).input_ids == encoder.tokenizer.encode_pieces(pieces).ids
    assert encoder.encode(turns) != plain.model.encoder.encode(turns)
    prefix = encoder.tokenizer.decode(encoder.constant_prefix()[0])
    assert "Be brief." in prefix
    batch = next(iter(runner._loader([[(0, 0)]])))
    assert "Be brief." in encoder.tokenizer.decode(batch.input_ids[0].tolist())

    model, processor = load(home, said)
    wanted = model.encoder.prompt([Turn("user", "cat")])
    assert wanted == encoder.prompt([Turn("user", "cat")])
    model.chat("cat")
    model.generate({"text": "cat"})
    assert asked == [wanted, wanted]
    model.chat("cat", system="Be long.")
    assert "Be long." in model.tokenizer.decode(asked[2])
    engine = ChatEngine(model, processor)
    assert Conversation(engine, ChatSettings(max_new_tokens=2)).ask("cat").prompt == wanted

    path = runner.train()
    plain.model.load_checkpoint(path)
    assert any("model.language.system was Be brief., now None" in m for m in caplog.messages)


def test_a_system_prompt_that_a_template_cannot_say(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.language\.system: .*takes no system prompt"):
        prepare(home, language(home, "gemma2"), "model.language.system=Be brief.")
    own = f"model.language.template={__name__}:Mute"
    with pytest.raises(ConfigError, match=r"^model\.language\.system: .*leaves it out"):
        prepare(home, own, "model.language.system=Be brief.")
    assert prepare(home, own).model.encoder.system is None


class Mute(TokenizerTemplate):
    """A template of one's own that forgets the system prompt."""

    def pieces(
        self, turns: Sequence[Turn], *, system: str | None = None, ask: bool = False
    ) -> list[Piece]:
        return super().pieces(turns, ask=ask)


Run = Callable[..., str]


@pytest.fixture()
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(command: Any, *arguments: object) -> str:
        listed = [command.__name__, "--cfg-path", str(home / "run.yaml"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", listed)
        assert command.main() == 0
        return capsys.readouterr().out

    return call


def test_commands_take_the_yaml(home: Path, trained: Path, tmp_path: Path, run: Run) -> None:
    told = run(
        test_model_chat, "--checkpoint", trained, "--image", TOYBOX / "image/scene.png",
        "--device", "cpu", "--max-new-tokens", 4,
    )  # fmt: skip
    assert told.count("Assistant: ") == 2
    told = run(evaluate, "--checkpoint", trained, "--out", tmp_path, "--baselines")
    assert (tmp_path / "scores.json").is_file()
    path = run(
        train, "--options", "run.max_epoch=1", f"run.output_dir={tmp_path}",
        language(home, "qwen3"), "run.test_splits=[test]",
    )  # fmt: skip
    assert Path(path.strip().splitlines()[-1]).name == CHECKPOINT
