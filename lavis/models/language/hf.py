"""A language model from a folder of Transformers, or from a ``.gguf`` file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lavis.common.errors import ConfigError, at
from lavis.models.language.causal import CausalLM
from lavis.models.language.proof import prove
from lavis.models.language.quantize import PackedFile, quantize
from lavis.models.weights.files import (
    open_shards,
    require_float,
    set_final_dtype,
    usual_dtype,
)
from lavis.models.weights.stock import build_stock, read_config, unreadable

T = TypeVar("T")
_CONSTANTS = re.compile(r".*rotary_emb\.inv_freq")  # that old files hold; computed from the config


def load_hf(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    mapped: bool = False,
    quantized: str | None = None,
) -> CausalLM:
    """Load a language model and prove what it can do.

    Args:
        path: a folder with ``config.json`` and weights, or a ``.gguf`` file.
        dtype: ``None`` keeps the type that most weights are stored in.
        mapped: leave weights in their files, and the proof to who shards the model. What fp32
            makes of half precision is then left to :func:`final_dtype`.
        quantized: how the layers hold their weights: ``nf4``, ``int8``, or ``gguf``, as stored.

    Raises:
        WeightsError: a file is missing, damaged, quantized, or does not fit.
        ConfigError: the family is not one of this Transformers, needs code of its own, computes
            in a way that is not known here, or cannot be quantized.
    """
    config = read_config(path)
    family, text = stock_class(config, path)
    widens = False
    if path.suffix != ".gguf":
        weights = dict(open_shards(path))
        if text is not config:
            weights = text_part(weights)
        weights = {k: v for k, v in weights.items() if not _CONSTANTS.fullmatch(k)}
        for name, tensor in weights.items():
            if name.endswith("weight"):  # not the masks and positions that old files hold
                require_float(str(path), name, tensor)
        floats = {t.dtype for t in weights.values() if t.is_floating_point()}
        widens = mapped and dtype == torch.float32 and len(floats) == 1
        as_stored = quantized or widens or dtype is None
        stored = usual_dtype(str(path), weights.values()) if as_stored else dtype
        model = build_stock(family, text, path, state_dict=weights, dtype=stored)
        with at(f"model.language.path: {path}"):
            llm = CausalLM(model)
        if quantized:
            llm = quantize(llm, quantized, device=device, dtype=dtype)
    elif quantized:
        llm = _load_packed(path, family, text, dtype or torch.float32)
    else:
        options: dict[str, Any] = {"dtype": dtype or "auto", "local_files_only": True}
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        llm = CausalLM(build_stock(family, text, path, path.parent, **options))
    llm.eval().to(device)
    if not mapped:
        with at(f"model.language.path: {path}"):
            return prove(llm)
    llm.proven = False
    set_final_dtype(llm.parameters(), torch.float32 if widens else None)
    return llm


def _load_packed(
    path: Path, family: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> CausalLM:
    """The model of a ``.gguf`` file, whose layers keep their blocks as they are stored."""
    with torch.device("meta"):
        skeleton = CausalLM(family(config))
    try:
        packed = PackedFile.read(path, skeleton, dtype)
    except Exception as error:
        raise unreadable(path, error) from error
    llm = CausalLM(build_stock(family, config, path, state_dict=packed.weights, dtype=dtype))
    packed.fill(llm)
    return llm


def stock_class(
    config: PreTrainedConfig, path: Path
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and sizes of a language model, or of the one in a model that also sees or hears.

    Raises:
        ConfigError: there is none.
    """
    text = getattr(config, "text_config", None) or config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{path}: {config.model_type} is no causal language model; name one that writes text"
        )
    family: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    return family, text


def text_part(weights: Mapping[str, T]) -> dict[str, T]:
    """What belongs to the language model in a larger model, by the names it has alone."""
    inner = re.compile(r"(model\.)?language_model\.|(?=lm_head\.)")
    part: dict[str, T] = {}
    for key, tensor in weights.items():
        if match := inner.match(key):
            name = key[match.end() :]
            known = name.startswith(("model.", "lm_head."))
            part[name if known else f"model.{name}"] = tensor
    return part
