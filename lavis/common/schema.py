"""What the sections of a run's YAML may hold. Field names are the original's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lavis.common.errors import ConfigError, at
from lavis.common.frames import VideoConfig
from lavis.common.paths import cache_path, user_cache, user_path
from lavis.common.registry import (
    BUILDERS,
    LR_SCHEDULERS,
    METRICS,
    MODELS,
    PROCESSORS,
    RUNNERS,
    TASKS,
    Registry,
)
from lavis.common.tiles import TilesConfig
from lavis.common.typed import Checked, Selected, Where, only, ranged


@dataclass(frozen=True)
class ImageTransform:
    """How a vision encoder takes its images; ``None`` is left to the image processor."""

    image_size: int  # pixels of a side
    mean: tuple[float, ...] | None = None  # of R, G, B in [0, 1]
    std: tuple[float, ...] | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class ProcessorConfig(Selected):
    """Base of every processor's configuration; ``name`` selects the subclass."""

    REGISTRY: ClassVar[Registry[Any]] = PROCESSORS

    name: str


@dataclass(frozen=True)
class SplitProcessors:
    """Processors for training splits and for all other splits."""

    train: ProcessorConfig | None = None
    eval: ProcessorConfig | None = None


@dataclass(frozen=True)
class PreprocessConfig:
    """``preprocess``: processors of a model, used where a data set names none of its own."""

    vis_processor: SplitProcessors = SplitProcessors()
    text_processor: SplitProcessors = SplitProcessors()
    video: VideoConfig = VideoConfig()
    tiles: TilesConfig = TilesConfig()


@dataclass(frozen=True)
class AnnotationConfig:
    """One split's annotation files.

    ``storage`` holds one path or several, relative to ``cache/``. ``url`` is where the original's
    authors kept the file; it is never downloaded.
    """

    storage: str | tuple[str, ...]
    url: str | tuple[str, ...] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The files as a tuple."""
        return (self.storage,) if isinstance(self.storage, str) else self.storage


@dataclass(frozen=True)
class ImagesConfig:
    """Folder of images or videos, relative to ``cache/``. A text-only data set needs none."""

    storage: str | None = None


@dataclass(frozen=True)
class BuildInfo(Checked):
    """Where a data set's files are."""

    annotations: dict[str, AnnotationConfig]
    images: ImagesConfig = ImagesConfig()
    max_frames: int | None = ranged(None, least=1)  # in place of preprocess.video's


@dataclass(frozen=True)
class DatasetConfig(Selected):
    """One block of ``datasets``. Its name picks a builder unless ``builder`` does."""

    REGISTRY: ClassVar[Registry[Any]] = BUILDERS
    KEY: ClassVar[str] = "builder"

    build_info: BuildInfo
    builder: str = ""
    format: Literal["minigpt4qwen", "llava"] = "minigpt4qwen"
    type: str = only("default", "each builder has one set of defaults; remove the key")
    data_type: Literal["images", "videos"] = "images"
    vis_processor: SplitProcessors = SplitProcessors()
    text_processor: SplitProcessors = SplitProcessors()
    score: str | None = None  # a metric; without, exact match by kind and language

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score is not None:
            with at("score"):
                METRICS.check(self.score)


Key = Callable[[str], str]
"""Says what the user calls a key of a part's block, for messages."""


@dataclass(frozen=True)
class PartConfig(Selected):
    """Base of the configuration of a model's part; ``name`` selects the subclass."""

    name: str

    def files(self, cache_root: str, key: Key) -> Iterator[Path]:
        """The weight files, checked before any is read.

        Raises:
            WeightsError: one is missing or not complete.
            ConfigError: they are of another kind.
        """
        return iter(())

    @classmethod
    def __select__(cls, data: Mapping[str, Any], path: str, where: Where) -> type:
        selected = super().__select__(data, path, where)
        if not issubclass(selected, cls):
            raise ConfigError(
                f"{where(path)}: {path}.name: {selected.__qualname__}, the configuration of "
                f"{data['name']!r}, must be derived from {cls.__module__}.{cls.__qualname__}"
            )
        return selected


@dataclass(frozen=True)
class ModelConfig(Selected):
    """Base of every model's configuration; ``arch`` selects the subclass.

    Attributes:
        LEARNS_BY: the keys that say what learns, for messages.
    """

    REGISTRY: ClassVar[Registry[Any]] = MODELS
    KEY: ClassVar[str] = "arch"
    LEARNS_BY: ClassVar[str] = "model"

    arch: str

    @classmethod
    def of_folder(cls, path: str, cache_root: str) -> dict[str, Any]:
        """The keys that ``from_pretrained`` stands for.

        Raises:
            WeightsError, ConfigError: the folder, or models of this kind, cannot be read so.
        """
        raise ConfigError("model.from_pretrained is a key of arch: vlm")

    def key(self, part: str, name: str) -> str:
        """What the user calls a setting of a part, ``vision``, ``connector`` or ``language``."""
        return f"model.{name}"

    def transform(self, cache_root: str) -> ImageTransform | None:
        """How the model takes its images, if it says so; reads small files alone.

        Raises:
            WeightsError, ConfigError: they are missing, or say nothing of use.
        """
        size = getattr(self, "image_size", None)
        return None if size is None else ImageTransform(size)

    def check_files(self, cache_root: str) -> None:
        """Check that every file the model is built from exists, before any weight is read.

        Raises:
            WeightsError: one is missing.
        """


@dataclass(frozen=True)
class FeatureCacheConfig(Checked):
    """``run.feature_cache``: the Q-Former's output, kept on disk by content.

    ``dir`` is relative to ``env.cache_root``; ``null`` is ``$XDG_CACHE_HOME/lavis/features``.
    """

    enabled: bool = False
    views: int = ranged(1, least=1)  # augmented views of an image; epoch e shows view e % views
    dtype: Literal["fp16", "bf16", "fp32", "int8"] = "fp16"
    dir: str | None = None

    def folder(self, cache_root: str) -> Path:
        """Where the features are."""
        return user_cache() / "features" if self.dir is None else cache_path(self.dir, cache_root)


@dataclass(frozen=True)
class RunConfig(Checked):
    """``run``: optimization, data loading, output. Defaults are the original's."""

    task: str = "image_text_pretrain"
    runner: str = "runner_base"
    evaluate: bool = False  # no training: score the splits below and end
    # splits
    train_splits: tuple[str, ...] = ("train",)
    valid_splits: tuple[str, ...] = ()  # their loss is computed every eval_freq epochs
    test_splits: tuple[str, ...] = ()  # their questions are answered and scored after training
    eval_freq: int = ranged(1, least=1)
    # optimizer and schedule; a step is one optimizer step
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = ranged(1e-4, least=0)
    min_lr: float = ranged(0.0, least=0)
    warmup_lr: float = ranged(-1.0, least=-math.inf)  # negative: start at init_lr
    warmup_steps: int = ranged(0, least=0)
    # of all steps; overrides warmup_steps
    warmup_ratio: float | None = ranged(None, least=0, below=1)
    lr_decay_rate: float = ranged(1.0, least=0)
    lr_layer_decay: float = ranged(1.0, least=0)
    weight_decay: float = ranged(0.05, least=0)
    beta1: float = ranged(0.9, least=0, below=1)
    beta2: float = ranged(0.999, least=0, below=1)
    eps: float = 1e-8
    grad_norm_clip: float | None = ranged(None, least=0)
    max_epoch: int = ranged(1, least=1)
    # batches
    batch_size_train: int = ranged(1, least=1)
    batch_size_eval: int = ranged(1, least=1)
    accum_grad_iters: int = ranged(1, least=1)
    num_workers: int = ranged(0, least=0)
    # pack micro-batches to this; not batch_size_train
    max_tokens_per_batch: int | None = ranged(None, least=1)
    train_dataset_ratios: dict[str, float] | None = None  # share of each data set in an epoch
    use_dist_eval_sampler: bool = only(
        True, "evaluation is always spread over the processes, each sample once; remove the key"
    )
    on_bad_sample: Literal["error", "skip"] = "error"
    on_nonfinite: Literal["error", "skip"] = "error"  # a loss or a gradient that is not finite
    feature_cache: FeatureCacheConfig = FeatureCacheConfig()
    # precision
    amp: bool = False
    autocast_dtype: Literal["bf16", "bfloat16", "fp16", "float16"] = "fp16"
    loss_scale: bool = True
    # how a step is computed; nothing here changes its result (docs/fast_path.md)
    fast_path: bool = True  # false: the original's schedule, whatever the next keys say
    packed_attention: bool = True
    prefix_cache: bool = True
    supervised_head: bool = True
    recompute: str | int = "auto"  # none, all, auto, or every n-th layer
    memory_budget_gb: float | None = ranged(None, least=0)  # for recompute: auto
    compile: bool = False
    # placement
    device: str = "cuda"
    distributed: bool = True  # kept for the original's files: the launcher decides
    world_size: int = ranged(1, least=1)  # kept for the original's files: the launcher decides
    dist_url: str = only("env://", "torch.distributed.run sets the rendezvous; remove the key")
    strategy: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    fsdp: bool = False  # the original's name for strategy: fsdp2
    fsdp_cpu_offload: bool = False
    deepspeed_config: dict[str, Any] | None = None  # a DeepSpeed JSON; see docs/distributed.md
    # output and resume
    seed: int = ranged(42, least=0, below=2**32)
    output_dir: str = "output"
    log_freq: int = ranged(50, least=1)
    wandb_project: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"
    save_every_steps: int | None = ranged(None, least=1)  # besides the end of each epoch
    keep_last: int = ranged(2, least=1)  # of the checkpoints inside epochs
    resume_ckpt_path: str | None = None
    resume_ckpt_load_dir: str | None = only(None, "use run.resume_ckpt_path with a .pth file")
    resume_ckpt_tag: str | None = only(None, "use run.resume_ckpt_path with a .pth file")
    # generation during evaluation, which is greedy
    # of the original's files: max_new_tokens where that is not given, and refused by its own name
    max_len: int | None = ranged(None, least=1)
    max_new_tokens: int = ranged(100, least=1)
    min_new_tokens: int = ranged(1, least=0)  # no effect, as the next two
    num_beams: int = ranged(5, least=1)
    min_len: int | None = ranged(None, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, registry in (("task", TASKS), ("runner", RUNNERS), ("lr_sched", LR_SCHEDULERS)):
            with at(name):
                registry.check(getattr(self, name))
        if not self.train_splits:
            raise ConfigError("train_splits is empty: name at least one split, such as train")
        for name, most, named in (
            ("min_lr", self.init_lr, " (init_lr)"), ("warmup_lr", self.init_lr, " (init_lr)"),
            ("lr_decay_rate", 1, ""), ("lr_layer_decay", 1, ""),
        ):  # fmt: skip
            if getattr(self, name) > most:
                raise ConfigError(
                    f"{name} must be at most {most}{named}, not {getattr(self, name)}"
                )
        if not 0 < self.eps < math.inf:  # at 0, a parameter without gradient becomes NaN
            raise ConfigError(f"eps must be positive, not {self.eps}")
        every = self.recompute
        if every not in ("auto", "none", "all") and not (isinstance(every, int) and every > 0):
            raise ConfigError(
                f"recompute must be auto, none, all, or n for every n-th layer, not {every!r}"
            )
        for name in ("output_dir", "resume_ckpt_path"):
            if (path := getattr(self, name)) is not None:
                with at(name):
                    user_path(path)
                object.__setattr__(self, name, os.path.expanduser(path))  # noqa: PTH111
        if self.evaluate and self.resume_ckpt_path == "auto":
            raise ConfigError("resume_ckpt_path: auto goes on training; name a file to evaluate")
        if self.evaluate and not (self.test_splits or self.valid_splits):
            raise ConfigError("evaluate: true needs test_splits (or valid_splits) to score")

    def deepspeed(self, section: str) -> dict[str, Any]:
        """A section of ``deepspeed_config``, maybe empty."""
        return (self.deepspeed_config or {}).get(section) or {}


@dataclass(frozen=True)
class EnvConfig:
    """``env``: where the user's weights and data are."""

    cache_root: str = "cache"


@dataclass(frozen=True)
class Config:
    """A whole run, typed.

    ``tree`` holds the same as plain values, for ``config.yaml``; ``source`` names the file.
    """

    model: ModelConfig
    run: RunConfig
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    preprocess: PreprocessConfig = PreprocessConfig()
    env: EnvConfig = EnvConfig()
    imports: tuple[str, ...] = ()
    source: str = field(default="", compare=False)
    tree: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dataset_ratios(self) -> tuple[float, ...] | None:
        """Each data set's share of an epoch, in the order of ``datasets``."""
        ratios = self.run.train_dataset_ratios
        return None if ratios is None else tuple(ratios[name] for name in self.datasets)

    def fit(self, path: str, processor: ProcessorConfig | None) -> ProcessorConfig | None:
        """The image processor at a dotted path, fit for the model's vision encoder.

        Raises:
            ConfigError: it makes images that the model does not take.
        """
        transform = self.model.transform(self.env.cache_root)
        if processor is None or transform is None:
            return processor
        said = {k: v for k, v in vars(transform).items() if v is not None}
        wanted = {k: v for k, v in said.items() if hasattr(processor, k)}
        for key, value in wanted.items():
            if (given := getattr(processor, key)) in (None, value):
                continue
            theirs, way = f"the vision encoder's {key}", "remove the key"
            if key == "image_size":
                theirs, way = self.model.key("vision", key), "they must be equal"
            given, value = (list(v) if isinstance(v, tuple) else v for v in (given, value))
            raise ConfigError(
                f"{self.source}: {path}.{key} is {given}, but {theirs} is {value}; {way}"
            )
        return replace(processor, **wanted)

    def __post_init__(self) -> None:
        ratios = self.run.train_dataset_ratios
        if ratios is None:
            return
        if set(ratios) != set(self.datasets):
            raise ConfigError(
                f"run.train_dataset_ratios names {', '.join(ratios)}; it must name every data set: "
                f"{', '.join(self.datasets)}"
            )
        if min(ratios.values()) < 0 or not sum(ratios.values()) > 0:
            raise ConfigError("run.train_dataset_ratios must not be negative, and not all zero")
