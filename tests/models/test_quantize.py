"""Packed weights: the numbers they stand for, on every path, and what is refused."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lavis.common.errors import ConfigError, WeightsError
from lavis.models.compute.cpu import slow_in_bf16
from lavis.models.compute.head import OutputHead
from lavis.models.compute.quantized_linear import (
    GgufLinear,
    Int8Linear,
    NF4Linear,
    QuantizedLinear,
)
from lavis.models.language.causal import CausalLM
from lavis.models.language.hf import load_hf
from lavis.models.language.proof import prove
from lavis.models.language.quantize import linears, quantize, replace_linears
from tests.gguf_files import write_gguf
from tests.models.test_families import (
    COMMON,
    alone_by,
    check_every_way,
    close,
    documents,
    fast,
    stock,
)

gguf = pytest.importorskip("gguf")
pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
BLOCKS = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# Quantiles of a normal distribution (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def as_nf4(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    rows = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = rows.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4)
    nearest = (rows[..., None] / scale[..., None] - codes).abs().argmin(-1)
    return (codes[nearest] * scale).flatten()[: len(flat)].view(weight.shape)


def as_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def packed(kind: str, linear: nn.Linear) -> QuantizedLinear:
    """A packed layer that stands for about the same weight."""
    if kind != "gguf":
        return {"nf4": NF4Linear, "int8": Int8Linear}[kind].of(linear, CPU)
    number = gguf.GGMLQuantizationType.Q8_0
    rows = torch.from_numpy(gguf.quantize(linear.weight.detach().numpy(), number))
    return GgufLinear((linear.out_features, linear.in_features), linear.bias, int(number), rows)


@pytest.mark.parametrize(("kind", "rounded"), [("nf4", as_nf4), ("int8", as_int8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [192, 96, 32, 50])  # rows share blocks, and the last is short
def test_value_and_gradient(kind: str, rounded: Any, bias: bool, columns: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, 81, bias=bias)
    weight = rounded(linear.weight.detach())
    layer = packed(kind, linear)
    x = torch.randn(3, 7, columns, requires_grad=True)
    grad = torch.randn(3, 7, 81)
    torch.testing.assert_close(layer.dequantize(torch.float32), weight)
    error = (weight - linear.weight).detach().norm() / linear.weight.detach().norm()
    assert float(error) < 0.12
    layer(x).backward(grad)
    torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias))
    torch.testing.assert_close(x.grad, grad @ weight)
    assert not [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_gguf(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    rows = np.random.default_rng(0).integers(0, 256, (6, gguf.GGML_QUANT_SIZES[kind][1] * 2))
    rows = rows.astype(np.uint8)
    with np.errstate(invalid="ignore"):  # random bits are all scales, some of which are no numbers
        wanted = torch.from_numpy(gguf.dequantize(rows, kind))
    layer = GgufLinear(tuple(wanted.shape), None, int(kind), torch.from_numpy(rows))
    got = layer.dequantize(torch.float32)
    assert wanted.isfinite().float().mean() > 0.5
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(layer.dequantize(torch.bfloat16).nan_to_num(), got.bfloat16().nan_to_num())


def test_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed("gguf", nn.Linear(64, 50))
    whole = layer.dequantize(torch.float32)
    monkeypatch.setattr("lavis.models.compute.quantized_linear._UNPACKED", 64 * 7)
    assert torch.equal(layer.dequantize(torch.float32), whole)


@pytest.mark.parametrize("kind", ["nf4", "int8", "gguf"])
def test_no_unpacked_weight_outlives_its_product(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, alive = packed(kind, nn.Linear(64, 64)), []
    linear = F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        alive.append(weakref.ref(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    out = layer(torch.randn(2, 64, requires_grad=True))
    assert len(alive) == 1
    assert alive[0]() is None
    assert out.requires_grad


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_half_changes_no_scale(kind: str) -> None:
    layer = packed(kind, nn.Linear(64, 64))
    before = layer.dequantize(torch.float32)
    assert torch.equal(layer.half().dequantize(torch.float32), before)
    assert layer.bias.dtype == torch.float16


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("int8", 8 + 32 / 256), ("gguf", 8.5)])
def test_bits_of_a_weight(kind: str, bits: float) -> None:
    layer = packed(kind, nn.Linear(256, 128, bias=False))
    assert 8 * sum(b.nbytes for b in layer.buffers()) == bits * 256 * 128
    assert not list(layer.parameters())


def test_on_a_cpu_without_bf16_products_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis.models.compute.quantized_linear.slow_in_bf16", lambda: True)
    seen: list[torch.dtype] = []
    layer = packed("int8", nn.Linear(64, 32))
    x = torch.randn(5, 64).bfloat16()
    monkeypatch.setattr(
        layer, "dequantize", lambda d: seen.append(d) or torch.ones(32, 64, dtype=d)
    )
    assert layer(x).dtype == torch.bfloat16
    assert seen == [torch.float32]


# --- whole models ---------------------------------------------------------------------------


def twins(name: str, kind: str) -> tuple[CausalLM, PreTrainedModel]:
    """A packed model, and the stock one of the same weights unpacked."""
    model = copy.deepcopy(stock(name))
    llm = CausalLM(copy.deepcopy(model))
    if kind == "gguf":
        replace_linears(llm, lambda _, linear: packed("gguf", linear), "gguf")
    else:
        quantize(llm, kind, device=CPU, dtype=None)
    layers = {n: m for n, m in llm.model.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers
    with torch.no_grad():
        for key, layer in layers.items():
            model.get_parameter(f"{key}.weight").copy_(layer.dequantize(torch.float32))
    return prove(llm), model


CASES = [("qwen3", "nf4"), ("gemma2", "nf4"), ("qwen2", "int8"), ("llama", "int8")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_path_gives_what_each_document_gives_alone(name: str, kind: str) -> None:
    llm, model = twins(name, kind)
    assert llm.packs
    wanted_loss, wanted = alone_by(model)
    check_every_way(llm, wanted_loss, wanted)
    for block in llm.blocks():
        block.training = True
    llm.model.activation_checkpointing_enable({"use_reentrant": False}, 1)
    close(fast(llm, prefix=True)[1], wanted)
    assert type(llm.head) is OutputHead
    assert not any(
        isinstance(m, QuantizedLinear) for m in (llm.head, llm.model.get_input_embeddings())
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_folder(kind: str, tmp_path: Path) -> None:
    """Read shard by shard; what stays has the precision asked for, rotary frequencies their own."""
    stock("qwen3").to(torch.float32).save_pretrained(tmp_path, max_shard_size="40KB")
    llm = load_hf(tmp_path, device=CPU, dtype=torch.bfloat16, quantized=kind)
    _, model = twins("qwen3", kind)
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in llm.buffers()} == {torch.uint8, torch.float32}
    assert llm.head.weight is llm.model.get_input_embeddings().weight
    for name, module in llm.model.named_modules():
        if isinstance(module, QuantizedLinear):
            wanted = model.get_parameter(f"{name}.weight")
            assert torch.equal(module.dequantize(torch.float32), wanted), name
    ids = documents()[1]
    with torch.no_grad():
        got, wanted = llm.model(input_ids=ids).logits.float(), model(input_ids=ids).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.05


def test_experts_are_no_linear_layers() -> None:
    llm = CausalLM(copy.deepcopy(stock("mixtral")))
    with pytest.raises(ConfigError, match=r"nf4 packs linear layers, .* MixtralForCausalLM"):
        quantize(llm, "nf4", device=CPU, dtype=None)
    assert linears(llm)


# --- .gguf ----------------------------------------------------------------------------------


def small(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON | {"hidden_size": 64, "intermediate_size": 96})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # llama's queries and keys are permuted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_file_is_the_unpacked_one(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", small(family), blocks="Q4_0", architecture=family)
    llm, dense = (load_hf(path, device=CPU, dtype=dtype, quantized=q) for q in ("gguf", None))
    layers = {n for n, m in llm.model.named_modules() if isinstance(m, GgufLinear)}
    assert layers == set(linears(dense))
    ids = documents()[1]
    # A CPU without bf16 instructions adds the bias of a dense layer after rounding.
    rounds_twice = dtype == torch.bfloat16 and slow_in_bf16()
    most = 2e-2 if rounds_twice else 0.0

    def same(got: Tensor, wanted: Tensor) -> None:
        assert (got - wanted).float().norm() <= most * wanted.float().norm()

    with torch.no_grad():
        same(llm.model(input_ids=ids).logits, dense.model(input_ids=ids).logits)
    for prefix in (True, False):
        (loss, grad), (wanted_loss, wanted) = (fast(m, prefix=prefix) for m in (llm, dense))
        same(torch.tensor(loss), torch.tensor(wanted_loss))
        same(grad, wanted)


def test_files_that_cannot_be_kept(tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with pytest.raises((ConfigError, WeightsError)) as caught:
            load_hf(path, device=CPU, dtype=None, quantized="gguf")
        return str(caught.value)

    model = small("qwen2")
    path = tmp_path / "x.gguf"
    write_gguf(path, model)
    assert "no layer's weight is stored in blocks; leave model.language.quantize out" in told(path)
    write_gguf(path, model, blocks="Q5_0")
    assert "is stored as Q5_0; only IQ1_M" in told(path)
    write_gguf(path, model, blocks="Q8_0")
    path.write_bytes(path.read_bytes()[:-4000])
    assert "x.gguf cannot be read" in told(path)
    model.config.intermediate_size = 80
    write_gguf(path, model, blocks="Q8_0")
    assert "has not the shape" in told(path)
