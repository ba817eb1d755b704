"""Name tables: the original's -> ours -> the original's, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lavis.models.weights.files import open_pth, open_shards
from lavis.models.weights.original import QFORMER, QWEN, VIT, KeyMap, Rule, SourceKey
from tests.conftest import TOY

CKPT = TOY / "cache" / "ckpt"
FILES: dict[str, tuple[KeyMap, Any, tuple[str, ...]]] = {
    "vit": (VIT, lambda: open_pth(CKPT / "eva" / "eva_vit_g.pth"), ("vision.visual_encoder.",)),
    "qformer": (
        QFORMER,
        lambda: open_pth(CKPT / "blip2" / "blip2_pretrained_flant5xxl.pth"),
        ("vision.Qformer.", "vision.ln_vision.", "vision.query_tokens"),
    ),
    "qwen": (QWEN, lambda: open_shards(CKPT / "Qwen7B-chat"), ("language.model.",)),
}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().view(torch.uint8).flatten(),
            other.contiguous().view(torch.uint8).flatten(),
        )
    )


@pytest.mark.parametrize("part", FILES)
def test_round_trip_is_bitwise(part: str, toy_model: Any) -> None:
    """Every tensor of a file is dropped by name or comes back as it was."""
    table, opener, prefixes = FILES[part]
    file = opener()
    names = [n for n in toy_model.state_dict() if n.startswith(prefixes)]
    names = [n.removeprefix("vision." if part == "qformer" else prefixes[0]) for n in names]
    ours = {}
    for name in names:
        source = table.source(name)
        ours[name] = source.cut(file[source.key])
    back = table.to_original(ours)
    kept = {key for key in file if not table.is_dropped(key)}
    assert kept
    assert set(back) == kept
    assert all(same_bits(back[key], file[key]) for key in kept)


def test_the_model_holds_what_the_files_hold(toy_model: Any) -> None:
    """Through the whole-model table, which checkpoints use."""
    state = {n: p.detach() for n, p in toy_model.named_parameters()}
    back = toy_model.key_map.to_original(state)
    seen = set()
    for part, prefix in (("vit", "visual_encoder."), ("qformer", ""), ("qwen", "llm_model.")):
        table, opener, _ = FILES[part]
        for key, tensor in opener().items():
            if not table.is_dropped(key):
                seen.add(prefix + key)
                assert torch.equal(back[prefix + key], tensor.to(back[prefix + key].dtype)), key
    assert set(back) == seen | {"llm_proj.weight", "llm_proj.bias"}


def test_what_is_dropped() -> None:
    assert QFORMER.is_dropped("Qformer.bert.encoder.layer.3.intermediate.dense.weight")
    assert QFORMER.is_dropped("Qformer.bert.encoder.layer.3.output.LayerNorm.bias")
    assert QFORMER.is_dropped("Qformer.cls.predictions.bias")
    assert QFORMER.is_dropped("t5_proj.weight")
    assert not QFORMER.is_dropped("Qformer.bert.encoder.layer.3.output_query.LayerNorm.bias")
    assert not QFORMER.is_dropped("Qformer.bert.encoder.layer.3.crossattention.output.dense.bias")
    assert not QFORMER.is_dropped("query_tokens")
    assert not VIT.is_dropped("blocks.0.norm1.weight")
    assert QWEN.is_dropped("transformer.rotary_emb.inv_freq")
    assert not QWEN.is_dropped("transformer.h.0.attn.c_attn.bias")


def test_a_source_in_three_parts() -> None:
    source = QWEN.source("model.layers.12.self_attn.v_proj.bias")
    assert source == SourceKey("transformer.h.12.attn.c_attn.bias", 2, 3)
    assert source.cut(torch.arange(6)).tolist() == [4, 5]
    assert source.whole((2,)) == (6,)
    assert source.whole((2, 7)) == (6, 7)
    assert SourceKey("x").whole((2, 7)) == (2, 7)


def test_the_gate_and_the_up_projection_are_not_swapped() -> None:
    assert QWEN.source("model.layers.0.mlp.gate_proj.weight").key == "transformer.h.0.mlp.w2.weight"
    assert QWEN.source("model.layers.0.mlp.up_proj.weight").key == "transformer.h.0.mlp.w1.weight"


def test_names_without_a_rule_and_incomplete_parts() -> None:
    table = KeyMap((Rule("x.{}.abc", ("y.{}.a", "y.{}.b")),))
    assert table.source("y.7.b") == SourceKey("x.7.abc", 1, 2)
    with pytest.raises(KeyError, match=r"y\.z\.b"):
        table.source("y.z.b")
    with pytest.raises(KeyError, match=r"x\.7\.abc: 1 of 2 parts given"):
        table.to_original({"y.7.b": torch.ones(1)})
    joined = table.to_original({"y.7.b": torch.tensor([3]), "y.7.a": torch.tensor([5])})
    assert joined["x.7.abc"].tolist() == [5, 3]


def test_a_prefix_on_either_side() -> None:
    table = KeyMap((Rule("a.{}", ("b.{}",)),), dropped=(r"c\..*",)).under("left.", "right.")
    assert table.source("right.b.3").key == "left.a.3"
    assert table.is_dropped("left.c.d")
    assert not table.is_dropped("c.d")
    assert not table.is_dropped("leftxc.d")
