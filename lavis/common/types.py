"""Values that pass between processors, data sets, models and runners."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not supervised (PyTorch's cross-entropy default)."""

IMAGE_PLACEHOLDER = "<ImageHere>"
"""Where an image stands in text; becomes ``num_query_token`` copies of a reserved token."""


DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "fp32": torch.float32,
}  # fmt: skip
"""What YAML calls the types of floating-point numbers."""

NO_WORDS = torch.empty(0, 0, 0, dtype=torch.int64)
NO_FEATURES = torch.empty(0, 0, 0)


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids.

    Attributes:
        input_ids: T ids.
        labels: T ids or :data:`IGNORE_INDEX`; ``labels[t]`` is predicted from positions before t.
        cut_tokens: how many more there were, past ``model.max_txt_len``.
        cut_answers: how many answers lie wholly among these.
    """

    input_ids: list[int]
    labels: list[int]
    cut_tokens: int = 0
    cut_answers: int = 0


@dataclass(frozen=True)
class Sample:
    """One training example.

    Attributes:
        sample_id: ``<data set>:<record number>`` or the record's own id.
        input_ids: (T,) int64.
        labels: (T,) int64.
        pixel_values: (N, 3, H, W) float, one per image span in order; N may be 0.
        word_ids: (M, Q, W) int64, for spans that are described in words instead: token ids of
            each position's phrase, filled up with -1. A sample has the one or the other.
        query_features: (N, Q, D) float, the Q-Former's output, in place of ``pixel_values``.
    """

    sample_id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    word_ids: Tensor = NO_WORDS
    query_features: Tensor = NO_FEATURES


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Documents packed end to end into one row of T tokens, on the host.

    The model moves what its device needs; whatever the device would have to be asked for (lengths,
    counts, positions), and so be waited for, is found here first.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64; the first position of a document is never supervised.
        position_ids: (1, T) int64, restarting at 0 in every document.
        lengths: tokens of each document.
        pixel_values: (N, 3, H, W) float, in order of the image spans.
        word_ids: (M, Q, W) int64, for spans described in words; -1 fills up.
        described: N + M, whether each span is one of those.
        sample_ids: one per document.
        bad: samples that were asked for and could not be read.
        query_features: (N, Q, D) float, in place of ``pixel_values``.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    pixel_values: Tensor
    word_ids: Tensor
    described: tuple[bool, ...]
    sample_ids: tuple[str, ...]
    bad: tuple[BadSample, ...] = ()
    query_features: Tensor = NO_FEATURES

    @property
    def num_images(self) -> int:
        """Number of images, N."""
        return len(self.pixel_values) + len(self.query_features)

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return self.input_ids.shape[1]

    def pin_memory(self) -> Batch:
        """Called by the data loader when it copies through pinned memory."""
        pinned = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **pinned)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reference:
    """What an answer is scored by, besides the true answer.

    Attributes:
        score: the metric, a name in ``METRICS``; empty: exact match by kind and language.
        dataset: the block of ``datasets`` that the score sheet is of.
        answers: what several people answered (VQA).
        options: what the letters of a multiple choice stand for (MMBench).
        group: questions that count together: on one image (MME), or one question with its options
            in several orders (MMBench).
        group_size: how many of them the benchmark has.
        division: what kinds of questions are summed up in: ``perception``, ``open``, ...
    """

    score: str = ""
    dataset: str = ""
    answers: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    group: str = ""
    group_size: int = 1
    division: str = ""


@dataclass(frozen=True)
class Metric:
    """What makes one model better than another.

    Attributes:
        name: key among the numbers that a validation returns.
        higher_is_better: its sign.
    """

    name: str
    higher_is_better: bool

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value beats the best so far. Not a number beats nothing."""
        if best is None:
            return value == value
        return value > best if self.higher_is_better else value < best
