"""Tokens of every record, counted once: in parallel, and kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

import lavis
from lavis.common.errors import DataError
from lavis.common.paths import user_cache
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.annotations import Record
from lavis.datasets.instruction import InstructionDataset

logger = logging.getLogger(__name__)
_PARALLEL_FROM = 20_000  # records; fewer are counted before other processes have started

Counted = list[int | str]
"""Tokens of each record, or why it cannot be used."""


def count_tokens(records: Sequence[Record], dataset: InstructionDataset, path: Path) -> Counted:
    """Encode every record to learn its length, or read the lengths of an earlier run.

    Kept in the user's cache under a name that is a hash of all that they depend on: the annotation
    file, which of its records can be read, the vocabulary, the encoder's and the text processor's
    settings and this package's version. A video's length depends on the video, and a third party's
    text processor on its code, so these are counted anew.

    Args:
        records: of the annotation file ``path``, in order.
        dataset: encodes them.
    """
    kept = None
    own = type(dataset.text_processor).__module__.startswith("lavis.")
    if own and not any(r.video for r in records):
        kept = user_cache() / "lengths" / f"{_fingerprint(records, dataset, path)}.json"
        counted = _read(kept, len(records))
        if counted is not None:
            return counted
    counted = _count(records, dataset, path.name)
    if kept is not None:
        _write(kept, counted)
    return counted


def _count(records: Sequence[Record], dataset: InstructionDataset, name: str) -> Counted:
    global _dataset
    _dataset = dataset
    bar = partial(tqdm, desc=f"checking {name}", unit=" records", total=len(records))
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if len(records) < _PARALLEL_FROM or processes < 2:
        return [_length(r) for r in bar(records)]
    with multiprocessing.get_context("fork").Pool(processes, leave_signals_to_parent) as pool:
        return list(bar(pool.imap(_length, records, chunksize=256)))


_dataset: InstructionDataset


def _length(record: Record) -> int | str:
    try:
        return len(_dataset.encode(record).input_ids)
    except DataError as error:
        return str(error)


def _fingerprint(records: Sequence[Record], dataset: InstructionDataset, path: Path) -> str:
    encoder = dataset.encoder
    settings = [
        lavis.__version__,
        encoder.num_query_token,
        encoder.max_txt_len,
        encoder.label_mask,
        encoder.system,
        type(dataset.text_processor).__qualname__,
        repr(getattr(dataset.text_processor, "config", None)),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in (encoder.tokenizer.path, path):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for record in records:  # images come and go, and `format` says how a record is read
        digest.update(repr((record.sample_id, record.turns)).encode())
    return digest.hexdigest()[:32]


def _read(path: Path, count: int) -> Counted | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(content, list) and len(content) == count
    return content if whole and all(isinstance(x, int | str) for x in content) else None


def _write(path: Path, counted: Counted) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(counted), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.info("token counts are not kept for the next run: %s", error)
