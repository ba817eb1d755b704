"""Every family of language models gives on the fast path what it gives by itself.

The oracle is the stock model with its own eager attention, one document after the other, from ids.
"""

from __future__ import annotations

import copy
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import lavis.chat.cache
from lavis.chat.cache import ConversationCache
from lavis.common.errors import ConfigError, WeightsError
from lavis.models.compute.attention import PACKED, Documents, packed_attention
from lavis.models.language.causal import CausalLM
from lavis.models.language.hf import load_hf
from lavis.models.language.proof import prove
from lavis.models.weights.files import open_shards
from tests.gguf_files import write_gguf

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, **MIXED},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "llama": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "ministral": {"head_dim": 12, **MIXED},
    "ministral3": {"head_dim": 12},
    "gemma": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **MIXED
    },
    "gemma3_text": {"head_dim": 12, "tie_word_embeddings": True, **MIXED},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "granite": {
        "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "internlm3": {},
    "cohere2": {"logit_scale": 0.25, "tie_word_embeddings": True, **MIXED},
    "gpt_neox": {"rotary_pct": 0.5},
    "starcoder2": {"sliding_window": 4},
    "glm4": {"head_dim": 12, "partial_rotary_factor": 0.5},
    "exaone4": MIXED,
    "gpt_oss": {"head_dim": 12, **MOE, **MIXED},
    "qwen3_moe": {"head_dim": 12, "moe_intermediate_size": 16, **MOE},
    "mixtral": {"sliding_window": 4, **MOE},
    "llama4_text": {
        "head_dim": 12, "attention_chunk_size": 4, "num_local_experts": 2,
        "intermediate_size_mlp": 32,
        "layer_types": ["chunked_attention", "full_attention"],
    },
}  # fmt: skip
APART: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {},
    "stablelm": {},  # its layers do not pass on which documents there are
}
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS, P = (5, 13, 9), 3


@cache
def stock(name: str) -> PreTrainedModel:
    """A small model with random weights, large enough that everything matters."""
    options = COMMON | (FAMILIES | APART)[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **options), attn_implementation="eager", dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


@cache
def proved(name: str) -> CausalLM:
    return prove(CausalLM(copy.deepcopy(stock(name))))


def documents() -> list[Tensor]:
    """(1, N) ids that begin alike."""
    torch.manual_seed(1)
    ids = [torch.randint(3, 97, (1, n)) for n in LENGTHS]
    for row in ids:
        row[:, :P] = ids[0][:, :P]
    return ids


def close(got: Tensor, wanted: Tensor) -> None:
    error = float((got - wanted).norm() / wanted.norm())
    assert error <= 1e-5, error


@cache
def alone(name: str) -> tuple[float, Tensor]:
    return alone_by(stock(name))


def alone_by(model: PreTrainedModel) -> tuple[float, Tensor]:
    """Loss of what follows the prefix, and the gradient of the embeddings, by the stock model."""
    loss, grads = 0.0, []
    for ids in documents():
        embeds = model.get_input_embeddings()(ids).clone()
        after = embeds[:, P:].requires_grad_()
        logits = (
            model(inputs_embeds=torch.cat([embeds[:, :P], after], 1), use_cache=False)
            .logits[0]
            .float()
        )
        one = F.cross_entropy(logits[P:-1], ids[0, P + 1 :], reduction="sum")
        grads.append(torch.autograd.grad(one, after)[0])
        loss += one.item()
    return loss, torch.cat(grads, 1)


def fast(llm: CausalLM, *, prefix: bool, square: bool = False, plain_head: bool = False) -> Any:
    """The same on the fast path."""
    ids, skipped = documents(), P * prefix
    row = torch.cat([x[:, skipped:] for x in ids], 1)
    positions = torch.cat([torch.arange(skipped, n) for n in LENGTHS])[None]
    first = llm.prefix(ids[0][:, :P])[1] if prefix else ()
    lengths = tuple(n - skipped for n in LENGTHS)
    embeds = llm.embed(row).clone().requires_grad_()
    hidden = llm.hidden(embeds, positions, documents=Documents(lengths, first, square))[0]
    supervised = torch.cat([(torch.arange(n) >= P) & (torch.arange(n) < n - 1) for n in LENGTHS])
    targets = torch.cat([F.pad(x[0, 1:], (0, 1)) for x in ids])[supervised]
    kept = torch.cat([torch.arange(n) >= skipped for n in LENGTHS])
    hidden = hidden[supervised[kept]]
    if plain_head:
        loss = F.cross_entropy(llm.logits(hidden), targets, reduction="sum")
    else:
        loss = llm.loss(hidden, targets)
    (grad,) = torch.autograd.grad(loss, embeds)
    return loss.item(), grad[:, positions[0] >= P]


def check_every_way(llm: CausalLM, wanted_loss: float, wanted: Tensor) -> None:
    """Prefix or not, chunked head or plain, apart or under a square mask: one loss and gradient."""
    ways: list[dict[str, bool]] = [
        {"prefix": False},
        {"prefix": True},
        {"prefix": True, "plain_head": True},
        {"prefix": True, "square": True},
    ]
    for way in ways:
        loss, grad = fast(llm, **way)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), way
        close(grad, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_after_a_prefix_as_each_alone(name: str) -> None:
    llm = proved(name)
    assert llm.packs
    assert llm.caches
    assert llm.chunked == (name not in ("gemma2", "phi"))
    wanted_loss, wanted = alone(name)
    check_every_way(llm, wanted_loss, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_as_kept(name: str) -> None:
    llm = proved(name)
    llm.model.activation_checkpointing_enable({"use_reentrant": False}, 1)
    computed: list[int] = []
    inner = [next(block.children()) for block in llm.blocks()]
    hooks = [m.register_forward_pre_hook(lambda *_: computed.append(1)) for m in inner]
    try:
        for block in llm.blocks():
            block.training = True
        loss, grad = fast(llm, prefix=True)
        # The prefix, the row, and the row again.
        assert len(computed) == 3 * llm.model.config.num_hidden_layers
    finally:
        llm.model.activation_checkpointing_disable()
        llm.eval()
        for hook in hooks:
            hook.remove()
    assert loss == pytest.approx(alone(name)[0], rel=1e-5)
    close(grad, alone(name)[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_that_grows_and_rolls_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room in the buffers, what was there before, and their growth leave no trace."""
    monkeypatch.setattr(lavis.chat.cache, "_BLOCK", 7)
    llm, ids = proved(name), documents()[1]
    held = ConversationCache()
    rows: list[Tensor] = []

    def read(start: int, end: int, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            positions = torch.arange(start, end)[None]
            return llm.hidden(llm.embed(tokens[:, start:end]), positions, cache=held)

    rows.append(read(0, 4, ids))
    read(4, 9, ids.flip(1))  # an answer that is taken back
    held.truncate(4)
    rows.extend(read(i, i + 1, ids) for i in range(4, 8))
    rows.append(read(8, 13, ids))
    with torch.no_grad():
        wanted = stock(name)(input_ids=ids).logits
        close(llm.logits(torch.cat(rows, 1)), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_loaded_and_asked(name: str, tmp_path: Path) -> None:
    """Loaded here and by the library: identical logits, the same greedy answer."""
    stock(name).save_pretrained(tmp_path, max_shard_size="40KB")
    llm = load_hf(tmp_path, device=torch.device("cpu"), dtype=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for (key, ours), (_, value) in zip(
        llm.model.named_buffers(), theirs.named_buffers(), strict=True
    ):
        assert torch.equal(ours, value), key
    tied = bool(theirs.config.tie_word_embeddings)
    assert (llm.head.weight is llm.model.get_input_embeddings().weight) == tied
    ids = documents()[1]
    settings = GenerationConfig(max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    wanted = theirs.generate(ids, generation_config=settings)
    row, held = ids, ConversationCache()
    with torch.no_grad():
        close(llm.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
        for _ in range(6):
            positions = torch.arange(row.shape[1])[None, held.get_seq_length() :]
            new = row[:, held.get_seq_length() :]
            hidden = llm.hidden(llm.embed(new), positions, cache=held)
            row = torch.cat([row, llm.logits(hidden[:, -1:])[0].argmax(-1, keepdim=True)], 1)
    assert row.tolist() == wanted.tolist()
    # Two prompts of different lengths, padded on the left, by the packed attention's own model.
    prompts = torch.zeros(2, 13, dtype=torch.int64)
    prompts[0], prompts[1, 8:] = ids[0], ids[0, 4:9]
    mask = (torch.arange(13) >= torch.tensor([[0], [8]])).long()
    answers = [
        m.generate(prompts, attention_mask=mask, generation_config=settings)
        for m in (llm.model, theirs)
    ]
    assert answers[0].tolist() == answers[1].tolist()


@pytest.mark.parametrize("name", APART)
def test_a_family_that_cannot_pack_is_found_out(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lavis"):
        llm = prove(CausalLM(copy.deepcopy(stock(name))))
    assert not llm.packs
    assert not llm.caches
    assert sum("documents are computed one by one" in r.message for r in caplog.records) == 1
    loss, grad = fast(llm, prefix=False)
    assert loss == pytest.approx(alone(name)[0], rel=1e-5)
    close(grad, alone(name)[1])
    with pytest.raises(ConfigError, match="takes no prefix"):
        llm.hidden(
            torch.zeros(1, 2, 32),
            torch.arange(2)[None],
            documents=Documents((2,), ((None,),)),  # type: ignore[arg-type]
        )


def test_image_positions_are_no_tokens() -> None:
    llm = proved("llama")
    ids = torch.tensor([[5, 97, 4000, -1]])
    assert torch.equal(llm.embed(ids)[0, 0], llm.embed(ids[:, :1])[0, 0])
    assert llm.embed(ids).shape == (1, 4, llm.width)


def test_a_context_ends_where_frequencies_change() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "phi3", **COMMON, rope_parameters=rope, original_max_position_embeddings=16
    )
    assert CausalLM(AutoModelForCausalLM.from_config(config)).context == 16
    assert proved("phi3").context == 128


@pytest.mark.parametrize(
    "more", [{"position_bias": torch.zeros(1)}, {"is_causal": False}, {"sliding_window": 3}]
)
def test_what_attention_does_not_know_is_refused(more: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ConfigError, match=r"attention knows no|cannot be applied"):
        packed_attention(torch.nn.Module(), q, q, q, None, documents=Documents((4,)), **more)
    with pytest.raises(ConfigError, match="attention knows no 'temperature'"):
        packed_attention(torch.nn.Module(), q, q, q, None, temperature=2.0)


def test_no_square_mask_is_made_for_a_packed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of documents at most, and none at all without windows."""
    llms = proved("llama"), proved("ministral")
    made: list[int] = []
    sdpa_mask = lavis.models.compute.masks.sdpa_mask

    def counting(**arguments: Any) -> Any:
        made.append(arguments["q_length"])
        return sdpa_mask(**arguments)

    monkeypatch.setattr("lavis.models.compute.masks.sdpa_mask", counting)
    fast(llms[0], prefix=True)
    assert max(made) == P  # the prefix's own
    made.clear()
    fast(llms[1], prefix=True)
    assert set(made) == {P, *(n - P for n in LENGTHS)}


def _folder(tmp_path: Path, name: str = "llama") -> Path:
    stock(name).save_pretrained(tmp_path)
    return tmp_path


def test_weights_are_mapped_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_shards(_folder(tmp_path))
    mapped = dict(opened)
    monkeypatch.setattr("lavis.models.language.hf.open_shards", lambda folder: mapped)
    llm = load_hf(tmp_path, device=torch.device("cpu"), dtype=None)
    for name, parameter in llm.model.named_parameters():
        assert parameter.data_ptr() == mapped[name].data_ptr(), name
    half = load_hf(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_type": "internlm2", "auto_map": {"AutoConfig": "x.Y"}}, ConfigError, "never run"),
        ({"model_type": "vit"}, ConfigError, "vit is no causal language model"),
        ({"quantization_config": {"quant_method": "awq"}}, ConfigError, "quantized"),
        ({"num_hidden_layers": 3}, WeightsError, "9 missing: model.layers.2"),
        ({"num_hidden_layers": 1}, WeightsError, "9 not part of the model: model.layers.1"),
        ({"intermediate_size": 40}, WeightsError, "does not fit"),
        ({"hidden_size": "wide"}, WeightsError, "config.json cannot be used"),
    ],
)
def test_a_folder_that_does_not_fit(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    path = _folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=says):
        load_hf(tmp_path, device=torch.device("cpu"), dtype=None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_stored_types(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Most numbers say which one is kept; what would need a scale is refused whatever is asked."""
    file = _folder(tmp_path) / "model.safetensors"
    weights = load_file(file)
    save_file({k: t.double() if t.ndim > 1 else t for k, t in weights.items()}, file)
    llm = load_hf(tmp_path, device=torch.device("cpu"), dtype=dtype)
    assert {p.dtype for p in llm.parameters()} == {dtype or torch.float32}
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, file)
    with pytest.raises(WeightsError, match=rf"{name} is stored as torch\.int8: quantized"):
        load_hf(tmp_path, device=torch.device("cpu"), dtype=dtype)


def test_what_cannot_be_computed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr("lavis.models.language.proof._stock", refuse)
    with pytest.raises(ConfigError) as caught:
        load_hf(_folder(tmp_path), device=torch.device("cpu"), dtype=None)
    assert str(caught.value) == (
        f"model.language.path: {tmp_path}: LlamaForCausalLM does not run here: RuntimeError: no "
        "kernel; take a language model of another family"
    )


def test_the_language_model_inside_a_larger_one(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = stock("gemma3_text")
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config=vision)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.save_pretrained(tmp_path)
    llm = load_hf(tmp_path, device=torch.device("cpu"), dtype=None)
    ids = documents()[1]
    with torch.no_grad():
        close(llm.model(input_ids=ids).logits, text(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["phi", "gemma2", "gpt_oss"])
def test_padding_in_half_precision(name: str) -> None:
    """Rows of padding see nothing at all; what they become must not reach the prompt."""
    ids = documents()[1][:, :5]
    row, mask = F.pad(ids, (8, 0)), F.pad(torch.ones(1, 5).long(), (8, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    llm = CausalLM(copy.deepcopy(stock(name)).to(torch.bfloat16))
    with torch.no_grad():
        got = llm.hidden(llm.embed(row), positions, mask=mask)[:, 8:].float()
        wanted = llm.hidden(llm.embed(ids), positions[:, 8:]).float()
    assert float((got - wanted).norm() / wanted.norm()) < 0.03


def test_a_gguf_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **COMMON, rope_theta=10000.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    path = write_gguf(tmp_path / "small.gguf", model)
    llm = load_hf(path, device=torch.device("cpu"), dtype=None)
    ids = documents()[1]
    with torch.no_grad():
        close(llm.model(input_ids=ids).logits, model(input_ids=ids).logits)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(WeightsError, match=r"small\.gguf cannot be read"):
        load_hf(path, device=torch.device("cpu"), dtype=None)
    with pytest.raises(WeightsError, match="no file"):
        load_hf(tmp_path / "other.gguf", device=torch.device("cpu"), dtype=None)


def test_packed_attention_is_in_force() -> None:
    assert all(proved(n).model.config._attn_implementation == PACKED for n in FAMILIES)
