"""Tensors of one shape by key, on disk: what a kill or a bad disk damages is never returned.

A folder holds shards. A shard is two files that only ever grow, written by one process:

* ``<id>.data``: records of equal size, end to end;
* ``<id>.index``: 16 bytes (``LAVISFC1``, record size as a little-endian 64-bit integer), then 48
  bytes for each record: its key (32), the BLAKE2b-8 of the record, and that of these 40 bytes with
  the record's number.

A record is written before its entry, so every prefix of the pair is a valid shard. Nobody writes to
a shard that another process began: a new writer begins a new one.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis.common.types import DTYPES

_MAGIC = b"LAVISFC1"
_HEADER = struct.Struct("<8sQ")
_ENTRY = struct.Struct("<32s8s8s")


class FeatureStore:
    """All shards of a folder, for reading."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
        """Open a folder, which need not exist.

        Args:
            shape: of every record.
            dtype: ``fp16``, ``bf16`` or ``fp32``.
        """
        name = "x".join(map(str, shape))
        self.folder, self.shape, self.dtype = folder / f"{name}-{dtype}", shape, DTYPES[dtype]
        self._record = torch.Size(shape).numel() * self.dtype.itemsize
        self.refresh()

    def refresh(self) -> None:
        """See what has been written since."""
        self._shards: list[tuple[Path, int]] = []
        self._places: dict[bytes, list[tuple[int, int, bytes]]] = {}
        self._maps: dict[int, Any] = {}
        for path in sorted(self.folder.glob("*.index")):
            self._read_index(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}  # another process maps the files itself

    def get(self, key: bytes) -> Tensor | None:
        """A record, or ``None`` if there is none or none that is undamaged."""
        for shard, row, checksum in self._places.get(key, ()):
            content = self._bytes(shard, row)
            if _checksum(content) == checksum:
                return torch.frombuffer(bytearray(content), dtype=self.dtype).view(self.shape)
        return None

    def writer(self) -> FeatureWriter:
        """A shard of one's own to write to."""
        return FeatureWriter(self.folder, self._record, self.dtype)

    def _bytes(self, shard: int, row: int) -> bytes:
        if shard not in self._maps:
            path, rows = self._shards[shard]
            shape = (rows, self._record)
            self._maps[shard] = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
        return self._maps[shard][row].tobytes()

    def _read_index(self, path: Path) -> None:
        data = path.with_suffix(".data")
        try:
            content, whole = path.read_bytes(), data.stat().st_size // self._record
        except FileNotFoundError:
            return
        if content[: _HEADER.size] != _HEADER.pack(_MAGIC, self._record) or not whole:
            return
        entries = memoryview(content)[_HEADER.size :]
        rows = min(len(entries) // _ENTRY.size, whole)
        for row, entry in enumerate(_ENTRY.iter_unpack(entries[: rows * _ENTRY.size])):
            key, checksum, check = entry
            if _checksum(_numbered(row, key, checksum)) == check:
                self._places.setdefault(key, []).append((len(self._shards), row, checksum))
        self._shards.append((data, whole))


class FeatureWriter:
    """Writes a new shard, whose files are made with the first record."""

    def __init__(self, folder: Path, record: int, dtype: torch.dtype) -> None:
        self._folder, self._record, self._dtype = folder, record, dtype
        self._files: tuple[Any, Any] | None = None
        self._rows = 0

    def add(self, key: bytes, value: Tensor) -> None:
        """Append a record.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        content = value.detach().to("cpu", self._dtype).contiguous().view(torch.uint8)
        record = content.numpy().tobytes()
        assert len(key) == 32 and len(record) == self._record
        data, index = self._files or self._open()
        data.write(record)
        data.flush()
        checksum = _checksum(record)
        index.write(_ENTRY.pack(key, checksum, _checksum(_numbered(self._rows, key, checksum))))
        index.flush()
        self._rows += 1

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files or ():
            file.close()

    def _open(self) -> tuple[Any, Any]:
        self._folder.mkdir(parents=True, exist_ok=True)
        base = self._folder / uuid.uuid4().hex
        files = base.with_suffix(".data").open("xb"), base.with_suffix(".index").open("xb")
        files[1].write(_HEADER.pack(_MAGIC, self._record))
        self._files = files
        return files


def _numbered(row: int, key: bytes, checksum: bytes) -> bytes:
    return struct.pack("<Q32s8s", row, key, checksum)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
