"""First-generation Qwen as a stock :class:`transformers.Qwen2ForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.registry import did_you_mean
from lavis.common.schema import Key
from lavis.models.compute.attention import PACKED
from lavis.models.weights.files import load_weights, open_shards
from lavis.models.weights.original import QWEN
from lavis.models.weights.shards import read_json

# What a Qwen-7B-Chat config.json says where a smaller one is made from scratch.
_QWEN_DEFAULTS: dict[str, Any] = {
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "vocab_size": 151936,
}
# Values that Qwen2ForCausalLM cannot express, and the only ones that Qwen's releases have.
_FIXED = ("model_type", "no_bias", "rotary_pct", "scale_attn_weights", "tie_word_embeddings")


@dataclass(frozen=True)
class QwenSpec:
    """A first-generation Qwen, described.

    Attributes:
        config: the equivalent Qwen2 configuration.
        context: longest sequence. Past it, the original changes its attention (log-n scaling and
            dynamic NTK), which Qwen2 does not have.
        original: the ``config.json`` it came from.
    """

    config: Qwen2Config
    context: int
    original: dict[str, Any]


def read_spec(
    folder: Path,
    overrides: dict[str, Any] | None,
    *,
    need_file: bool,
    key: Key = "model.language.{}".format,
) -> QwenSpec:
    """Read ``config.json`` and apply what the configuration sets over it.

    Args:
        key: names the settings ``path`` and ``config`` in messages.

    Raises:
        WeightsError: the file is missing or not JSON.
        ConfigError: the result is not a first-generation Qwen, or an override is unknown.
    """
    path = folder / "config.json"
    original = dict(_QWEN_DEFAULTS)
    if path.is_file():
        original |= read_json(path)
    elif need_file:
        raise WeightsError(f"{key('path')}: no file {path}")
    for name in overrides or {}:
        if name not in original:
            near = did_you_mean(name, original)
            raise ConfigError(f"{key('config')}: unknown key {name!r}{near}")
    original |= overrides or {}
    _check_types(original, f"{path} and {key('config')}" if overrides else str(path))
    if overrides and "kv_channels" not in overrides:
        original["kv_channels"] = original["hidden_size"] // original["num_attention_heads"]
    for name in _FIXED:
        if original[name] != (value := _QWEN_DEFAULTS[name]):
            raise ConfigError(
                f"{path}: {name} is {original[name]!r}; only {value!r} is supported "
                "(a first-generation Qwen such as Qwen-7B-Chat or Qwen-14B-Chat)"
            )
    heads, width = original["num_attention_heads"], original["hidden_size"]
    if original["kv_channels"] * heads != width:
        raise ConfigError(
            f"{path}: kv_channels {original['kv_channels']} x num_attention_heads {heads} is not "
            f"hidden_size {width}"
        )
    config = Qwen2Config(
        vocab_size=original["vocab_size"],
        hidden_size=width,
        intermediate_size=original["intermediate_size"] // 2,
        num_hidden_layers=original["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_act="silu",
        max_position_embeddings=original["seq_length"],
        initializer_range=original["initializer_range"],
        rms_norm_eps=original["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(original["rotary_emb_base"])},
        tie_word_embeddings=False,
        attention_dropout=0.0,
    )
    config._attn_implementation = PACKED
    return QwenSpec(config, original["seq_length"], original)


def _check_types(original: dict[str, Any], where: str) -> None:
    for name, default in _QWEN_DEFAULTS.items():
        value, kind = original[name], type(default)
        is_bool = isinstance(value, bool)
        fits = isinstance(value, int | float if kind is float else kind) and is_bool == (
            kind is bool
        )
        if not fits or (kind in (int, float) and value <= 0):
            wanted = "a positive number" if kind in (int, float) else f"of type {kind.__name__}"
            raise ConfigError(f"{where}: {name} must be {wanted}, not {value!r}")


def load_llm(
    spec: QwenSpec,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    mapped: bool = False,
) -> Qwen2ForCausalLM:
    """Build a language model and fill it from a folder of shards.

    Args:
        dtype: ``None`` keeps the type that most of the weights are stored in.
        mapped: as in :func:`load_weights`.

    Raises:
        WeightsError: a shard is missing, damaged or does not fit.
    """
    with torch.device("meta"):
        llm = Qwen2ForCausalLM(spec.config)
    load_weights(llm, open_shards(folder), QWEN, device=device, dtype=dtype, mapped=mapped)
    # Its frequencies are constants that no file holds.
    llm.model.rotary_emb = type(llm.model.rotary_emb)(spec.config).to(device)
    return llm


def new_llm(
    spec: QwenSpec,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    embedding_std: float | None = None,
) -> Qwen2ForCausalLM:
    """A language model with random weights.

    Args:
        embedding_std: of the token embeddings; default: ``initializer_range``, as all matrices.
    """
    with torch.device(device):
        llm = Qwen2ForCausalLM(spec.config).to(dtype or torch.float32)
    if embedding_std is not None:
        torch.nn.init.normal_(llm.get_input_embeddings().weight, std=embedding_std)
    return llm
