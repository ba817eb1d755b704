"""The Q-Former (Li et al. 2023, BLIP-2, section 3.1): its query branch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import Blip2QFormerConfig, Blip2QFormerModel

from lavis.common.errors import ConfigError
from lavis.common.typed import parse
from lavis.models.vision.config import QFormerConfig
from lavis.models.weights.shards import read_json

_FROM_BERT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
)


def qformer_config(
    overrides: QFormerConfig, bert_config: Path, encoder_width: int
) -> Blip2QFormerConfig:
    """Sizes of the Q-Former: BERT-base, then ``bert_config`` if it exists, then ``overrides``.

    Raises:
        WeightsError: ``bert_config`` is not JSON.
        ConfigError: the sizes do not fit each other.
    """
    sizes: dict[str, object] = {}
    if bert_config.is_file():
        file = {k: v for k, v in read_json(bert_config).items() if k in _FROM_BERT}
        sizes = dataclasses.asdict(parse(QFormerConfig, file, "", lambda _: str(bert_config)))
    sizes |= {k: v for k, v in dataclasses.asdict(overrides).items() if v is not None}
    sizes = {k: v for k, v in sizes.items() if v is not None}
    config = Blip2QFormerConfig(**sizes, encoder_hidden_size=encoder_width)
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"model.qformer_config: hidden_size {config.hidden_size} is not divisible by "
            f"num_attention_heads {config.num_attention_heads}"
        )
    return config


def build_qformer(config: Blip2QFormerConfig) -> Blip2QFormerModel:
    """Build the Q-Former on the current default device."""
    config._attn_implementation = "sdpa"
    return Blip2QFormerModel(config)
