"""Values that pass between processors, data sets, models and runners."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
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

_NO_PIXELS = torch.empty(0)
_NO_FEATURES = torch.empty(0, 0, 0)
_NO_WORDS = torch.empty(0, 0, 0, dtype=torch.int64)


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
class Spans:
    """What the image spans of a text show, in order.

    Attributes:
        pixels: (N, 3, H, W) float, of pictures.
        features: (N, Q, D) float, what the vision encoder gives, in place of ``pixels``.
        words: (M, Q, W) int64, of spans that are described in words instead: token ids of each
            position's phrase, filled up with -1.
        described: N + M, whether each span is words; by default the last ones are.
    """

    pixels: Tensor = _NO_PIXELS
    features: Tensor = _NO_FEATURES
    words: Tensor = _NO_WORDS
    described: tuple[bool, ...] = ()

    @property
    def images(self) -> int:
        """N."""
        return len(self.pixels) + len(self.features)

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Of each span, whether it is words."""
        return self.described or (False,) * self.images + (True,) * len(self.words)

    @classmethod
    def join(cls, each: Sequence[Spans]) -> Spans:
        """Those of several texts, end to end."""
        width = max((s.words.shape[2] for s in each), default=0)
        words = (F.pad(s.words, (0, width - s.words.shape[2]), value=-1) for s in each)
        return cls(
            _joined((s.pixels for s in each), _NO_PIXELS),
            _joined((s.features for s in each), _NO_FEATURES),
            _joined(words, _NO_WORDS),
            tuple(is_words for s in each for is_words in s.kinds),
        )


def _joined(parts: Iterable[Tensor], none: Tensor) -> Tensor:
    kept = [part for part in parts if len(part)]
    return torch.cat(kept) if kept else none


@dataclass(frozen=True)
class Sample:
    """One training example.

    Attributes:
        sample_id: ``<data set>:<record number>`` or the record's own id.
        input_ids: (T,) int64.
        labels: (T,) int64.
        spans: of its images, or of its words.
    """

    sample_id: str
    input_ids: Tensor
    labels: Tensor
    spans: Spans = Spans()


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
        spans: of all documents.
        sample_ids: one per document.
        bad: samples that were asked for and could not be read.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    spans: Spans
    sample_ids: tuple[str, ...]
    bad: tuple[BadSample, ...] = ()

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
        spans = replace(self.spans, **_pinned(self.spans))  # type: ignore[arg-type]
        return replace(self, spans=spans, **_pinned(self))  # type: ignore[arg-type]


def _pinned(value: Spans | Batch) -> dict[str, Tensor]:
    return {k: v.pin_memory() for k, v in vars(value).items() if isinstance(v, Tensor)}


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
