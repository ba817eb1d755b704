"""Settings that a checkpoint was trained with, compared with those of the model that loads it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import PurePath
from typing import Any

from lavis.common import dist
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.schema import ModelConfig
from lavis.common.typed import parse
from lavis.models.config import PartsConfig

logger = logging.getLogger(__name__)
_REFUSED = (
    "lora_r", "lora_alpha", "lora_use_rslora", "lora_use_dora", "image_size", "num_query_token",
    "vit_model", "vit_config", "qformer_config",
)  # fmt: skip
_WARNED = ("llm_model", "vit_weights", "pretrained", "vit_precision")  # of paths, the last part
_WARNED_IN_TRAINING = ("lora_dropout", "label_mask", "max_txt_len")
# By the keys of ``arch: vlm``. Whatever is not in one of the next three changes what weights mean.
_WARNED_OF_PARTS = (
    "vision.vit_weights", "vision.pretrained", "vision.vit_precision", "vision.path",
    "vision.precision", "language.",
)  # fmt: skip
_LORA = "train.language.lora."
_TRAINED_OF_PARTS = (f"{_LORA}dropout", "label_mask", "max_txt_len")
_FREE_OF_PARTS = (
    "vision.bert_config", "vision.drop_path_rate", "vision.enable_autocast", "vision.from_scratch",
    "vision.use_grad_checkpoint", "connector.init", "connector.path", "language.name",
    "language.precision",
    "language.grad_ckpt", "language.device_map", "language.config", "language.embedding_std",
    "language.from_scratch",
)  # fmt: skip
_TOWER = re.compile(r"(?<=^vision\.)towers\.\d+\.")
_FREE = ("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob")


def saved_settings(content: object, section: str) -> dict[str, Any]:
    """A section of the configuration in a checkpoint; empty if it has none of our shape."""
    config = content.get("config") if isinstance(content, dict) else None
    settings = config.get(section) if isinstance(config, dict) else None
    return settings if isinstance(settings, dict) else {}


def check_settings(
    label: object,
    content: object,
    config: ModelConfig,
    *,
    training: bool = False,
    new_adapters: bool = False,
) -> None:
    """Compare a checkpoint's settings with a model's; what cannot be compared passes.

    Args:
        label: names the checkpoint in messages.
        content: what the file holds.
        training: whether training goes on from it.
        new_adapters: whether adapters may be new here, which it was trained without.

    Raises:
        WeightsError: its weights would compute something else here than where they were trained.
    """
    saved = saved_settings(content, "model")
    if isinstance(config, PartsConfig) and "vlm" in (config.arch, saved.get("arch")):
        if (theirs_config := _parsed(saved)) is not None:
            theirs, ours = _of_parts(theirs_config), _of_parts(config)
            if new_adapters and theirs_config.lora is None:
                ours = {k: v for k, v in ours.items() if not k.startswith(_LORA)}
            _check_parts(label, theirs, ours, training=training)
        else:
            logger.info("%s does not say how it was trained: settings are not compared", label)
        return
    if saved:
        saved = {f.name: f.default for f in fields(config) if f.default is not MISSING} | saved
    else:
        logger.info("%s does not say how it was trained: settings are not compared", label)
    theirs, ours = _flat(saved), _flat(vars(config))
    wrong: list[str] = []
    rank, lora = _lora_rank(content), ours.get("get_lora")
    if rank is not None:
        theirs |= {"get_lora": True, "lora_r": rank}  # the tensors know best
        wrong = ["get_lora", "lora_r", "lora_alpha"] if lora is False else []
        wrong += [k for k in ("lora_use_rslora", "lora_use_dora") if wrong and theirs.get(k)]
    for key in ours:
        if _agree(theirs.get(key), ours[key]) or key.endswith(_FREE):
            continue
        if key.startswith("lora_") and (rank is None or not lora):
            continue
        if key.partition(".")[0] in _REFUSED:
            wrong.append(key)
        elif dist.is_main() and key in _WARNED + _WARNED_IN_TRAINING * training:
            logger.warning("%s: model.%s was %s, now %s", label, key, theirs[key], ours[key])
    if wrong:
        told = (
            f"model.{k}: {str(theirs.get(k, 'as in training')).replace('True', 'true')} "
            f"(now {str(ours[k]).replace('False', 'false')})"
            for k in wrong
        )
        raise WeightsError(f"{label} was trained with other settings; set {', '.join(told)}")


def _parsed(saved: dict[str, Any]) -> PartsConfig | None:
    """A configuration of parts, if these settings make one."""
    try:
        config = parse(ModelConfig, saved, "model", str)
    except ConfigError:
        return None
    return config if isinstance(config, PartsConfig) else None


def _check_parts(
    label: object, theirs: dict[str, Any], ours: dict[str, Any], *, training: bool
) -> None:
    """Compare what :func:`_of_parts` gives of two models, whichever keys they were written with."""
    wrong = []
    for key in sorted(theirs.keys() | ours.keys()):
        then, now = theirs.get(key, "nothing"), ours.get(key, "nothing")
        setting = _TOWER.sub("", key)
        if _same(then, now) or setting.startswith(_FREE_OF_PARTS):
            continue
        if key.endswith(_FREE) or (key.endswith("lora.targets") and "all" in (then, now)):
            continue  # the adapters' names are compared when they are loaded
        warned = setting.startswith(_WARNED_OF_PARTS)
        if warned or key in _TRAINED_OF_PARTS:
            if dist.is_main() and (warned or training):
                logger.warning("%s: model.%s was %s, now %s", label, key, then, now)
        else:
            wrong.append(f"model.{key}: {then} (now {now})")
    if wrong:
        raise WeightsError(f"{label} was trained with other settings; set {', '.join(wrong)}")


def _of_parts(config: PartsConfig) -> dict[str, Any]:
    """The settings of a model of parts, by the keys of ``arch: vlm``."""
    flat: dict[str, Any] = {"max_txt_len": config.max_txt_len, "label_mask": config.label_mask}
    for name, part in zip(("vision", "connector", "language"), config.parts, strict=True):
        flat |= {f"{name}.{k}": v for k, v in _flat(vars(part)).items()}
    if (lora := config.lora) is not None:
        flat |= {_LORA + k: v for k, v in vars(lora).items()}
        if lora.targets != "all":
            flat[f"{_LORA}targets"] = sorted(lora.targets)
    return flat


def _same(one: object, other: object) -> bool:
    """Whether two values are the same; of paths, the last part."""
    if isinstance(one, str) and isinstance(other, str):
        return PurePath(one).name == PurePath(other).name
    return one == other


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of nested sections under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = vars(value) if is_dataclass(value) else value
        if isinstance(inner, tuple) and any(map(is_dataclass, inner)):
            inner = dict(enumerate(inner))
        if isinstance(inner, dict):
            flat |= {f"{key}.{k}": v for k, v in _flat(inner).items()}
        else:
            flat[key] = inner
    return flat


def _agree(theirs: object, own: object) -> bool:
    """Whether two values mean the same, or are of kinds that cannot be compared."""
    alike = any(isinstance(theirs, k) and isinstance(own, k) for k in (str, int | float))
    return not alike or _same(theirs, own)


def _lora_rank(content: object) -> int | None:
    state = content.get("model", content) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    return next((t.shape[0] for name, t in items if ".lora_A." in str(name)), None)
