"""Samples -> one packed row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from lavis.common import dist
from lavis.common.errors import DataError, in_lines
from lavis.common.types import IGNORE_INDEX, BadSample, Batch, Sample, Spans

logger = logging.getLogger(__name__)
_FILLER = Sample(
    sample_id="",
    input_ids=torch.zeros(2, dtype=torch.int64),
    labels=torch.full((2,), IGNORE_INDEX),
)


def collate(samples: Sequence[Sample | BadSample]) -> Batch:
    """Pack samples into one row. Bad samples are carried along by name.

    Without a good one the row is two tokens that supervise nothing: a process that has no samples
    left still computes with the others.
    """
    good = [s for s in samples if isinstance(s, Sample)] or [_FILLER]
    bad = tuple(s for s in samples if isinstance(s, BadSample))
    lengths = torch.tensor([len(s.input_ids) for s in good], dtype=torch.int64)
    starts = torch.cumsum(lengths, 0) - lengths
    labels = torch.cat([s.labels for s in good])
    labels[starts] = IGNORE_INDEX  # nothing before it in its own document predicts it
    positions = torch.arange(len(labels)) - torch.repeat_interleave(starts, lengths)
    return Batch(
        input_ids=torch.cat([s.input_ids for s in good])[None],
        labels=labels[None],
        position_ids=positions[None],
        lengths=tuple(lengths.tolist()),
        spans=Spans.join([s.spans for s in good]),
        sample_ids=tuple(s.sample_id for s in good if s is not _FILLER),
        bad=bad,
    )


def settle_bad(bad: Iterable[BadSample], on_bad: str) -> list[BadSample]:
    """Stop at samples that could not be read, or log them. Every process must call it.

    Args:
        bad: this process's.
        on_bad: ``error`` or ``skip``.

    Returns:
        Those of all processes.

    Raises:
        DataError: on every process, naming the first, with ``error``.
    """
    everyone = list(dict.fromkeys(b for share in dist.gather(tuple(bad)) for b in share))
    if everyone and on_bad == "error":
        raise DataError(
            f"{everyone[0].sample_id}: {everyone[0].reason} "
            "(run.on_bad_sample: skip leaves it out)",
            agreed=True,
        )
    if dist.is_main():
        for sample in everyone:
            logger.warning("skipped %s: %s", sample.sample_id, sample.reason)
    return everyone


def report_bad(bad: Sequence[BadSample], on_bad: str, refused: str, skipped: str) -> None:
    """Refuse samples that cannot be used, or log them: some words, and the first of them.

    Raises:
        DataError: there are any, with ``on_bad="error"``.
    """
    which = in_lines([f"{b.sample_id}: {b.reason}" for b in bad])
    if bad and on_bad == "error":
        raise DataError(f"{refused} (run.on_bad_sample: skip leaves them out):{which}")
    if bad and dist.is_main():
        logger.warning("%s:%s", skipped, which)
