"""Export: everything checked, written beside its place, reloaded, compared, and only then there."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from lavis.common.errors import ConfigError
from lavis.common.paths import makes_folder, require_checkpoint
from lavis.common.registry import MODELS
from lavis.common.schema import Config
from lavis.models.config import PartsConfig
from lavis.models.export.card import write_card
from lavis.models.export.probe import Proof, record, reload
from lavis.models.export.shards import Weight, write_shards
from lavis.models.export.targets import TARGETS, Target
from lavis.models.export.text import IMAGE_TOKEN, stock_template, stock_tokenizer
from lavis.models.generation_settings import GENERATION_DEFAULTS
from lavis.models.language.causal import CausalLM
from lavis.models.language.parts import LanguagePart
from lavis.models.loading import FoundModel
from lavis.models.vision.transforms import RESAMPLE
from lavis.models.vlm import VLM
from lavis.processors.config import CLIP_MEAN, CLIP_STD
from lavis.processors.image import BlipImageEval

logger = logging.getLogger(__name__)
_ROWS = 64  # a vocabulary grows to a multiple of it, which matrix products like


@dataclass(frozen=True)
class Export:
    """What is exported, with all that can be checked before a weight is read checked."""

    config: Config
    target: Target
    described: LanguagePart
    template: str  # in Jinja

    @classmethod
    def of(cls, config: Config, kind: str) -> Export:
        """Check that a run's model can be exported.

        Args:
            kind: ``blip2`` or ``llava``.

        Raises:
            ConfigError, WeightsError: it cannot; the message says why.
        """
        model, root = config.model, config.env.cache_root
        if not isinstance(model, PartsConfig):
            raise ConfigError(f"{config.source}: model.arch: {model.arch} has no parts to export")
        llm = model.parts[2]
        if llm.quantize:
            key = partial(model.key, "language")
            raise ConfigError(
                f"{key('quantize')}: {llm.quantize}: a stock folder holds numbers of 16 or 32 "
                "bits; "
                f"export the run with {key('quantize')} removed and {key('path')} naming the "
                "weights that were quantized (what was trained fits them as well as it fits these)"
            )
        if config.preprocess.tiles.max > 1:
            logger.warning(
                "preprocess.tiles: a stock class shows pictures whole, without their parts"
            )
        model.check_files(root)
        encoder, described, _ = MODELS.get(model.arch).describe(model, root)
        target = TARGETS[kind](model, root, encoder.num_query_token)
        return cls(config, target, described, stock_template(described, target.repeat))

    def write(
        self,
        checkpoint: str | Path,
        out: Path,
        *,
        dtype: torch.dtype | None,
        limit: float,
        device: str,
        scores: Mapping[str, Any] | None = None,
    ) -> Proof:
        """Write the folder and prove it in another process; otherwise nothing is left of it.

        Args:
            dtype: of the weights; ``None`` is the language model's.
            limit: bytes of a shard.
            device: where both models compute.
            scores: an evaluation's report, for the card.

        Raises:
            WeightsError: the checkpoint does not fit, or the folder computes something else.
            ConfigError: as :meth:`of`, of what only weights say.
        """
        tokenizer = stock_tokenizer(self.described)
        image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        found = FoundModel(self.config, require_checkpoint(checkpoint, "--checkpoint"), True)
        model = found.load(device, "--device", "--device cpu")[0]
        self.target.check(model.language)
        dtype = dtype or model.dtype
        text = self._text_config(model, image_id, dtype)
        with makes_folder(out) as folder:
            images = _image_settings(model)
            tokenizer.chat_template = self.template
            tokenizer.model_max_length = model.context
            self.target.processor(images, tokenizer, self.template).save_pretrained(folder)
            tokenizer.save_pretrained(folder)  # BLIP-2's processor leaves the template out
            self._write_configs(model, text, image_id, folder)
            weights = self.target.weights(model, language_weights(model.language, text.vocab_size))
            write_shards(weights, folder, dtype=dtype, limit=limit)
            with record(model, self.target, image_id, dtype, device) as recorded:
                del model, weights
                proof = reload(folder, recorded)
            write_card(folder, out.name, self.config, self.target, proof, scores)
        return proof

    def _text_config(self, model: VLM, image_id: int, dtype: torch.dtype) -> PreTrainedConfig:
        text: Any = copy.deepcopy(self.described.sizes)
        text.dtype = dtype
        rows = model.language.vocab_size
        text.vocab_size = rows if image_id < rows else -(-(image_id + 1) // _ROWS) * _ROWS
        # BLIP-2's generate asks the language model's own configuration where to stop.
        text.eos_token_id = list(model.encoder.template.stops)
        text.pad_token_id = model.tokenizer.pad_id
        return text

    def _write_configs(
        self, model: VLM, text: PreTrainedConfig, image_id: int, folder: Path
    ) -> None:
        config = self.target.config(model, text, image_id)
        config.architectures = [self.target.family.__name__]
        config.dtype = text.dtype
        config.save_pretrained(folder)
        GenerationConfig(
            do_sample=False,
            max_new_tokens=GENERATION_DEFAULTS["max_new_tokens"],
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            bos_token_id=text.bos_token_id,
            suppress_tokens=[image_id],
        ).save_pretrained(folder)


def language_weights(language: CausalLM, rows: int) -> dict[str, Weight]:
    """A language model's weights by its stock names, adapters merged, tied ones once.

    Args:
        rows: of embeddings and head. New ones are the mean of the others, so that the logit of a
            token that is none is the mean of all logits and never the largest.
    """
    llm: Any = language.model
    adapted: dict[str, Any] = {n: m for n, m in llm.named_modules() if hasattr(m, "merged")}
    embeddings: Any = llm.get_input_embeddings()
    grown = {id(t) for t in (embeddings.weight, language.head.weight, language.head.bias)}
    weights: dict[str, Weight] = {}
    seen: set[int] = set()
    for name, tensor in llm.state_dict(keep_vars=True).items():
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        shape = tuple(tensor.shape)
        layer, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            merged = partial(adapted[layer].merged, tensor)
            weights[f"{layer}.weight"] = Weight(shape, merged)
        elif id(tensor) in grown and shape[0] < rows:
            weights[name] = Weight((rows, *shape[1:]), partial(_grow, tensor, rows))
        else:
            weights[f"{layer}.{kind}" if kind else name] = Weight.of(tensor)
    return weights


def _grow(tensor: Tensor, rows: int) -> Tensor:
    grown = tensor.new_empty(rows, *tensor.shape[1:])
    grown[: len(tensor)] = tensor.detach()
    # In pieces: all of it in fp32 would be twice the memory.
    sums = [part.sum(0, dtype=torch.float32) for part in tensor.detach().split(1024)]
    grown[len(tensor) :] = torch.stack(sums).sum(0) / len(tensor)
    return grown


def _image_settings(model: VLM) -> dict[str, Any]:
    """How images are prepared, as Transformers' image processors take it.

    Raises:
        ConfigError: not as they do it.
    """
    made = model.vis_processor
    if not isinstance(made, BlipImageEval):
        raise ConfigError(
            "preprocess.vis_processor.eval must be blip_image_eval: what else prepares images has "
            "no image processor of Transformers"
        )
    given = replace(made.config, image_size=made.config.image_size or made.image_size)
    return {
        "size": {"height": given.image_size, "width": given.image_size},
        "image_mean": list(given.mean or CLIP_MEAN),
        "image_std": list(given.std or CLIP_STD),
        "resample": {v: k for k, v in RESAMPLE.items()}[given.interpolation or "bicubic"],
    }
