"""Encode every distinct image once per view, ahead of training."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavis.common import dist
from lavis.common.errors import ConfigError, DataError, LavisError
from lavis.common.hashing import FileHashes
from lavis.common.paths import cache_path, require_writable, user_cache
from lavis.common.schema import Config
from lavis.common.types import BadSample
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.collate import list_bad
from lavis.datasets.feature_store import FeatureStore
from lavis.datasets.features import CachedFeatures, FeatureIndex
from lavis.datasets.instruction import InstructionDataset

logger = logging.getLogger(__name__)
T = TypeVar("T")
_BATCH = 16  # images encoded at once; always as many, so that no feature depends on its neighbours
_THREADS = 8  # that read files to hash them


class Vision(Protocol):
    """The vision side of a run's model, by itself."""

    def check(self) -> None:
        """Raise a ConfigError if features cannot be kept."""

    def describe(
        self, device: torch.device, digest: Callable[[Path], str]
    ) -> tuple[str, tuple[int, int]]:
        """A fingerprint of what it computes, by hashes of files, and the features' shape (Q, D)."""

    def load(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """(N, 3, H, W) pixels -> (N, Q, D) fp32, on the CPU."""


class Counts(NamedTuple):
    """What a call of :meth:`FeatureCache.fill` has done, over all processes, in views of images."""

    found: int
    encoded: int
    failed: int


class _View(NamedTuple):
    """One thing to encode."""

    key: bytes
    path: Path
    number: int
    source: CachedFeatures


@dataclass(frozen=True)
class FeatureCache:
    """The feature cache of a run, which ``run.feature_cache`` describes."""

    config: Config
    vision: Vision

    def check(self) -> None:
        """Check the settings, before anything is read.

        Raises:
            ConfigError: features cannot be kept, or their folder not be written.
        """
        self.vision.check()
        require_writable(features_folder(self.config), "run.feature_cache.dir", ConfigError)

    def fill(self, datasets: Sequence[InstructionDataset], device: torch.device) -> Counts:
        """Encode what is missing or damaged, and tell the data sets' ``features`` where they are.

        Every process must call it with the same data sets; each encodes its share. PyTorch's
        random numbers go on as if nothing had been drawn.

        Raises:
            ConfigError: a record holds a video, or the processes do not see the same folder.
            DataError: an image cannot be encoded and ``run.on_bad_sample`` is ``error``.
        """
        _refuse_videos(datasets)
        hashes = FileHashes()
        with dist.main_first():
            encoder, shape = self.vision.describe(device, hashes.digest)
            hashes.save()
        folder, dtype = features_folder(self.config), self.config.run.feature_cache.dtype
        store = FeatureStore(folder, shape, dtype)
        names = {p: r.sample_id for d in datasets for r in d.records for p in r.images}
        digests, unread = _hash(list(names), hashes)
        failures: dict[bytes | Path, str] = dict(unread.items())
        index = FeatureIndex(store, encoder, digests, failures)
        views = {v.key: v for d in datasets for v in _views(d, index)}
        missing = _missing(list(views), store)
        found = len(views) - len(missing)
        if dist.is_main():
            logger.info(
                "feature cache %s: %d of %d views of images are there",
                store.folder, found, len(views),
            )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            mine = self._encode([views[key] for key in _share(missing)], store, device)
        failures |= {key: why for failed in dist.gather(mine) for key, why in failed.items()}
        bad = unread | {v.path: failures[k] for k, v in views.items() if k in failures}
        self._report([BadSample(names[path], why) for path, why in bad.items()])
        store.refresh()
        unseen = sum(key not in store and key not in failures for key in missing)
        if any(dist.gather(unseen)):
            raise ConfigError(
                f"run.feature_cache.dir: {unseen} features that other processes have written "
                f"are not in {store.folder}; all machines must share the folder"
            )
        return Counts(found, len(missing) - (len(failures) - len(unread)), len(failures))

    def _encode(
        self, views: Sequence[_View], store: FeatureStore, device: torch.device
    ) -> dict[bytes, str]:
        """Encode and write. Returns what could not be encoded, and why."""
        failed: dict[bytes, str] = {}
        run = self.config.run
        encode: Callable[[Tensor], Tensor] | None = None
        try:
            try:
                for batch in _batches(views, run.num_workers):
                    failed |= {v.key: why for v, why in batch if isinstance(why, str)}
                    good = [(v, p) for v, p in batch if isinstance(p, Tensor)]
                    if good:
                        encode = encode or self.vision.load(device)
                        features = _padded(encode, [p for _, p in good]).to(store.dtype)
                        for (view, _), feature in zip(good, features, strict=False):
                            if torch.isfinite(feature).all():
                                store.add(view.key, feature)
                            else:
                                failed[view.key] = (
                                    f"the features of {view.path} are not finite in "
                                    f"{run.feature_cache.dtype} (run.feature_cache.dtype)"
                                )
                    if failed and run.on_bad_sample == "error":
                        break
            finally:
                store.flush()
        except OSError as error:
            raise LavisError(
                f"run.feature_cache.dir: {store.folder} cannot be written: {error}. What has been "
                "written so far is kept"
            ) from error
        encode = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return failed

    def _report(self, bad: Sequence[BadSample]) -> None:
        """Refuse or log images without features, as ``run.on_bad_sample`` says.

        Raises:
            DataError: on every process, with ``error``.
        """
        if bad and self.config.run.on_bad_sample == "error":
            raise DataError(
                f"run.feature_cache: images cannot be encoded (run.on_bad_sample: skip leaves "
                f"their records out):{list_bad(bad)}"
            )
        if bad and dist.is_main():
            logger.warning("records with these images are left out:%s", list_bad(bad))


def features_folder(config: Config) -> Path:
    """The folder of a run's features."""
    folder = config.run.feature_cache.dir
    if folder is None:
        return user_cache() / "features"
    return cache_path(folder, config.env.cache_root)


def _refuse_videos(datasets: Sequence[InstructionDataset]) -> None:
    for record in (r for d in datasets for r in d.records):
        if record.video is not None:
            raise ConfigError(
                f"run.feature_cache keeps features of images, but {record.sample_id} holds a video "
                f"({record.video}); set run.feature_cache.enabled: false, or leave its data set out"
            )


def _hash(paths: Sequence[Path], hashes: FileHashes) -> tuple[dict[Path, str], dict[Path, str]]:
    """Hashes of files, and why some cannot be read. Each process reads its share."""

    def digest(path: Path) -> tuple[Path, str, str]:
        try:
            return path, hashes.digest(path), ""
        except OSError as error:
            return path, "", f"{path} cannot be read: {error}"

    mine = _share(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(_bar(pool.map(digest, mine), "hashing images", len(mine)))
    for rank in range(dist.world_size()):  # one after the other: they share the tables
        if rank == dist.rank():
            hashes.save()
        dist.barrier()
    everyone = list(itertools.chain.from_iterable(dist.gather(results)))
    return (
        {path: digest for path, digest, why in everyone if not why},
        {path: why for path, _, why in everyone if why},
    )


def _views(dataset: InstructionDataset, index: FeatureIndex) -> Iterator[_View]:
    """All views of a data set's readable images, whose features it will find in the index."""
    assert dataset.features is not None, "built for features"
    dataset.features.index = index
    for path in {p: None for r in dataset.records for p in r.images if p in index.digests}:
        for number in range(dataset.features.views):
            yield _View(dataset.features.key(path, number), path, number, dataset.features)


def _missing(keys: Sequence[bytes], store: FeatureStore) -> list[bytes]:
    """Keys without an undamaged feature, in order; every process reads its share."""
    mine = _share(keys)
    absent = [k for k in _bar(mine, "checking features", len(mine)) if store.get(k) is None]
    everyone = set(itertools.chain.from_iterable(dist.gather(absent)))
    return [key for key in keys if key in everyone]


def _batches(views: Sequence[_View], workers: int) -> Iterator[list[tuple[_View, Tensor | str]]]:
    """Views as pixels, or why there are none."""
    loader: DataLoader[list[Tensor | str]] = DataLoader(
        views,  # type: ignore[arg-type]
        batch_size=_BATCH,
        collate_fn=_draw,
        num_workers=min(workers, -(-len(views) // _BATCH)),
        worker_init_fn=leave_signals_to_parent,
    )
    with _bar(views, "encoding images", len(views)) as bar:
        for number, drawn in enumerate(loader):
            start = number * _BATCH
            yield list(zip(views[start : start + _BATCH], drawn, strict=True))
            bar.update(len(drawn))


def _draw(views: Sequence[_View]) -> list[Tensor | str]:
    drawn: list[Tensor | str] = []
    for view in views:
        try:
            drawn.append(view.source.draw(view.path, view.number))
        except DataError as error:
            drawn.append(str(error))
    return drawn


def _padded(encode: Callable[[Tensor], Tensor], pixels: list[Tensor]) -> Tensor:
    """(N, Q, D) of at most ``_BATCH`` images; rows past them are filler."""
    if len({p.shape for p in pixels}) > 1:
        raise DataError("image processors give images of different sizes; model.image_size")
    return encode(torch.stack(pixels + pixels[-1:] * (_BATCH - len(pixels))))


def _share(items: Sequence[T]) -> Sequence[T]:
    """This process's part."""
    return items[dist.rank() :: dist.world_size()]


def _bar(items: Iterable[T], title: str, total: int) -> tqdm[T]:
    quick = not dist.is_main() or not total
    return tqdm(items, desc=title, total=total, unit=" images", disable=quick, delay=1)
