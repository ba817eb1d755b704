"""Encode every distinct image, tile, and frame of a video, once per view, ahead of training."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavis.common import dist
from lavis.common.errors import ConfigError, DataError
from lavis.common.hashing import file_digest
from lavis.common.schema import Config, RunConfig
from lavis.common.types import BadSample
from lavis.common.videos import Picture, open_pictures
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.collate import report_bad
from lavis.datasets.feature_store import FeatureStore
from lavis.datasets.features import CachedFeatures, FeatureIndex
from lavis.datasets.instruction import InstructionDataset

logger = logging.getLogger(__name__)
T = TypeVar("T")
_BATCH = 16  # images encoded at once; always as many, so that no feature depends on its neighbours
_THREADS = 8  # that read files to hash them


class Vision(Protocol):
    """The vision side of a run's model, by itself."""

    def describe(self, device: torch.device) -> tuple[str, tuple[int, int]]:
        """A fingerprint of what it computes, and the shape (Q, D) of an image's features."""

    def load(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """(N, 3, H, W) pixels -> (N, Q, D) fp32, on the CPU."""


class Counts(NamedTuple):
    """What :func:`fill_features` has done, over all processes."""

    found: int  # views of images
    encoded: int  # views of images
    failed: int  # images and videos


class _View(NamedTuple):
    """One thing to encode."""

    key: bytes
    picture: Picture
    digest: str
    number: int
    source: CachedFeatures


def fill_features(
    config: Config,
    datasets: Sequence[InstructionDataset],
    vision: Vision,
    device: torch.device,
    *,
    estimate: bool = False,
) -> Counts:
    """Encode what the cache lacks, and tell the data sets' ``features`` where to find all.

    With ``estimate``, look what is lacking, and encode nothing.

    Every process must call it with the same data sets; each hashes, checks and encodes its share of
    the images. PyTorch's random numbers go on as if nothing had been drawn.

    Raises:
        ConfigError: the disk has no room for what is lacking, or the processes do not see the
            same folder.
        DataError: an image cannot be encoded and ``run.on_bad_sample`` is ``error``.
        LavisError: the folder cannot be written, or the disk is full.
    """
    cache = config.run.feature_cache
    encoder, shape = vision.describe(device)
    store = FeatureStore(cache.folder(config.env.cache_root), shape, cache.dtype)
    names = {p: r.sample_id for d in datasets for r in d.records for p, *_ in r.pictures}
    digests, failures = _hash(list(names)[dist.rank() :: dist.world_size()])
    index = FeatureIndex(store, encoder, digests, failures)
    views = {v.key: v for d in datasets for v in _views(d, index)}  # of this process's images
    checked = _bar(views.values(), "checking features", len(views))
    missing = [view for view in checked if store.get(view.key) is None]
    total, absent = map(int, dist.add_up([len(views), len(missing)]))
    with dist.raise_together():
        if dist.is_main():
            _require_room(store, total, absent)
    if estimate:
        return Counts(total - absent, 0, len(failures))
    with dist.raise_together(), torch.random.fork_rng(devices=[]):
        failed = _encode(missing, store, vision, config.run, device)
    for hashed, unread, unfit in dist.gather((digests, failures, failed)):
        digests.update(hashed)
        failures.update(unread)
        failed.update(unfit)
    failures.update({path: failed[d] for path, d in digests.items() if d in failed})
    report_bad(
        [BadSample(names[path], why) for path, why in failures.items()],
        config.run.on_bad_sample,
        "run.feature_cache: records cannot be used, since their images cannot be encoded",
        "records with these images are left out",
    )
    store.refresh()
    kept = [v for d in datasets for v in _views(d, index) if v.picture.path not in failures]
    unseen = sum(view.key not in store for view in kept)
    if any(dist.gather(unseen)):
        raise ConfigError(
            f"run.feature_cache.dir: {unseen} features that other processes have written are not "
            f"in {store.folder}; all machines must share the folder"
        )
    encoded = dist.add_up([sum(view.key in store for view in missing)])[0]
    return Counts(total - absent, int(encoded), len(failures))


def _require_room(store: FeatureStore, total: int, absent: int) -> None:
    """Say what will be written, and check that the disk can hold it."""
    there = next(path for path in (store.folder, *store.folder.parents) if path.exists())
    needed, free = absent * store.nbytes, shutil.disk_usage(there).free
    logger.info(
        "feature cache %s: %d of %d views are there; the others take %.2f GB of %.1f GB that are "
        "free", store.folder, total - absent, total, needed / 1e9, free / 1e9,
    )  # fmt: skip
    if needed > free:
        raise ConfigError(
            f"run.feature_cache: {absent} views of images take {needed / 1e9:.2f} GB "
            f"({store.nbytes:,} bytes each), and {there} has {free / 1e9:.2f} GB free. Make room, "
            "name another run.feature_cache.dir, or set a smaller dtype (int8) or fewer views"
        )


def _hash(paths: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Hashes of files, and why some cannot be read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(_bar(pool.map(_digest, paths), "hashing images", len(paths)))
    found = dict(zip(paths, results, strict=True))
    digests = {path: digest for path, digest in found.items() if isinstance(digest, str)}
    failures = {p: f"{p} cannot be read: {e}" for p, e in found.items() if p not in digests}
    return digests, failures


def _digest(path: Path) -> str | OSError:
    try:
        return file_digest(path)
    except OSError as error:
        return error


def _views(dataset: InstructionDataset, index: FeatureIndex) -> Iterator[_View]:
    """All views of a data set's readable pictures, whose features it will find in the index."""
    assert dataset.features is not None, "built for pixels"
    dataset.features.index = index
    for picture in dict.fromkeys(p for r in dataset.records for p in r.pictures):
        if (digest := index.digests.get(picture.path)) is not None:
            for number in range(dataset.features.views):
                key = dataset.features.key(picture, number)
                yield _View(key, picture, digest, number, dataset.features)


def _encode(
    views: Sequence[_View],
    store: FeatureStore,
    vision: Vision,
    run: RunConfig,
    device: torch.device,
) -> dict[str, str]:
    """Encode and write. Returns hashes of images that could not be encoded, and why."""
    failed: dict[str, str] = {}
    encode: Callable[[Tensor], Tensor] | None = None
    try:
        for batch in _batches(views, run.num_workers):
            failed |= {v.digest: why for v, why in batch if isinstance(why, str)}
            if good := [(v, p) for v, p in batch if isinstance(p, Tensor)]:
                encode = encode or vision.load(device)
                features = _padded(encode, [p for _, p in good])
                for (view, _), feature in zip(good, features, strict=False):
                    if store.holds(feature):
                        store.add(view.key, feature)
                    else:
                        failed[view.digest] = (
                            f"the features of {view.picture.path} are not finite in "
                            f"{run.feature_cache.dtype} (run.feature_cache.dtype)"
                        )
            if failed and run.on_bad_sample == "error":
                break
    finally:
        store.flush()  # also when it is interrupted
    encode = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failed


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
        for start, drawn in zip(range(0, len(views), _BATCH), loader, strict=True):
            yield list(zip(views[start : start + _BATCH], drawn, strict=True))
            bar.update(len(drawn))


def _draw(views: Sequence[_View]) -> list[Tensor | str]:
    drawn: list[Tensor | str] = []
    for path, group in groupby(views, key=lambda view: view.picture.path):
        same = list(group)
        pictures = list(dict.fromkeys(view.picture for view in same))
        try:
            images = dict(zip(pictures, open_pictures(pictures), strict=True))
            drawn += [v.source.draw(images[v.picture], path, v.number) for v in same]
        except DataError as error:
            drawn += [str(error)] * len(same)
    return drawn


def _padded(encode: Callable[[Tensor], Tensor], pixels: list[Tensor]) -> Tensor:
    """(N, Q, D) of at most ``_BATCH`` images; rows past them are filler."""
    if len({p.shape for p in pixels}) > 1:
        raise DataError(
            "image processors give images of different sizes; set their image_size to the model's"
        )
    return encode(torch.stack(pixels + pixels[-1:] * (_BATCH - len(pixels))))


def _bar(items: Iterable[T], title: str, total: int) -> tqdm[T]:
    quick = not dist.is_main() or not total
    return tqdm(items, desc=title, total=total, unit=" images", disable=quick, delay=1)
