"""A folder of LLaVA or BLIP-2 of Transformers as the parts of a model here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Blip2Config, LlavaConfig

from lavis.common.errors import ConfigError
from lavis.models.weights.shards import folder_files
from lavis.models.weights.stock import read_config

_KEY = "model.from_pretrained"
Blocks = dict[str, dict[str, Any]]
"""What YAML would say of ``vision``, ``connector`` and ``language``."""


def parts_of(folder: Path) -> Blocks:
    """The blocks of a folder's parts, without their ``path``; reads no weight.

    Raises:
        WeightsError: a file is missing or damaged.
        ConfigError: it is of another family, or computes what no part here does.
    """
    list(folder_files(folder, _KEY))
    config = read_config(folder)
    if isinstance(config, LlavaConfig):
        return _of_llava(config)
    if isinstance(config, Blip2Config):
        return _of_blip2(config, folder)
    raise ConfigError(
        f"{_KEY}: {folder} holds {config.model_type}; folders of llava and blip-2 are read whole. "
        "Of others, name what serves: vision: {name: hf, path: ...}, language: {name: hf, ...}"
    )


def _of_llava(config: Any) -> Blocks:
    vision: dict[str, Any] = {"name": "hf"}
    if config.vision_feature_select_strategy == "full" and _has_class_token(config.vision_config):
        vision["class_token"] = "keep"  # noqa: S105  no password
    one = config.projector_hidden_act == "linear"  # two layers without a bend between them
    connector = {"name": "linear"} if one else {"name": "mlp", "depth": 2}
    return {"vision": vision, "connector": connector, "language": {"name": "hf"}}


def _has_class_token(sizes: Any) -> bool:
    return not str(sizes.model_type).startswith(("siglip", "aimv2"))


def _of_blip2(config: Any, folder: Path) -> Blocks:
    sizes, qformer = config.vision_config, config.qformer_config
    wanted = {
        "vision_config.hidden_act": (sizes.hidden_act, "gelu"),
        "vision_config.layer_norm_eps": (sizes.layer_norm_eps, 1e-6),
        "vision_config.qkv_bias": (sizes.qkv_bias, True),
        "qformer_config.hidden_act": (qformer.hidden_act, "gelu"),
        "qformer_config.use_qformer_text_input": (qformer.use_qformer_text_input, False),
    }
    for name, (found, known) in wanted.items():
        if found != known:
            raise ConfigError(f"{_KEY}: {folder}: {name} is {found}; only {known} is computed here")
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps",
        "cross_attention_frequency", "initializer_range",
    )  # fmt: skip
    vision = {
        "name": "eva_qformer",
        "image_size": sizes.image_size,
        "num_query_token": config.num_query_tokens,
        "vit_config": {
            "embed_dim": sizes.hidden_size,
            "depth": sizes.num_hidden_layers,
            "num_heads": sizes.num_attention_heads,
            # The width is what it gives, rounded down.
            "mlp_ratio": (sizes.intermediate_size + 0.5) / sizes.hidden_size,
            "patch_size": sizes.patch_size,
        },
        "qformer_config": {name: getattr(qformer, name) for name in names},
    }
    return {"vision": vision, "connector": {"name": "linear"}, "language": {"name": "hf"}}
