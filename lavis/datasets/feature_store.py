"""Tensors of one shape by key, in safetensors files: what is damaged is never returned.

Each file of a folder is a shard, written whole under another name and then renamed. It holds
``keys`` (N, 32) and ``checksums`` (N, 8), both uint8, and ``features`` (N, Q, D). A row's checksum
is the BLAKE2b-8 of its bytes, keyed by its key. In int8 four more rows of D follow a feature's Q:
the bytes of its D channels' fp32 scales.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
import uuid
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lavis.common import dist
from lavis.common.errors import LavisError
from lavis.common.paths import replaces
from lavis.common.types import DTYPES

logger = logging.getLogger(__name__)
_BYTES = 2**25  # of a shard, about: 680 features of 32 x 768 numbers in fp16
_SCALES = 4  # rows of int8 that D fp32 scales take
_SECONDS = 30  # between shards at most, so that a kill costs no more


class FeatureStore:
    """All shards of a folder; what is added goes into new ones."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: str) -> None:
        """Open a folder, which need not exist.

        Args:
            shape: (Q, D) of every feature.
            dtype: ``fp16``, ``bf16``, ``fp32``, or ``int8`` with a scale for each channel.
        """
        self.folder, self.shape = folder / f"{shape[0]}x{shape[1]}-{dtype}", shape
        self.dtype = torch.int8 if dtype == "int8" else DTYPES[dtype]
        self._row = (shape[0] + _SCALES, shape[1]) if dtype == "int8" else shape
        self._added: dict[bytes, Tensor] = {}
        self._due = 0.0
        if dist.is_main() and (old := list(self.folder.glob("*.index"))):
            logger.warning(
                "feature cache %s: %d shards of an older version (*.index, *.data) are not read; "
                "their images are encoded again. Delete these files to make room",
                self.folder, len(old),
            )  # fmt: skip
        self.refresh()

    def refresh(self) -> None:
        """See what has been written since."""
        self._places: dict[bytes, list[tuple[Path, int, bytes]]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard = safetensors.torch.load_file(path)  # mapped
                keys, checksums = (shard[name].numpy() for name in ("keys", "checksums"))
                fits = shard["features"].shape == (len(keys), *self._row)
            except (SafetensorError, OSError, KeyError):
                continue  # damaged, or deleted meanwhile
            if not fits or shard["features"].dtype != self.dtype:
                continue
            for row, (key, checksum) in enumerate(zip(keys, checksums, strict=False)):
                place = path, row, checksum.tobytes()
                self._places.setdefault(key.tobytes(), []).append(place)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Tensor | None:
        """A feature, or ``None`` if there is none or none that is undamaged."""
        for path, row, checksum in self._places.get(key, ()):
            feature = _mapped(path)[row]
            if _checksum(key, feature) == checksum:
                return self._unpack(feature.clone())
        return None

    @property
    def nbytes(self) -> int:
        """Of a feature on disk."""
        return math.prod(self._row) * self.dtype.itemsize + 40  # key and checksum

    def holds(self, feature: Tensor) -> bool:
        """Whether all of its numbers are finite, also when they are stored."""
        stored = feature if self.dtype == torch.int8 else feature.to(self.dtype)
        return bool(torch.isfinite(stored).all())

    def add(self, key: bytes, feature: Tensor) -> None:
        """Take a feature, which is on disk after the next :meth:`flush`, or before.

        Raises:
            LavisError: as :meth:`flush`.
        """
        assert len(key) == 32 and feature.shape == self.shape
        if not self._added:
            self._due = time.monotonic() + _SECONDS
        self._added[key] = row = self._pack(feature.detach().cpu())
        if len(self._added) * row.nbytes >= _BYTES or time.monotonic() > self._due:
            self.flush()

    def _pack(self, feature: Tensor) -> Tensor:
        if self.dtype != torch.int8:
            return feature.to(self.dtype)
        scales = feature.float().abs().amax(0).clamp_min(1e-30) / 127
        numbers = (feature / scales).round().to(torch.int8)
        return torch.cat([numbers, scales.view(torch.int8).view(_SCALES, -1)])

    def _unpack(self, row: Tensor) -> Tensor:
        if self.dtype != torch.int8:
            return row
        scales = row[-_SCALES:].reshape(-1).view(torch.float32)
        return row[:-_SCALES] * scales

    def flush(self) -> None:
        """Write what has been added since the last shard.

        Raises:
            LavisError: the folder cannot be written, or the disk is full.
        """
        added, self._added = self._added, {}
        if not added:
            return
        checksums = b"".join(_checksum(key, feature) for key, feature in added.items())
        shard = {
            "keys": torch.frombuffer(bytearray(b"".join(added)), dtype=torch.uint8).view(-1, 32),
            "checksums": torch.frombuffer(bytearray(checksums), dtype=torch.uint8).view(-1, 8),
            "features": torch.stack(list(added.values())),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaces(self.folder / f"{uuid.uuid4().hex}.safetensors") as temporary:
                temporary.write_bytes(safetensors.torch.save(shard))
        except OSError as error:
            raise LavisError(
                f"run.feature_cache.dir: {self.folder} cannot be written: {error}. What has been "
                "written so far is kept"
            ) from error


@cache
def _mapped(path: Path) -> Tensor:
    """(N, *shape), whose pages come in as they are read. Each process maps a shard once."""
    return safetensors.torch.load_file(path)["features"]


def _checksum(key: bytes, feature: Tensor) -> bytes:
    content = feature.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, key=key, digest_size=8).digest()
