"""Low-rank adapters: what their layers compute, in which precision, and which layers take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lavis.common.errors import ConfigError
from lavis.models.config import LoraConfig
from lavis.models.language.adapters import add_lora, lora_targets
from lavis.models.language.causal import CausalLM

peft = pytest.importorskip("peft")

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "pad_token_id": 0,
}  # fmt: skip
VARIANTS = [
    {"use_dora": dora, "use_rslora": rank_stable}
    for dora in (False, True)
    for rank_stable in (False, True)
]


def model(family: str = "qwen2", dtype: torch.dtype = FP32) -> CausalLM:
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **SIZES)
    llm = CausalLM(AutoModelForCausalLM.from_config(config, dtype=FP32))
    for parameter in llm.parameters():
        nn.init.normal_(parameter, std=0.2)
    return llm.requires_grad_(False).to(dtype)


def adapted(dtype: torch.dtype = FP32, target: str = "q_proj", **options: Any) -> Any:
    """A layer with a bias, adapters that do something, and its ``LoraConfig``."""
    llm = model(dtype=dtype)
    options = {"r": 4, "alpha": 6, "dropout": 0.0, "targets": (target,)} | options
    add_lora(llm, LoraConfig(**options))
    layer: Any = llm.model.get_submodule(f"model.layers.1.self_attn.{target}")
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    if layer.magnitude is not None:
        layer.magnitude.data += 1.5
    return layer


def defined(layer: Any, x: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
    """The papers' formulas in fp64, and the adapters that they are of."""
    w, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.magnitude]
    leaves = [p.detach().double().requires_grad_() for p in parts if p is not None]
    down, up, *magnitude = leaves
    y = x.double() @ (w + scale * up @ down).T
    if magnitude:
        y = y * (magnitude[0] / (w + scale * up @ down).detach().norm(dim=1))
    return y + bias, leaves


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_layers_are_what_the_papers_define(options: dict[str, bool]) -> None:
    """Output, gradients, and the weight that alone computes the same."""
    layer = adapted(**options)
    scale = 6 / 4**0.5 if options["use_rslora"] else 6 / 4
    x = torch.randn(2, 5, 32, requires_grad=True)
    seed = torch.randn(2, 5, 32)
    wide = x.detach().double().requires_grad_()
    wanted, leaves = defined(layer, wide, scale)
    got = layer(x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    (got * seed).sum().backward()
    (wanted * seed).sum().backward()
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.magnitude, x]
    for part, leaf in zip([p for p in parts if p is not None], [*leaves, wide], strict=True):
        torch.testing.assert_close(part.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    alone = nn.functional.linear(x, layer.merged(layer.base_layer.weight), layer.base_layer.bias)
    torch.testing.assert_close(alone, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_in_fp32_they_are_pefts(options: dict[str, bool]) -> None:
    layer = adapted(**options)
    x = torch.randn(3, 32)
    got = layer(x)
    layer.__class__ = peft.tuners.lora.Linear
    torch.testing.assert_close(layer(x), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_half_precision_is_fp32_rounded_once_with_autocast_and_without(
    options: dict[str, bool],
) -> None:
    layer = adapted(BF16, **options)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {FP32}
    x = torch.randn(3, 32, dtype=BF16)
    seed = torch.randn(3, 32)

    def run(*, amp: bool) -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=amp):
            out = layer(leaf)
            (out.float() * seed).sum().backward()
        assert out.dtype == leaf.grad.dtype == BF16
        return [out.detach(), leaf.grad, *(p.grad.clone() for p in trained.values())]

    plain, cast = run(amp=False), run(amp=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))

    wanted, leaves = defined(layer, x, 6 / 4**0.5 if options["use_rslora"] else 6 / 4)
    grain = torch.finfo(BF16).eps
    torch.testing.assert_close(plain[0].double(), wanted, rtol=2 * grain, atol=2 * grain)
    (wanted * seed.to(BF16)).sum().backward()  # the gradient comes in the output's type
    of = {id(p): g for p, g in zip(trained.values(), plain[2:], strict=True)}
    down, up, *_ = leaves
    for part, leaf in (
        (layer.lora_A["default"].weight, down),
        (layer.lora_B["default"].weight, up),
    ):
        torch.testing.assert_close(of[id(part)].double(), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_change_no_bit(dtype: torch.dtype, dora: bool) -> None:
    llm = model(dtype=dtype)
    ids = torch.arange(12)[None]
    before = llm.model(input_ids=ids).logits
    add_lora(llm, LoraConfig(targets="all", use_dora=dora))
    assert torch.equal(llm.eval().model(input_ids=ids).logits, before)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_of_what_the_adapters_read(dora: bool) -> None:
    """DoRA's frozen product keeps all of its input, too."""
    layer = adapted(dropout=0.5, use_dora=dora)
    x = torch.randn(4, 32)
    for part in (layer.lora_dropout, layer.lora_A, layer.lora_B):  # as a model sets it
        part.train()
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x)
    assert not torch.equal(dropped, x)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    gain = layer.magnitude / layer.norms() if dora else torch.ones(32)
    frozen = x @ layer.base_layer.weight.T
    wanted = gain * (frozen + 1.5 * dropped @ down.T @ up.T) + layer.base_layer.bias
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_finite() -> None:
    """Padded vocabularies and pruned models have them."""
    layer = adapted(use_dora=True)
    layer.base_layer.weight.data[3] = 0
    layer.lora_B["default"].weight.data[3] = 0
    layer.magnitude.data[3] = 0
    layer(torch.randn(2, 32)).sum().backward()
    grads = [p.grad for p in layer.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in grads)


def test_norms_are_computed_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(use_dora=True)
    whole = layer.norms()
    monkeypatch.setattr("lavis.models.compute.adapted_linear._ROWS", 5)
    torch.testing.assert_close(layer.norms(), whole)


# --- which layers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("qwen2", ("q_proj",), ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ("qwen2", ("layers.1.mlp.up_proj",), ["layers.1.mlp.up_proj"]),
        (
            "phi3",  # one projection for query, key and value
            ("self_attn.qkv_proj", "gate_up_proj"),
            [f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.qkv_proj", "mlp.gate_up_proj")],
        ),
        (
            "gpt_neox",
            ("query_key_value",),
            [f"layers.{i}.attention.query_key_value" for i in (0, 1)],
        ),
    ],
)
def test_targets_are_ends_of_names(family: str, targets: tuple[str, ...], names: list[str]) -> None:
    llm = model(family)
    found = lora_targets(llm, LoraConfig(targets=targets))
    assert [n.partition(".")[2] for n in found] == names
    add_lora(llm, LoraConfig(r=2, targets=targets))
    taken = {n.partition(".lora_A")[0] for n, p in llm.model.named_parameters() if ".lora_A" in n}
    assert taken == set(found)


@pytest.mark.parametrize(
    ("family", "targets", "told"),
    [
        ("phi3", ("q_proj",), r"no layer q_proj; did you mean 'qkv_proj'\? \(there are: down"),
        ("qwen2", ("lm_head",), r"no layer lm_head \(there are: down_proj, gate_proj, k_proj"),
        ("qwen2", ("proj",), "no layer proj"),
        ("qwen2", (), r"no linear layer is named \(there are: down_proj"),
        ("gpt2", "all", r"no linear layer is named \(there are: none\)"),
    ],
)
def test_targets_that_match_nothing(family: str, targets: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        add_lora(model(family), LoraConfig(targets=targets))


def test_dora_of_quantized_weights_is_refused() -> None:
    llm = model()
    layer: Any = llm.model.get_submodule("model.layers.1.self_attn.v_proj")
    layer.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"use_dora: model.layers.1.self_attn.v_proj has quant"):
        add_lora(llm, LoraConfig(use_dora=True))
