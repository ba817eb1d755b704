"""Cached features in place of pixels: their keys, and the views they are made of."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from lavis.common import dist
from lavis.common.errors import DataError
from lavis.common.hashing import settings_digest
from lavis.common.images import IMAGE_READING
from lavis.common.seeds import drawing_from
from lavis.common.videos import Picture
from lavis.datasets.feature_store import FeatureStore

logger = logging.getLogger(__name__)
ImageProcessor = Callable[[Image.Image], Tensor]
"""A picture -> (3, H, W)."""
_FORMAT = 2, IMAGE_READING  # counts changes of the transforms and of the encoding beside it


class FeatureIndex(NamedTuple):
    """What the feature cache holds for a run."""

    store: FeatureStore  # of (Q, D) features
    encoder: str  # fingerprint of the vision side
    digests: Mapping[Path, str]  # of each image or video file's bytes
    failures: Mapping[Path, str]  # why a file has no features


class CachedFeatures:
    """A data set's images as features.

    A key is a hash of the image file's bytes and of everything that makes features of them, so
    that nothing else can be found under it.
    """

    index: FeatureIndex
    """Set when the feature cache has been filled, before the first image is read."""

    def __init__(self, processor: ImageProcessor, seed: int, views: int) -> None:
        """Describe the views that are to be encoded.

        Args:
            processor: makes pixels of an image.
            seed: of what it draws.
            views: of each image, where it draws; epoch ``e`` shows view ``e % views``.
        """
        if views > 1 and not is_random(processor):
            views = 1
            if dist.is_main():
                logger.info(
                    "feature cache: %s draws no random numbers, so one view of an image is all "
                    "of them", type(processor).__name__,
                )  # fmt: skip
        self.processor, self.seed, self.views = processor, seed, views
        self._transform = transform_fingerprint(processor, seed)

    def key(self, picture: Picture, view: int) -> bytes:
        """32 bytes for a view of a picture whose file's hash is known."""
        index = self.index
        parts: list[object] = [_FORMAT, index.encoder, self._transform, str(index.store.dtype)]
        parts += [index.digests[picture.path], view]
        parts += [] if picture.frame is None else [picture.frame]
        parts += [] if picture.tile is None else [picture.tile]
        return bytes.fromhex(settings_digest(parts))

    def draw(self, image: Image.Image, path: Path, view: int) -> Tensor:
        """A view, (3, H, W): a function of the file's content, the seed and the view's number.

        Frames of a video are cropped and flipped alike.

        Args:
            image: what the file shows, or one of its frames.
        """
        with drawing_from(self.seed, view, self.index.digests[path]):
            return self.processor(image)

    def read(self, picture: Picture, epoch: int) -> Tensor:
        """(Q, D) features of a picture in an epoch.

        Raises:
            DataError: the image cannot be read, or its features have been damaged since the start.
        """
        store, failures = self.index.store, self.index.failures
        if picture.path in failures:
            raise DataError(failures[picture.path])
        features = store.get(self.key(picture, epoch % self.views))
        if features is None:
            raise DataError(
                f"the cached features of {picture.path} are gone or damaged ({store.folder}); the "
                "next start makes them again"
            )
        return features


def is_random(processor: ImageProcessor) -> bool:
    """Whether an image processor draws random numbers; one that does not say is taken to."""
    return bool(getattr(processor, "random", True))


def transform_fingerprint(processor: ImageProcessor, seed: int) -> str:
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
    return settings_digest(parts)
