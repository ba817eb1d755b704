"""A merged language model answers as its adapters did, in Transformers and here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from lavis.common.config import load_config
from lavis.common.errors import ConfigError, LavisError, WeightsError
from lavis.models import load_model
from lavis.models.config import HfConfig, LoraConfig
from lavis.models.language.adapters import add_lora
from lavis.models.language.parts import Hf
from lavis.models.weights.trained import trainable_state
from lavis.runners.checkpoint import Checkpoint, Progress
from lavis.tools.export import export
from lavis.tools.merge import check_mergeable
from tests.conftest import REPO, TOY, TOY_YAML
from tests.processors.families import FAMILIES
from tests.test_parts import SIZES, model_yaml, save_language

pytest.importorskip("peft")
from lavis.models.language.merged import Proof, merge, write_folder

LANGUAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", {}),
    "qwen3": ("qwen3", {"hidden_size": 48, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all"}
PROMPT = torch.tensor([[5, 9, 20, 3, 77, 41]])


def reshape(folder: Path, layout: str) -> None:
    """Store a folder's weights as others do."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")


def run_of(tmp: Path, language: Path, lora: dict[str, Any]) -> Path:
    """A run's YAML."""
    content = model_yaml(language) | {"env": {"cache_root": str(REPO)}}
    content["model"]["train"] = {"connector": 1e-3, "language": {"lora": lora}}
    path = tmp / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def train(path: Path, arch: str = "vlm") -> tuple[Any, Path]:
    """A model whose adapters and connector have learned something, and its checkpoint."""
    model = load_model(arch, is_eval=True, cfg_path=path)
    torch.manual_seed(3)
    for name, parameter in model.trainable_parameters().items():
        step = 0.5 if "magnitude" in name else 0.1
        parameter.data += torch.randn_like(parameter) * step
    checkpoint = path.with_name("checkpoint_0.pth")
    tree = load_config(path).tree
    Checkpoint(trainable_state(model), {}, tree, progress=Progress(1, 1)).write(checkpoint)
    return model, checkpoint


def merged(path: Path, checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> Proof:
    config = load_config(path)
    check_mergeable(config, out)
    return merge(config, checkpoint, out, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("llama", "bin", {}),
        ("llama", "safetensors", {"use_dora": True, "targets": ["q_proj", "down_proj"]}),
        ("qwen3", "safetensors", {"use_rslora": True}),
        ("phi3", "safetensors", {"use_dora": True, "use_rslora": True}),
    ],
)
def test_stock_transformers_and_this_project_go_on(
    tmp_path: Path, name: str, layout: str, options: dict[str, Any]
) -> None:
    template, sizes = LANGUAGES[name]
    source = save_language(tmp_path / name, name, template, **sizes)
    if layout != "safetensors":
        reshape(source, layout)
    (source / "modeling_own.py").write_text("raise AssertionError\n", encoding="utf-8")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    path = run_of(tmp_path, source, LORA | options)
    model, checkpoint = train(path)
    out = tmp_path / "merged"
    proof = merged(path, checkpoint, out)
    assert (proof.same, proof.questions) == (3, 3)
    assert proof.largest < 1e-3
    assert proof.relative < 1e-5 < 1e-2 < proof.effect

    stock = AutoModelForCausalLM.from_pretrained(out)
    wanted = model.language.model(input_ids=PROMPT).logits
    torch.testing.assert_close(stock(input_ids=PROMPT).logits, wanted, rtol=1e-4, atol=1e-4)
    texts = [AutoTokenizer.from_pretrained(f)("a red ball").input_ids for f in (out, source)]
    assert texts[0] == texts[1]

    again = load_model("vlm", is_eval=True, cfg_path=out / "run.yaml")
    assert set(again.trainable_parameters()) == {"connector.weight", "connector.bias"}
    assert torch.equal(again.connector.weight, model.connector.weight)
    image = torch.rand(1, 3, 84, 84)
    question = "<ImageHere> what is it?"
    answers = [m.chat(question, image_tensor=image, max_new_tokens=8)[0] for m in (again, model)]
    assert answers[0] == answers[1]
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert not list(out.glob("*.py"))
    assert not list(tmp_path.glob(".*"))


def test_shards_types_and_everything_else_stay(tmp_path: Path) -> None:
    template, sizes = LANGUAGES["qwen3"]
    source = save_language(tmp_path / "qwen3", "qwen3", template, **sizes)
    reshape(source, "sharded")
    path = run_of(tmp_path, source, LORA | {"targets": ["layers.1.self_attn.v_proj"]})
    model, checkpoint = train(path)
    layer = model.language.model.model.layers[1].self_attn.v_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    merged(path, checkpoint, tmp_path / "same")
    merged(path, checkpoint, tmp_path / "wide", torch.float32)
    files = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(p.name for p in (tmp_path / "same").glob("*.safetensors")) == files
    old = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    key = "model.layers.1.self_attn.v_proj.weight"
    for folder, dtype in (("same", torch.bfloat16), ("wide", torch.float32)):
        new = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").state_dict()
        exact = layer.merged(old[key])
        assert torch.equal(new[key], exact.to(dtype))
        assert {k for k in old if not torch.equal(new[k], old[k].to(dtype))} == {key}
        assert {t.dtype for t in new.values()} == {dtype}
    index = json.loads((tmp_path / "same/model.safetensors.index.json").read_text())
    theirs = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_of_a_model_that_sees_the_language_model_alone_is_written(tmp_path: Path) -> None:
    template = FAMILIES["gemma3"]
    sizes = {**SIZES, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=sizes, vision_config=vision)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    template.save(tmp_path / "whole")
    described = Hf(HfConfig("hf", path=str(tmp_path / "whole")), "", "model.language.{}".format)
    language = described.load(torch.device("cpu"))
    add_lora(language, LoraConfig(targets="all", use_dora=True))
    for name, parameter in language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "out").mkdir()
    write_folder(described, language.model, tmp_path / "out", torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock).__name__ == "Gemma3ForCausalLM"
    assert stock.config.dtype == torch.float32
    wanted = language.eval().model(input_ids=PROMPT).logits
    torch.testing.assert_close(stock(input_ids=PROMPT).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_first_generation_qwen_keeps_its_layout(tmp_path: Path, dora: bool) -> None:
    """Key and value are thirds of a joined tensor there; the query's third stays."""
    lora = f"get_lora: true, lora_r: 3, lora_alpha: 9, lora_use_dora: {str(dora).lower()}, "
    content = yaml.safe_load(TOY_YAML)
    content["model"] |= yaml.safe_load(f"{{{lora}}}")
    content["model"]["lora_targets"] = ["k_proj", "v_proj", "gate_proj"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    model, checkpoint = train(path, "minigpt4qwen")
    out = tmp_path / "merged"
    proof = merged(path, checkpoint, out)
    assert proof.same == 3
    assert proof.relative < 1e-2
    again = load_model("minigpt4qwen", is_eval=True, cfg_path=out / "run.yaml")
    source = TOY / "cache/ckpt/Qwen7B-chat"
    base = load_model("minigpt4qwen", is_eval=True, cfg_path=path, options=["model.get_lora=false"])
    old, new = base.language.state_dict(), again.language.state_dict()
    changed = {k.split(".")[-2] for k in old if not torch.equal(old[k], new[k])}
    assert changed == {"k_proj", "v_proj", "gate_proj"}
    assert (out / "qwen.tiktoken").read_bytes() == (source / "qwen.tiktoken").read_bytes()
    image = torch.rand(1, 3, 56, 56)
    torch.testing.assert_close(again.encode_image(image), model.encode_image(image), rtol=0, atol=0)


# --- refusals -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tmp = tmp_path_factory.mktemp("run")
    path = run_of(tmp, save_language(tmp / "llama", "llama", "llama3"), LORA)
    return path, train(path)[1]


def test_a_folder_with_something_in_it_is_refused(run: tuple[Path, Path]) -> None:
    path, checkpoint = run
    with pytest.raises(ConfigError, match=r"--out: .*llama is not empty, and nothing is overwr"):
        merged(path, checkpoint, path.parent / "llama")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"language": {"path": "x.gguf"}}, r"model\.language\.path: x\.gguf: adapters cannot be"),
        (
            {"language": {"path": "x.gguf", "quantize": "gguf"}},
            r"model\.language\.quantize: gguf: adapters cannot be merged into quantized weights",
        ),
        ({"language": {"path": "x", "quantize": "nf4"}}, r"quantize: nf4: .*full precision"),
        ({"language": {"path": "x", "quantize": "int8"}}, r"quantize: int8: .*full precision"),
        (
            {"language": {"name": "qwen1", "path": "x", "from_scratch": True}},
            r"model\.language\.from_scratch: random weights stand in no folder",
        ),
        ({"train": {"connector": 1e-3}}, r"no adapters are trained with it \(model\.train\.lang"),
    ],
)
def test_what_has_nothing_to_merge_is_refused(
    run: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    content = yaml.safe_load(run[0].read_text(encoding="utf-8"))
    for key, value in change.items():
        content["model"][key] = ({"name": "hf"} if key == "language" else {}) | value
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        check_mergeable(load_config(path), tmp_path / "out")


def test_adapters_of_other_settings_are_refused(run: tuple[Path, Path], tmp_path: Path) -> None:
    path, checkpoint = run
    for key, value in (("r", 2), ("use_rslora", True), ("use_dora", True)):
        config = load_config(path, [f"model.train.language.lora.{key}={value}".lower()])
        with pytest.raises(WeightsError, match=rf"set model\.train\.language\.lora\.{key}: "):
            merge(config, checkpoint, tmp_path / "out", dtype=None, device=torch.device("cpu"))
    assert not list(tmp_path.iterdir())


def test_weights_under_other_names_are_refused(tmp_path: Path) -> None:
    """Those of a model without its head, which Transformers finds in their places."""
    source = save_language(tmp_path / "qwen3", "qwen3", "qwen3", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(source).model.save_pretrained(source)
    path = run_of(tmp_path, source, LORA)
    checkpoint = train(path)[1]
    with pytest.raises(
        ConfigError, match=r"hold no model\.layers\.0\..*stored under other names, and adapters"
    ):
        merged(path, checkpoint, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"qwen3", path.name, checkpoint.name}


def test_another_model_is_not_kept(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavis.models.compute.adapted_linear import AdaptedLinear

    monkeypatch.setattr(AdaptedLinear, "merged", lambda self, weight: weight.float())
    with pytest.raises(WeightsError, match="the model is another than its adapters: greedy answ"):
        merged(*run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_large_for_half_precision(run: tuple[Path, Path], tmp_path: Path) -> None:
    path, checkpoint = run
    content = torch.load(checkpoint, weights_only=True)
    for name, tensor in content["model"].items():
        if "layers.1.mlp.up_proj.lora_B" in name:
            tensor.mul_(1e6)
    large = tmp_path / "large.pth"
    torch.save(content, large)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight, merged, is not fin"):
        merged(path, large, tmp_path / "out", torch.float16)


def test_trained_weights_beside_adapters_are_refused(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    path, checkpoint = run
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["llm_model.model.norm.weight"] = torch.ones(32)
    other = tmp_path / "other.pth"
    torch.save(content, other)
    with pytest.raises(WeightsError, match=r"weights of the language model itself.*model\.norm"):
        merged(path, other, tmp_path / "out")


def test_export_names_this_tool(tmp_path: Path) -> None:
    content = yaml.safe_load(TOY_YAML)
    content["model"]["get_lora"] = True
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    _, checkpoint = train(path, "minigpt4qwen")
    with pytest.raises(LavisError, match=r"python -m lavis\.tools\.merge"):
        export(checkpoint, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()
