"""GGUF files as a converter writes them: a small model, a tokenizer, or both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from tests.processors.families import Family

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "self_attn.o_proj": "attn_output", "self_attn.": "attn_",
    "_proj": "", "mlp.": "ffn_", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    tokenizer: tuple[Family, Path, str, str] | None = None,
    *,
    blocks: str = "F32",
    architecture: str = "qwen2",
) -> Path:
    """Write what is given; skips the test without the ``gguf`` package.

    Args:
        model: a Qwen2, or what ``architecture`` says; its tensors keep their type.
        blocks: type of the layers' matrices, such as ``Q8_0``.
        tokenizer: a family, the folder it was saved in, and GGUF's names for the kind of model
            (``gpt2``, ``llama``) and for how texts are split.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama" if model is None else architecture)
    rows = 0
    if model is not None:
        config = model.config
        rows = config.vocab_size
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(rows)
        for key, tensor in model.state_dict().items():
            name = key
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            kind = gguf.GGMLQuantizationType[
                blocks if tensor.dim() > 1 and "blk" in name else "F32"
            ]
            data = gguf.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    if tokenizer is not None:
        family, folder, kind, splits = tokenizer
        state = json.loads((folder / "tokenizer.json").read_text())
        special = {t["content"]: t["id"] for t in state["added_tokens"]}
        vocab = state["model"]["vocab"] | special
        tokens = sorted(vocab, key=vocab.__getitem__)
        types = [3 if t in special else 6 if t[:3] == "<0x" else 1 for t in tokens]
        tokens += [f"<unused{n}>" for n in range(rows - len(tokens))]
        types += [5] * (len(tokens) - len(types))
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(splits)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
        writer.add_eos_token_id(vocab[family.names["eos_token"]])
        if "bos_token" in family.names:
            writer.add_bos_token_id(vocab[family.names["bos_token"]])
        writer.add_chat_template(family.template)
        if model is None:
            writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
