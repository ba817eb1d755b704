"""A language model from a folder of Transformers, or from a ``.gguf`` file."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lavis.common.errors import ConfigError, WeightsError, listed
from lavis.common.packages import check_packages
from lavis.models.language.causal import CausalLM
from lavis.models.language.proof import prove
from lavis.models.weights.files import open_shards

logger = logging.getLogger(__name__)
_CONSTANTS = re.compile(r".*rotary_emb\.inv_freq")  # that old files hold; computed from the config


def load_hf(path: Path, *, device: torch.device, dtype: torch.dtype | None) -> CausalLM:
    """Load a language model and prove what it can do.

    Args:
        path: a folder with ``config.json`` and weights, or a ``.gguf`` file.
        dtype: ``None`` keeps the type that most weights are stored in.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit.
        ConfigError: the family is not one of this Transformers, or needs code of its own.
    """
    if path.suffix == ".gguf":
        return prove(CausalLM(_load_gguf(path, dtype).to(device)))
    config = read_config(path)
    family, text = _family(config, path)
    weights = dict(open_shards(path))
    if text is not config:
        weights = _text_part(weights)
    weights = {k: v for k, v in weights.items() if not _CONSTANTS.fullmatch(k)}
    model = _fill(family, text, weights, path, dtype or _stored_dtype(weights, path))
    return prove(CausalLM(model.to(device)))


def read_config(folder: Path) -> PreTrainedConfig:
    """A folder's ``config.json``, without running code that may lie beside it.

    Raises:
        WeightsError: the file is missing, not JSON, or holds values of a wrong kind.
        ConfigError: the family is unknown, or the weights are quantized.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"model.language.path: no file {path}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        kind = given.get("model_type")
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is not a JSON object: {error}") from error
    if kind not in CONFIG_MAPPING_NAMES:
        own = " It would need the folder's own code, which is never run." * ("auto_map" in given)
        raise ConfigError(f"{path}: model_type {kind!r} is unknown to Transformers.{own}")
    if given.get("quantization_config"):
        raise ConfigError(f"{path}: the weights are quantized; use the full-precision folder")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library's own checks raise all kinds
        raise WeightsError(f"{path} cannot be used: {_first_line(error)}") from error
    return config


def read_any_config(path: Path) -> PreTrainedConfig:
    """The sizes of the language model in a folder or a ``.gguf`` file.

    Raises:
        WeightsError, ConfigError: as :func:`read_config`.
    """
    config = _gguf_config(path) if path.suffix == ".gguf" else read_config(path)
    text: PreTrainedConfig = _family(config, path)[1]
    return text


def outline(path: Path) -> CausalLM:
    """The language model in a folder or a ``.gguf`` file without its numbers: on no device.

    Raises:
        WeightsError, ConfigError: as :func:`read_config`.
    """
    config = _gguf_config(path) if path.suffix == ".gguf" else read_config(path)
    family, text = _family(config, path)
    with torch.device("meta"):
        return CausalLM(family(text))


def _gguf_config(path: Path) -> PreTrainedConfig:
    if not path.is_file():
        raise WeightsError(f"model.language.path: no file {path}")
    check_packages("gguf", str(path))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # a damaged file fails in many ways
        raise WeightsError(f"{path} cannot be read: {_first_line(error)}") from error
    return config


def _family(config: PreTrainedConfig, path: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of a language model, or of the one inside a model that also sees or hears."""
    text = getattr(config, "text_config", None) or config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{path}: {config.model_type} is no causal language model")
    family: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    return family, text


def _text_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language model's tensors of a larger model, by the names they have alone."""
    inner = re.compile(r"(model\.)?language_model\.|(?=lm_head\.)")
    part = {}
    for key, tensor in weights.items():
        if match := inner.match(key):
            name = key[match.end() :]
            known = name.startswith(("model.", "lm_head."))
            part[name if known else f"model.{name}"] = tensor
    return part


def _stored_dtype(weights: dict[str, Tensor], path: Path) -> torch.dtype:
    """The type that most numbers have.

    Raises:
        ConfigError: types that nothing is computed in.
    """
    numbers: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        numbers[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
    dtype = max(numbers, key=lambda d: numbers[d], default=torch.float32)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(
            f"{path}: the weights are stored as {dtype}; set model.language.precision"
        )
    return dtype


def _fill(
    family: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    path: Path,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build a model around mapped tensors, by the names that the library gives the family's files.

    Raises:
        WeightsError: names are missing or left over, or shapes differ.
    """
    try:
        model, info = family.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # shapes that differ are a RuntimeError, others vary
        raise WeightsError(f"{path} does not fit: {_first_line(error)}") from error
    _check(info, path)
    filled: PreTrainedModel = model
    return filled.eval()


def _check(info: dict[str, Any], path: Path) -> None:
    wrong = []
    for what, names in (
        ("missing", info["missing_keys"]),
        ("not part of the model", info["unexpected_keys"]),
        ("of another shape", [m[0] for m in info["mismatched_keys"]]),
        ("not converted", info.get("error_msgs") or []),
    ):
        if names:
            wrong.append(f"{len(names)} {what}: {listed(sorted(names))}")
    if wrong:
        raise WeightsError(f"{path} does not fit: " + "; ".join(wrong))


def _load_gguf(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model with its weights unpacked.

    Raises:
        WeightsError: there is no such file, or it is damaged.
        ConfigError: the ``gguf`` package is missing.
    """
    from transformers import GgufConfig

    family, text = _family(_gguf_config(path), path)
    try:
        model, info = family.from_pretrained(
            path.parent,
            config=text,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype or "auto",
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # a damaged file fails in many ways
        raise WeightsError(f"{path} cannot be read: {_first_line(error)}") from error
    _check(info, path)
    filled: PreTrainedModel = model
    return filled.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
