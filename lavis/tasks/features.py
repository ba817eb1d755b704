"""Encode every distinct image once per view, and give data sets the features."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavis.common import dist
from lavis.common.errors import ConfigError, DataError, LavisError, in_lines
from lavis.common.hashing import file_digest
from lavis.common.paths import cache_path, require_writable, user_cache
from lavis.common.registry import MODELS
from lavis.common.schema import Config, ModelConfig
from lavis.common.types import DTYPES
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.feature_store import FeatureStore
from lavis.datasets.features import CachedFeatures, draw_view, is_random, transform_fingerprint
from lavis.models.config import EvaQFormerKeys, PartsConfig

logger = logging.getLogger(__name__)
_BATCH = 16  # images encoded at once; always as many, so that no feature depends on its neighbours
_THREADS = 8  # that read files to hash them


@dataclass(frozen=True)
class Counts:
    """What a call of :meth:`FeatureCache.fill` has done, over all processes, in views of images."""

    found: int
    encoded: int
    failed: int


@dataclass(frozen=True)
class _View:
    """One thing to encode."""

    key: bytes
    path: Path
    processor: Any
    seed: int
    number: int
    digest: str


class FeatureCache:
    """The feature cache of a run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings = config.run.feature_cache
        self._digests: dict[Path, str] = {}
        self._failures: dict[Any, str] = {}
        self._ready: set[bytes] = set()
        self._opened: tuple[FeatureStore, str] | None = None

    @property
    def folder(self) -> Path:
        """Where the features are."""
        if self.settings.dir is None:
            return user_cache() / "features"
        return cache_path(self.settings.dir, self.config.env.cache_root)

    def check(self) -> None:
        """Check the settings, before anything is read.

        Raises:
            ConfigError: features that training changes, or that no file determines, cannot be kept.
        """
        model: Any = self.config.model
        key = "run.feature_cache"
        if not hasattr(model, "trained_vision"):
            raise ConfigError(f"{key}: model arch {model.arch!r} has no vision side to keep")
        if model.trained_vision:
            raise ConfigError(
                f"{key}: the vision side is trained ({', '.join(model.trained_vision)}), so its "
                f"features change at every step; freeze it, or set {key}.enabled: false"
            )
        scratch = [part for part in ("vit", "qformer") if _vision(model).is_from_scratch(part)]
        if scratch:
            raise ConfigError(
                f"{key}: {' and '.join(scratch)} would start from random weights "
                f"(model.from_scratch, model.load_pretrained), which nothing can find again; name "
                f"weight files, or set {key}.enabled: false"
            )
        if model.load_finetuned:
            _refuse_vision(model.finetuned_path(self.config.env.cache_root))
        require_writable(self.folder, f"{key}.dir", ConfigError)

    def fill(
        self, datasets: Sequence[Any], device: torch.device, *, views: Sequence[int]
    ) -> Counts:
        """Encode what is missing or damaged, and give the data sets their features.

        Every process must call it with the same data sets; each encodes its share. PyTorch's
        random numbers go on as if nothing had been drawn.

        Args:
            datasets: their ``features`` are set.
            views: of each image of each data set, where its processor draws random numbers.

        Raises:
            ConfigError: a record holds a video, or the processes do not see the same folder.
            DataError: an image cannot be encoded and ``run.on_bad_sample`` is ``error``.
        """
        _refuse_videos(datasets)
        store, encoder = self._open(device)
        names = {p: r.sample_id for d in datasets for r in d.records for p in r.images}
        self._hash(list(names))
        wanted: dict[bytes, _View] = {}
        for dataset, count in zip(datasets, views, strict=True):
            wanted |= self._attach(dataset, count, store, encoder)
        missing = self._missing(wanted, store)
        found = len(wanted) - len(missing)
        if dist.is_main():
            logger.info(
                "feature cache %s: %d of %d views of images are there", store.folder, found,
                len(wanted),
            )  # fmt: skip
        mine = [wanted[key] for key in missing[dist.rank() :: dist.world_size()]]
        with torch.random.fork_rng(devices=[]):
            failed = self._encode(mine, store, device)
        self._failures |= {k: why for told in dist.gather(failed) for k, why in told.items()}
        self._report(names, wanted)
        store.refresh()
        left = [k for k in missing if k not in store and k not in self._failures]
        if any(dist.gather(len(left))):
            raise ConfigError(
                f"run.feature_cache.dir: {len(left)} features that other processes have written "
                f"are not in {store.folder}; all machines must share the folder"
            )
        self._ready |= wanted.keys() - self._failures.keys()
        bad = sum(key in self._failures for key in missing)
        return Counts(found, len(missing) - bad, bad + sum(p in self._failures for p in names))

    def _open(self, device: torch.device) -> tuple[FeatureStore, str]:
        if self._opened is None:
            config, run = self.config.model, self.config.run
            encoder, shape = MODELS.get(config.arch).describe_vision(
                config, cache_root=self.config.env.cache_root, device=device
            )
            # Training encodes under autocast, so features are what they would be there.
            amp = [str(DTYPES[run.autocast_dtype]), _vision(config).enable_autocast]
            parts = json.dumps([encoder, amp if run.amp else None])
            encoder = hashlib.blake2b(parts.encode(), digest_size=32).hexdigest()
            self._opened = FeatureStore(self.folder, shape, self.settings.dtype), encoder
        return self._opened

    def _hash(self, paths: Sequence[Path]) -> None:
        new = [p for p in paths if p not in self._digests and p not in self._failures]
        mine = new[dist.rank() :: dist.world_size()]
        with ThreadPoolExecutor(_THREADS) as pool:
            results = list(_bar(pool.map(_digest, mine), "hashing images", len(mine)))
        for told in dist.gather(dict(zip(mine, results, strict=True))):
            for path, (digest, why) in told.items():
                if digest is None:
                    self._failures[path] = why
                else:
                    self._digests[path] = digest

    def _attach(
        self, dataset: Any, views: int, store: FeatureStore, encoder: str
    ) -> dict[bytes, _View]:
        processor, seed = dataset.vis_processor, dataset.seed
        if views > 1 and not is_random(processor):
            if dist.is_main():
                logger.info(
                    "feature cache: %s draws no random numbers, so one view of an image is all "
                    "of them", type(processor).__name__,
                )  # fmt: skip
            views = 1
        transform = transform_fingerprint(processor, seed)
        features = CachedFeatures(store, encoder, transform, views, self._digests, self._failures)
        dataset.features = features
        found = {}
        for path in {p: None for r in dataset.records for p in r.images if p in self._digests}:
            for view in range(views):
                key = features.key(path, view)
                found[key] = _View(key, path, processor, seed, view, self._digests[path])
        return found

    def _missing(self, wanted: Mapping[bytes, _View], store: FeatureStore) -> list[bytes]:
        """Keys without an undamaged record, in order; every process reads its share."""
        keys = [key for key in wanted if key not in self._ready]
        mine = keys[dist.rank() :: dist.world_size()]
        absent = [k for k in _bar(mine, "checking features", len(mine)) if store.get(k) is None]
        everyone = set(itertools.chain.from_iterable(dist.gather(absent)))
        return [key for key in keys if key in everyone]

    def _encode(
        self, views: list[_View], store: FeatureStore, device: torch.device
    ) -> dict[bytes, str]:
        """Encode and write. Returns what could not be encoded, and why."""
        failed: dict[bytes, str] = {}
        stops = self.config.run.on_bad_sample == "error"
        vision: Any = None
        bar = _bar(None, "encoding images", len(views))
        try:
            with store.writer() as writer:
                for batch in self._batches(views):
                    good = [(v, p) for v, p in batch if isinstance(p, Tensor)]
                    failed |= {v.key: p for v, p in batch if isinstance(p, str)}
                    if good:
                        vision = vision or self._load_vision(device)
                        features = self._features(vision, [p for _, p in good], device)
                        for (view, _), feature in zip(good, features.to(store.dtype), strict=False):
                            if torch.isfinite(feature).all():
                                writer.add(view.key, feature)
                            else:
                                failed[view.key] = (
                                    f"the features of {view.path} are not finite in "
                                    f"{self.settings.dtype} (run.feature_cache.dtype)"
                                )
                    bar.update(len(batch))
                    if failed and stops:
                        break
        except OSError as error:
            raise LavisError(
                f"run.feature_cache.dir: {store.folder} cannot be written: {error}. What has been "
                "encoded so far is kept"
            ) from error
        finally:
            bar.close()
        del vision
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return failed

    def _batches(self, views: list[_View]) -> Iterator[list[tuple[_View, Tensor | str]]]:
        loader: DataLoader[Any] = DataLoader(
            _Drawn(views),  # type: ignore[arg-type]
            batch_size=_BATCH,
            collate_fn=list,
            num_workers=min(self.config.run.num_workers, -(-len(views) // _BATCH)),
            worker_init_fn=leave_signals_to_parent,
        )
        for drawn in loader:
            yield [(views[i], p) for i, p in drawn]

    def _features(self, vision: Any, pixels: list[Tensor], device: torch.device) -> Tensor:
        """(N, Q, D) of at most ``_BATCH`` images; rows past them are filler."""
        if len({p.shape for p in pixels}) > 1:
            raise DataError("image processors give images of different sizes; model.image_size")
        run = self.config.run
        filled = torch.stack(pixels + pixels[-1:] * (_BATCH - len(pixels))).to(device)
        with (
            torch.no_grad(),
            torch.autocast(device.type, DTYPES[run.autocast_dtype], enabled=run.amp),
        ):
            return vision(filled).float().cpu()

    def _load_vision(self, device: torch.device) -> Any:
        logger.info("loading the vision side to encode images; training goes on without it")
        model = self.config.model
        return MODELS.get(model.arch).build_vision(
            model, cache_root=self.config.env.cache_root, device=device
        )

    def _report(self, names: Mapping[Path, str], wanted: Mapping[bytes, _View]) -> None:
        """Refuse or log images without features, as ``run.on_bad_sample`` says.

        Raises:
            DataError: on every process, with ``error``.
        """
        bad = {v.path: self._failures[k] for k, v in wanted.items() if k in self._failures}
        bad |= {p: self._failures[p] for p in names if p in self._failures}
        if not bad:
            return
        which = in_lines([f"{names[p]}: {why}" for p, why in bad.items()])
        if self.config.run.on_bad_sample == "error":
            raise DataError(
                f"run.feature_cache: images cannot be encoded (run.on_bad_sample: skip leaves "
                f"their records out):{which}"
            )
        if dist.is_main():
            logger.warning("records with these images are left out:%s", which)


def _digest(path: Path) -> tuple[str | None, str]:
    try:
        return file_digest(path), ""
    except OSError as error:
        return None, f"{path} cannot be read: {error}"


def _vision(config: ModelConfig) -> EvaQFormerKeys:
    assert isinstance(config, PartsConfig)
    return config.parts[0]


class _Drawn:
    """Views as pixels, or why there are none, by number."""

    def __init__(self, views: list[_View]) -> None:
        self._views = views

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        v = self._views[index]
        try:
            return index, draw_view(v.path, v.processor, v.seed, v.number, v.digest)
        except DataError as error:
            return index, str(error)


def _refuse_videos(datasets: Sequence[Any]) -> None:
    for record in (r for d in datasets for r in d.records if r.video is not None):
        raise ConfigError(
            f"run.feature_cache keeps features of images, but {record.sample_id} holds a video "
            f"({record.video}); set run.feature_cache.enabled: false, or leave its data set out"
        )


def _refuse_vision(checkpoint: Path) -> None:
    from lavis.models.weights.files import open_pth

    vision = ("visual_encoder.", "ln_vision.", "Qformer.", "query_tokens")
    found = next((name for name in open_pth(checkpoint) if name.startswith(vision)), None)
    if found is not None:
        raise ConfigError(
            f"run.feature_cache: model.finetuned ({checkpoint}) holds {found}, and the cache reads "
            "the vision side from model.vit_weights and model.pretrained alone; write its parts "
            "with python -m lavis.tools.export, or set run.feature_cache.enabled: false"
        )


def _bar(items: Any, title: str, total: int) -> Any:
    quick = not dist.is_main() or not total
    return tqdm(items, desc=title, total=total, unit=" images", disable=quick, delay=1)
