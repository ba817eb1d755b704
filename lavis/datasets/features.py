"""Cached features in place of pixels: their keys, and the views they are made of."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavis.common.errors import DataError
from lavis.common.images import IMAGE_READING, open_image
from lavis.datasets.feature_store import FeatureStore

_FORMAT = 1, IMAGE_READING  # counts changes of the transforms and of the encoding beside it


@dataclass(frozen=True)
class CachedFeatures:
    """Where a data set finds the features of its images.

    A key is a hash of the image file's bytes and of everything that makes features of them, so
    that nothing else can be found under it.

    Attributes:
        store: holds (Q, D) features.
        encoder: fingerprint of the vision side.
        transform: fingerprint of the image processor.
        views: of each image; epoch ``e`` shows view ``e % views``.
        digests: hash of each image file's bytes.
        failures: why an image has no features, by key, or by path if the file cannot be read.
    """

    store: FeatureStore
    encoder: str
    transform: str
    views: int
    digests: Mapping[Path, str]
    failures: Mapping[Any, str]

    def key(self, path: Path, view: int) -> bytes:
        """32 bytes for a view of an image whose hash is known."""
        parts: list[object] = [_FORMAT, self.encoder, self.transform, str(self.store.dtype)]
        parts += [self.digests[path], view]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()

    def read(self, path: Path, epoch: int) -> Tensor:
        """(Q, D) features of an image in an epoch.

        Raises:
            DataError: the image cannot be read, or its record has been damaged since the start.
        """
        if path not in self.digests:
            raise DataError(self.failures.get(path, f"{path} has no cached features"))
        key = self.key(path, epoch % self.views)
        features = self.store.get(key)
        if features is None:
            raise DataError(
                self.failures.get(key)
                or f"the cached features of {path} are gone or damaged ({self.store.folder}); "
                "the next start makes them again"
            )
        return features


def is_random(processor: Any) -> bool:
    """Whether an image processor draws random numbers; one that does not say is taken to."""
    return bool(getattr(processor, "random", True))


def transform_fingerprint(processor: Any, seed: int) -> str:
    """What an image processor does: its class, its options, the seed of what it draws.

    Of a third party's class the source counts as well.
    """
    cls = type(processor)
    parts = [cls.__module__, cls.__qualname__, repr(getattr(processor, "config", None))]
    if not cls.__module__.startswith("lavis."):
        try:
            parts.append(inspect.getsource(cls))
        except (OSError, TypeError):
            parts.append("")
    parts.append(str(seed) if is_random(processor) else "")
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).hexdigest()


def draw_view(
    path: Path, processor: Callable[[Image.Image], Tensor], seed: int, view: int, digest: str
) -> Tensor:
    """A view of an image, (3, H, W): a function of its content, the seed and the view's number.

    Raises:
        DataError: the image cannot be read.
    """
    image = open_image(path)
    number = hashlib.blake2b(f"{seed}/{view}/{digest}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(number, "big") >> 1)
        return processor(image)
