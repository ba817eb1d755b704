"""What is trained, what stays frozen, and what a checkpoint holds of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis.common.errors import WeightsError
from lavis.models.weights.trained import trainable_state
from tests.conftest import TOY
from tests.models.conftest import BLIP, SHARDS, VIT, Load, one_batch, refusal

# --- what is trained ------------------------------------------------------------------------

_FIRST = torch.tensor([0])
TOY_SIZES = {
    "image_size": 56, "num_query_token": 8,
    "vit_config": {"embed_dim": 88, "depth": 2, "num_heads": 4},
}  # fmt: skip
PROJECTION = {"llm_proj."}
TRAINED: list[tuple[list[str], set[str]]] = [
    ([], PROJECTION),
    (["freeze_proj=true", "freeze_queries=false"], {"query_tokens"}),
    (["freeze_queries=false"], PROJECTION | {"query_tokens"}),
    (["freeze_qformer=false"], PROJECTION | {"Qformer.", "ln_vision."}),
    (["freeze_vit=false"], PROJECTION | {"visual_encoder."}),
    (["unfreeze_pos_embed=true"], PROJECTION | {"visual_encoder.pos_embed"}),
    (["freeze_llm=false", "freeze_proj=true"], {"llm_model."}),
    (["freeze_proj=true"], set()),
]


@pytest.mark.parametrize(
    ("flags", "prefixes"), TRAINED, ids=lambda x: ",".join(sorted(x)) or "none"
)
def test_exactly_the_named_parameters_train(
    load: Load, flags: list[str], prefixes: set[str]
) -> None:
    model = load(*(f"model.{flag}" for flag in flags))
    names = {n: model.key_map.source(n).key for n, _ in model.named_parameters()}
    named = {n for n, key in names.items() if key.startswith(tuple(prefixes))}
    assert set(model.trainable_parameters()) == (named if prefixes else set())
    assert bool(named) == bool(prefixes)
    model.train()
    assert model.training
    whole = {
        "vision.visual_encoder": "visual_encoder.",
        "vision.ln_vision": "ln_vision.",
        "vision.Qformer": "Qformer.",
        "connector": "llm_proj.",
        "language": "llm_model.",
    }
    for name, prefix in whole.items():
        for module in model.get_submodule(name).modules():
            assert module.training == (prefix in prefixes), name
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("flags", [f for f, p in TRAINED if p], ids=",".join)
def test_exactly_the_trained_parameters_get_a_gradient(load: Load, flags: list[str]) -> None:
    model = load(*(f"model.{flag}" for flag in flags)).train()
    model(one_batch(model)).loss_sum.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == set(model.trainable_parameters())


def test_dropout_of_a_frozen_q_former_is_off(load: Load) -> None:
    """Its configuration has dropout 0.1."""
    image = torch.rand(1, 3, 56, 56)
    frozen = load().train()
    assert torch.equal(frozen.encode_image(image), frozen.encode_image(image))
    trained = load("model.freeze_qformer=false").train()
    assert not torch.equal(trained.encode_image(image), trained.encode_image(image))


def test_training_never_writes_to_a_weight_file(ckpt: Path, load: Load) -> None:
    def digests() -> list[str]:
        return [hashlib.sha256((ckpt / n).read_bytes()).hexdigest() for n in (VIT, BLIP, *SHARDS)]

    before = digests()
    flags = ("freeze_vit", "freeze_qformer", "freeze_queries", "freeze_llm")
    model = load(*(f"model.{flag}=false" for flag in flags))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(one_batch(model)).loss_sum.backward()
    optimizer.step()
    assert digests() == before


@pytest.mark.parametrize("lora", [False, True])
def test_recomputation_changes_neither_loss_nor_gradient(load: Load, lora: bool) -> None:
    if lora:
        pytest.importorskip("peft")
    options = ["model.get_lora=true", "model.lora_dropout=0"] if lora else []

    def run(*extra: str) -> tuple[Tensor, dict[str, Tensor], int]:
        torch.manual_seed(3)
        model = load(*options, *extra, checkpoint=None).train()
        model.set_schedule(
            replace(model.schedule, prefix_cache=False)
        )  # which calls the layers, too
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for layer in model.language.model.model.layers:
            layer.mlp.register_forward_pre_hook(count)
        out = model(one_batch(model))
        out.loss_sum.backward()
        grads = {n: p.grad for n, p in model.trainable_parameters().items()}
        return out.loss_sum.detach(), grads, calls

    loss, grads, calls = run()
    again, same, twice = run("model.llm_grad_ckpt=true")
    assert (calls, twice) == (2, 4)  # two layers, once and twice
    assert torch.equal(loss, again)
    assert grads.keys() == same.keys()
    assert all(torch.equal(grads[n], same[n]) for n in grads)


def test_recomputation_of_the_vision_encoder(load: Load) -> None:
    image = torch.rand(1, 3, 56, 56)

    def grad(*extra: str) -> Tensor:
        torch.manual_seed(3)
        model = load("model.unfreeze_pos_embed=true", *extra).train()
        model(one_batch(model, image)).loss_sum.backward()
        return model.vision.visual_encoder.pos_embed.grad

    assert torch.allclose(grad(), grad("model.use_grad_checkpoint=true"), atol=1e-6)


# --- LoRA -----------------------------------------------------------------------------------


def test_lora_trains_adapters_only_and_its_checkpoint_round_trips(
    load: Load, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    options = ("model.get_lora=true", "model.lora_r=3", "model.lora_alpha=5")
    model = load(*options)
    trained = model.trainable_parameters()
    adapters = {n for n in trained if not n.startswith("connector.")}
    assert set(trained) - adapters == {"connector.weight", "connector.bias"}
    assert len(adapters) == 2 * 2 * 2  # two layers, query and value, A and B
    assert all(".lora_" in n and n.startswith("language.") for n in adapters)
    assert {p.shape[0] for n, p in trained.items() if ".lora_A." in n} == {3}
    for parameter in trained.values():
        parameter.data.normal_(std=0.1)
    path = tmp_path / "lora.pth"
    torch.save({"model": trainable_state(model)}, path)
    torch.manual_seed(11)
    other = load(*options)
    one = one_batch(model)
    wanted = model(one).loss_sum.item()
    assert other(one).loss_sum.item() != wanted
    other.load_checkpoint(path)
    assert other(one).loss_sum.item() == wanted
    assert "which is trained with this configuration" in refusal(
        load, *options, checkpoint=TOY / "checkpoint_9.pth"
    )
    assert "made without LoRA: set model.get_lora: false" in refusal(
        load, *options, checkpoint=TOY / "checkpoint_9.pth"
    )
    set_lora = f"{path} was trained with other settings; set model.get_lora: true (now false), "
    assert refusal(load, checkpoint=path) == (
        f"{set_lora}model.lora_r: 3 (now 8), model.lora_alpha: as in training (now 32)"
    )
    assert refusal(load, "model.get_lora=true", checkpoint=path) == (
        f"{path} was trained with other settings; set model.lora_r: 3 (now 8)"
    )
    options_then = {"get_lora": True, "lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.5}
    config = {"model": TOY_SIZES | options_then}
    torch.save({"model": trainable_state(model), "config": config}, path)
    assert refusal(load, checkpoint=path) == (
        f"{set_lora}model.lora_r: 3 (now 8), model.lora_alpha: 5 (now 32)"
    )
    assert refusal(load, *options, "model.lora_alpha=6", checkpoint=path) == (
        f"{path} was trained with other settings; set model.lora_alpha: 5 (now 6)"
    )
    load(*options, checkpoint=path)


# --- settings -------------------------------------------------------------------------------


def _with_settings(path: Path, config: object) -> Path:
    content = torch.load(TOY / "checkpoint_9.pth", weights_only=True)
    torch.save(content | {"config": config}, path)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 112}, "model.image_size: 112 (now 56)"),
        (
            {"image_size": 112, "num_query_token": 9},
            "model.image_size: 112 (now 56), model.num_query_token: 9 (now 8)",
        ),
        ({"vit_config": {"depth": 3}}, "model.vit_config.depth: 3 (now 2)"),
        ({"qformer_config": {"num_hidden_layers": 4}}, None),  # here bert_config says it
        ({"vit_config": {"initializer_range": 1.0}, "qformer_config": None}, None),
        ({"image_size": "56"}, None),
        ({"image_size": [56]}, None),
        ({"get_lora": True, "lora_alpha": 3}, None),  # no adapters, neither there nor here
    ],
)
def test_settings_that_must_be_those_of_the_checkpoint(
    load: Load, tmp_path: Path, settings: dict[str, Any], message: str | None
) -> None:
    path = _with_settings(tmp_path / "c.pth", {"model": TOY_SIZES | settings})
    if message is None:
        load(checkpoint=path)
    else:
        assert refusal(load, checkpoint=path).startswith(
            f"{path} was trained with other settings; set {message}"
        )


def test_what_a_checkpoint_does_not_say_was_the_default(load: Load, tmp_path: Path) -> None:
    settings = {key: TOY_SIZES[key] for key in ("num_query_token", "vit_config")}
    path = _with_settings(tmp_path / "c.pth", {"model": settings})
    assert refusal(load, checkpoint=path) == (
        f"{path} was trained with other settings; set model.image_size: 224 (now 56)"
    )


@pytest.mark.parametrize("config", [None, "model: {image_size: 112}", {}, {"model": [1]}, 3])
def test_a_configuration_of_another_shape_is_not_compared(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: object
) -> None:
    path = _with_settings(tmp_path / "c.pth", config)
    with caplog.at_level("INFO"):
        load(checkpoint=path)
    message = f"{path} does not say how it was trained: settings are not compared"
    assert caplog.messages.count(message) == 1


def test_other_weights_beside_it_are_warned_of(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TOY_SIZES | {
        "llm_model": "/far/Qwen14B-chat",
        "vit_weights": "/far/eva_vit_g.pth", "vit_precision": "fp32", "label_mask": "x",
        "max_txt_len": 3,
    }  # fmt: skip
    path = _with_settings(tmp_path / "c.pth", {"model": settings})
    load(checkpoint=path)
    assert [m for m in caplog.messages if str(path) in m] == [
        f"{path}: model.llm_model was /far/Qwen14B-chat, now ckpt/Qwen7B-chat"
    ]


# --- checkpoints ----------------------------------------------------------------------------


def test_checkpoint_of_the_original(load: Load) -> None:
    model = load(checkpoint=TOY / "checkpoint_9.pth")
    wanted = torch.load(TOY / "checkpoint_9.pth", weights_only=True)["model"]
    assert torch.equal(model.connector.weight, wanted["llm_proj.weight"])
    assert torch.equal(model.connector.bias, wanted["llm_proj.bias"])
    state = trainable_state(model)
    assert list(state) == ["llm_proj.weight", "llm_proj.bias"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_wrappers_put_before_every_name_is_taken_off(
    load: Load, tmp_path: Path, dtype: torch.dtype, prefix: str
) -> None:
    state = torch.load(TOY / "checkpoint_9.pth", weights_only=True)["model"]
    path = tmp_path / "wrapped.pth"
    torch.save({prefix + name: tensor.to(dtype) for name, tensor in state.items()}, path)
    model = load(checkpoint=path)
    assert torch.equal(model.connector.weight, state["llm_proj.weight"].to(dtype).float())


def test_load_finetuned_is_the_same_as_a_checkpoint(load: Load, ckpt: Path) -> None:
    (ckpt / "mine.pth").write_bytes((TOY / "checkpoint_9.pth").read_bytes())
    one = load("model.load_finetuned=true", "model.finetuned=ckpt/mine.pth")
    other = load(checkpoint=TOY / "checkpoint_9.pth")
    assert torch.equal(one.connector.weight, other.connector.weight)


def test_full_checkpoint_round_trips_through_the_originals_names(
    load: Load, tmp_path: Path
) -> None:
    flags = [f"model.freeze_{p}=false" for p in ("vit", "qformer", "queries", "llm")]
    model = load(*flags)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    state = trainable_state(model)
    assert state["llm_model.transformer.h.0.attn.c_attn.weight"].shape == (192, 64)
    assert "Qformer.bert.encoder.layer.0.attention.self.query.weight" in state
    path = tmp_path / "full.pth"
    torch.save({"model": state}, path)
    other = load(*flags, checkpoint=path)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: {"llm_proj.weight": m["llm_proj.weight"]},
            " lacks llm_proj.bias, which is trained with this configuration; check the freeze_* ",
        ),
        (
            lambda m: m | {"llm_prj.bias": torch.ones(1)},
            " holds 1 tensors that are not part of this model: llm_prj.bias; did you mean "
            "'llm_proj.bias'?",
        ),
        (
            lambda m: {"model.mm_projector.0.weight": m["llm_proj.weight"]},
            " lacks llm_proj.weight, which is trained with this configuration; it holds "
            "model.mm_projector.0.weight, as LLaVA does, whose projection fits no model of ours",
        ),
        (
            lambda m: {"llama_proj.weight": m["llm_proj.weight"]},
            " lacks llm_proj.weight, which is trained with this configuration; it holds "
            "llama_proj.weight, as MiniGPT-4 does, ",
        ),
        (
            lambda m: {k.removeprefix("llm_proj."): t for k, t in m.items()},
            " lacks llm_proj.weight, which is trained with this configuration; it holds a bare "
            "layer: name its tensors llm_proj.weight and llm_proj.bias",
        ),
        (
            lambda m: {"proj.w": torch.ones(1), "proj.b": torch.ones(1)},
            " lacks llm_proj.weight, which is trained with this configuration; it holds proj.w, ",
        ),
        (
            lambda m: {"module.llm_proj.weight": m["llm_proj.weight"]},
            " lacks llm_proj.bias, which is trained with this configuration; check the freeze_* ",
        ),
        (
            lambda m: m | {"module.llm_proj.bias": m["llm_proj.bias"]},
            " holds 1 tensors that are not part of this model: module.llm_proj.bias; did you mean ",
        ),
        (
            lambda m: m | {"llm_proj.bias": m["llm_proj.bias"].index_fill(0, _FIRST, math.nan)},
            ": llm_proj.bias holds numbers that are not finite in torch.float32; ",
        ),
        (
            lambda m: m | {"llm_proj.weight": m["llm_proj.weight"].double() * 1e300},
            ": llm_proj.weight holds numbers that are not finite in torch.float32; ",
        ),
        (
            lambda m: m | {"llm_proj.weight": m["llm_proj.weight"].long()},
            ": llm_proj.weight holds numbers of torch.int64; weights are finite floating-",
        ),
        (
            lambda m: m | {"llm_proj.weight": torch.ones(64, 768)},
            ": llm_proj.weight has shape (64, 768), the model (64, 48): the checkpoint belongs to "
            "other encoder or LLM sizes",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(
    load: Load, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    content = torch.load(TOY / "checkpoint_9.pth", weights_only=True)
    path = tmp_path / "c.pth"
    torch.save(content | {"model": change(content["model"])}, path)
    model = load()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(WeightsError) as caught:
        model.load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # unchanged
