"""Tokens of every record, counted in parallel before a run begins."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from lavis.common.errors import DataError
from lavis.common.types import Encoded
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.annotations import Record

_PARALLEL_FROM = 20_000  # records; fewer are counted before other processes have started


class Length(NamedTuple):
    """Tokens of a record."""

    kept: int  # that are trained on
    cut: int  # that lie past `model.max_txt_len`
    cut_answers: int  # answers that lie wholly among these


def count_tokens(
    records: Sequence[Record], encode: Callable[[Record], Encoded], name: str
) -> list[Length | str]:
    """Encode every record to learn its length.

    Args:
        name: of their file, for the progress bar.

    Returns:
        For each record its length, or why it cannot be used.
    """
    global _encode
    _encode = encode
    bar = partial(tqdm, desc=f"checking {name}", unit=" records", total=len(records))
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if len(records) < _PARALLEL_FROM or processes < 2:
        return [_length(r) for r in bar(records)]
    with multiprocessing.get_context("fork").Pool(processes, leave_signals_to_parent) as pool:
        return list(bar(pool.imap(_length, records, chunksize=256)))


_encode: Callable[[Record], Encoded]  # a forked process has it already, and need not be sent it


def _length(record: Record) -> Length | str:
    try:
        encoded = _encode(record)
    except DataError as error:
        return str(error)
    return Length(len(encoded.input_ids), encoded.cut_tokens, encoded.cut_answers)
