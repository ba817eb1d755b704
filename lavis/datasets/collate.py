"""Samples -> one packed row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis.common import dist
from lavis.common.errors import DataError, in_lines
from lavis.common.types import IGNORE_INDEX, NO_FEATURES, NO_WORDS, BadSample, Batch, Sample

logger = logging.getLogger(__name__)
_FILLER = Sample(
    sample_id="",
    input_ids=torch.zeros(2, dtype=torch.int64),
    labels=torch.full((2,), IGNORE_INDEX),
    pixel_values=torch.empty(0),
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
    shown = [(s.pixel_values, s.query_features, s.word_ids) for s in good]
    pixels, features, words, described = join_shown(shown)
    return Batch(
        input_ids=torch.cat([s.input_ids for s in good])[None],
        labels=labels[None],
        position_ids=positions[None],
        lengths=tuple(lengths.tolist()),
        pixel_values=pixels,
        word_ids=words,
        described=described,
        sample_ids=tuple(s.sample_id for s in good if s is not _FILLER),
        bad=bad,
        query_features=features,
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


def join_shown(
    shown: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, tuple[bool, ...]]:
    """What the image spans of several texts show, end to end.

    Args:
        shown: for each text pixels, features and words, as a :class:`Sample` has them.

    Returns:
        Pixels, features, words, filled up with -1, and of each span whether it is words.
    """
    pixels, features, words = ([s[i] for s in shown if len(s[i])] for i in range(3))
    width = max((w.shape[2] for w in words), default=0)
    words = [F.pad(w, (0, width - w.shape[2]), value=-1) for w in words]
    return (
        torch.cat(pixels) if pixels else torch.empty(0),
        torch.cat(features) if features else NO_FEATURES,
        torch.cat(words) if words else NO_WORDS,
        tuple(len(w) > 0 for p, f, w in shown for _ in range(len(p) + len(f) + len(w))),
    )
