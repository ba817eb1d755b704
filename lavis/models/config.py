"""What ``model`` may hold in YAML: parts by name (``arch: vlm``), or the original's keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.packages import check_packages
from lavis.common.paths import cache_path, require
from lavis.common.registry import (
    CONNECTORS,
    LANGUAGE_MODELS,
    Registry,
    did_you_mean,
)
from lavis.common.schema import ImageTransform, Key, ModelConfig, PartConfig, RunConfig
from lavis.common.typed import Checked, ranged
from lavis.models.vision.config import EvaQFormerConfig, VisionConfig
from lavis.models.weights.shards import check_download, folder_files, llm_files

Precision = Literal["auto", "fp16", "bf16", "fp32"]


@dataclass(frozen=True)
class LoraConfig(Checked):
    """Low-rank adapters of the language model (Hu et al. 2021).

    The scale is ``alpha / r``, or with ``use_rslora`` ``alpha / sqrt(r)`` (Kalajdzievski 2023);
    ``use_dora`` also learns the norm of each row (Liu et al. 2024).
    """

    r: int = ranged(8, least=1)
    alpha: int = ranged(32, least=1)
    dropout: float = ranged(0.05, least=0, below=1)
    targets: tuple[str, ...] | Literal["all"] = ("q_proj", "v_proj")  # all: every linear layer
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class PartTraining:
    """How a part learns; what is not given is ``run``'s."""

    lr: float | None = None
    weight_decay: float | None = None
    parts: tuple[str, ...] = ()  # of the part, only these; the vision encoder says which it has
    lora: LoraConfig | None = None  # of the language model: adapters learn in place of weights
    # a schedule of its own; of run's rates that are not given, it takes lr's share
    lr_sched: str | None = None
    min_lr: float | None = None
    warmup_lr: float | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    lr_decay_rate: float | None = None

    def schedule(self, run: RunConfig, share: float) -> RunConfig | None:
        """The run's settings with this part's schedule, if it has one.

        Args:
            share: of ``run.init_lr`` at which the part learns.

        Raises:
            ConfigError: a value out of its range.
        """
        names = "lr_sched", "min_lr", "warmup_lr", "warmup_steps", "warmup_ratio", "lr_decay_rate"
        given: dict[str, Any] = {k: v for k in names if (v := getattr(self, k)) is not None}
        if not given:
            return None
        if "warmup_steps" in given:
            given.setdefault("warmup_ratio", None)
        if "lr_sched" in given:  # what the run's schedule decays to is not for another one
            given = {"min_lr": 0.0, "lr_decay_rate": 1.0} | given
        rates = {k: getattr(run, k) * share for k in ("init_lr", "min_lr", "warmup_lr")}
        return replace(run, **rates | given)


@dataclass(frozen=True)
class ConnectorConfig(PartConfig):
    """What every connector's block may hold.

    ``init`` is how large its output is before training: ``embeddings`` makes it as large as the
    language model's token embeddings, for features of variance 1; ``pytorch`` leaves PyTorch's.
    With ``path``, a folder of LLaVA or BLIP-2, it begins as the projector there.
    """

    REGISTRY: ClassVar[Registry[Any]] = CONNECTORS

    init: Literal["embeddings", "pytorch"] = "embeddings"
    path: str | None = None

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        if self.path is not None:
            yield from folder_files(cache_path(self.path, cache_root), key("path"))


@dataclass(frozen=True)
class LinearConfig(ConnectorConfig):
    """``connector: {name: linear}``."""


@dataclass(frozen=True)
class MlpConfig(ConnectorConfig):
    """``connector: {name: mlp}``: linear layers with GELU between them."""

    depth: int = ranged(2, least=1)


@dataclass(frozen=True)
class MergeConfig(MlpConfig):
    """``connector: {name: merge}``: squares of features concatenated, then an MLP."""

    size: int = ranged(2, least=2)


@dataclass(frozen=True)
class PoolConfig(MergeConfig):
    """``connector: {name: pool}``: means of squares of features, then an MLP."""


@dataclass(frozen=True)
class ResamplerConfig(ConnectorConfig):
    """``connector: {name: resampler}``: learned queries attend to the features."""

    queries: int = ranged(64, least=1)
    depth: int = ranged(2, least=1)


@dataclass(frozen=True)
class LanguageConfig(PartConfig):
    """What every language model's block may hold."""

    REGISTRY: ClassVar[Registry[Any]] = LANGUAGE_MODELS

    path: str = ""
    precision: Precision = "auto"  # auto: as stored
    grad_ckpt: bool = False
    device_map: Literal["cpu", "auto"] = "cpu"  # auto: spread over the visible GPUs
    quantize: Literal["nf4", "int8", "gguf"] | None = None  # the layers; gguf: as they are stored

    def __post_init__(self) -> None:
        super().__post_init__()
        packed = self.path.endswith(".gguf")
        if self.quantize == "gguf" and not packed:
            raise ConfigError(
                "quantize: gguf keeps the blocks of a .gguf file, which path does not name; "
                "nf4 and int8 quantize a folder's weights"
            )
        if self.quantize in ("nf4", "int8") and packed:
            raise ConfigError(
                f"quantize: {self.quantize} would quantize a .gguf file a second time; "
                "quantize: gguf keeps its blocks"
            )


@dataclass(frozen=True)
class Qwen1Config(LanguageConfig):
    """``language: {name: qwen1}``: first-generation Qwen."""

    config: dict[str, Any] | None = None  # over its config.json
    embedding_std: float | None = None  # from scratch; default: initializer_range
    from_scratch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize and self.from_scratch:
            raise ConfigError("quantize: a language model from scratch has no weights to quantize")

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        folder = cache_path(self.path, cache_root)
        return llm_files(folder, key("path"), weights=not self.from_scratch)


@dataclass(frozen=True)
class HfConfig(LanguageConfig):
    """``language: {name: hf}``: any causal language model of Transformers.

    ``path`` is a folder or a ``.gguf`` file. ``template`` names a class of one's own in place of
    the tokenizer's chat template, ``system`` a system prompt in place of the template's.
    """

    system: str | None = None
    template: str | None = None  # pkg.module:Class
    thinking: bool = False  # templates that think before they answer: leave that in

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path is missing: a language model's folder or .gguf file")
        super().__post_init__()

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        path = cache_path(self.path, cache_root)
        if path.suffix != ".gguf":
            return folder_files(path, key("path"))
        check_packages("gguf", f"{key('path')}: {self.path}")
        return iter((require(path, key("path"), WeightsError),))


@dataclass(frozen=True)
class PartsConfig(ModelConfig):
    """What a model is assembled from: the same for all spellings.

    Attributes:
        vision, connector, language: the parts.
        train: how each part learns that does; what is not named is frozen.
        WITHOUT_LORA: what to do about adapters that should not be, for messages.
    """

    LEARNS_BY: ClassVar[str] = "model.train"
    WITHOUT_LORA: ClassVar[str] = "remove model.train.language.lora"

    model_type: str = ""
    load_finetuned: bool = False
    finetuned: str | None = None
    max_txt_len: int = ranged(512, least=1)
    label_mask: Literal["chatml_delimiters", "assistant_only"] = "chatml_delimiters"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_finetuned and not self.finetuned:
            raise ConfigError("load_finetuned is true but finetuned names no checkpoint")
        for part, training in self.training.items():
            self._check_training(part, training)

    def _check_training(self, part: str, training: PartTraining) -> None:
        known = ("vision", "connector", "language")
        if part not in known:
            raise ConfigError(f"train.{part}: there is no such part{did_you_mean(part, known)}")
        for key in ("lr", "weight_decay"):
            if not 0 <= (getattr(training, key) or 0) < math.inf:
                got = getattr(training, key)
                raise ConfigError(f"train.{part}.{key} must be at least 0, not {got}")
        if training.lora is not None and part != "language":
            raise ConfigError(f"train.{part}.lora: only the language model takes adapters")
        inner = self.parts[0].PARTS if part == "vision" else ()
        if unknown := [name for name in training.parts if name not in inner]:
            has = f"known: {', '.join(inner)}" if inner else "it learns as a whole: remove the key"
            near = did_you_mean(unknown[0], inner)
            raise ConfigError(f"train.{part}.parts: unknown {unknown[0]!r}{near} ({has})")

    @property
    def parts(self) -> tuple[VisionConfig, ConnectorConfig, LanguageConfig]:
        """Vision encoder, connector and language model."""
        raise NotImplementedError

    @property
    def training(self) -> Mapping[str, PartTraining]:
        """How each part learns that does."""
        raise NotImplementedError

    def key(self, part: str, name: str) -> str:
        return f"model.{part}.{name}"

    def transform(self, cache_root: str) -> ImageTransform:
        return self.parts[0].transform(cache_root, partial(self.key, "vision"))

    @property
    def trained_vision(self) -> tuple[str, ...]:
        """The settings by which some of the vision encoder is trained."""
        return ("model.train.vision",) if "vision" in self.training else ()

    @property
    def trains(self) -> bool:
        """Whether any part is trained."""
        return bool(self.training)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters, if there are any."""
        language = self.training.get("language")
        return None if language is None else language.lora

    @property
    def new_parts(self) -> tuple[str, ...]:
        """What may begin to learn from a checkpoint that was trained without it: parts whose
        weights stand in files."""
        vision, _, language = self.parts
        drawn = {"vision": vision.random_parts, "language": getattr(language, "from_scratch", ())}
        return tuple(part for part, random in drawn.items() if not random)

    def check_files(self, cache_root: str) -> None:
        """Check every path, and the packages that some settings need, before any weight is read.

        Raises:
            WeightsError: a file is missing or not complete.
            ConfigError: a package is missing, or the language model is of another kind.
        """
        vision, connector, language = self.parts
        if self.lora is not None:
            check_packages("lora", "low-rank adapters")
        if language.quantize == "nf4":
            check_packages("quantize", f"{self.key('language', 'quantize')}: nf4")
        if language.device_map == "auto":
            check_packages("multi-gpu-chat", "a language model spread over several GPUs")
        for name, part in (("vision", vision), ("language", language), ("connector", connector)):
            for path in part.files(cache_root, partial(self.key, name)):
                check_download(path)
        if self.finetuned_path(cache_root) is not None:
            require(cache_path(self.finetuned or "", cache_root), "model.finetuned", WeightsError)

    def finetuned_path(self, cache_root: str) -> Path | None:
        """The checkpoint to begin with, if there is one."""
        return cache_path(self.finetuned or "", cache_root) if self.load_finetuned else None


@dataclass(frozen=True)
class VlmConfig(PartsConfig):
    """``arch: vlm``: parts by one line each.

    ``from_pretrained`` names a folder of LLaVA or BLIP-2 of Transformers that gives the parts; what
    the YAML says of one goes before what the folder does.
    """

    from_pretrained: str | None = None
    language: LanguageConfig = field(kw_only=True)
    vision: VisionConfig = EvaQFormerConfig("eva_qformer")
    connector: ConnectorConfig = LinearConfig("linear")
    train: dict[str, float | PartTraining] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language.quantize and "language" in self.training and self.lora is None:
            raise ConfigError(
                f"train.language: weights do not train under language.quantize: "
                f"{self.language.quantize}; train adapters beside them (train.language.lora), or "
                "leave quantize out"
            )
        if (learn := self.training.get("vision")) is not None:
            self.vision.check_training(learn.parts)

    @classmethod
    def of_folder(cls, path: str, cache_root: str) -> dict[str, Any]:
        from lavis.models.pretrained import parts_of

        blocks = parts_of(cache_path(path, cache_root))
        return {part: {"path": path} | block for part, block in blocks.items()}

    @property
    def parts(self) -> tuple[VisionConfig, ConnectorConfig, LanguageConfig]:
        return self.vision, self.connector, self.language

    @property
    def training(self) -> Mapping[str, PartTraining]:
        given = (self.train or {"connector": PartTraining()}).items()
        return {k: v if isinstance(v, PartTraining) else PartTraining(lr=v) for k, v in given}
