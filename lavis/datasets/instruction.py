"""The instruction data set: checked records -> samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavis.common.errors import DataError
from lavis.common.seeds import drawing_from
from lavis.common.types import IMAGE_PLACEHOLDER, BadSample, Encoded, Sample, Spans
from lavis.common.videos import open_pictures
from lavis.datasets.annotations import Record
from lavis.datasets.features import CachedFeatures, ImageProcessor
from lavis.datasets.plan import Key
from lavis.processors.conversation import ConversationEncoder, Turn
from lavis.processors.text import process_around_images


@dataclass(frozen=True, eq=False)
class InstructionDataset(Dataset[Sample | BadSample]):
    """Samples by ``(epoch, index)``.

    Augmentation draws from a generator seeded by (seed, epoch, index): the number of workers and
    the order of reading change nothing.

    Attributes:
        seed: of the augmentation.
        lengths: tokens of each record.
        features: given in place of pixels, where the run keeps features.
    """

    records: Sequence[Record]
    encoder: ConversationEncoder
    vis_processor: ImageProcessor
    text_processor: Callable[[str], str]
    seed: int = 0
    lengths: tuple[int, ...] = ()
    features: CachedFeatures | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> Sample | BadSample:
        """Return a sample; one that cannot be read comes back as a :class:`BadSample`."""
        epoch, index = key
        record = self.records[index]
        try:
            encoded = self.encode(record)
            spans = self.spans(record, epoch, index)
        except DataError as error:
            return BadSample(record.sample_id, str(error))
        return Sample(
            sample_id=record.sample_id,
            input_ids=torch.tensor(encoded.input_ids),
            labels=torch.tensor(encoded.labels),
            spans=spans,
        )

    def encode(self, record: Record) -> Encoded:
        """Token ids and labels of a record.

        Raises:
            DataError: if truncation would leave nothing to learn from, or as :meth:`turns`.
        """
        return self.encoder.encode(self.turns(record))

    def turns(self, record: Record) -> list[Turn]:
        """A record's turns as the model reads them.

        Raises:
            DataError: it has not as many phrases as an image has positions, or the text processor
                changes the placeholders.
        """
        if record.words and len(record.words) != self.encoder.num_query_token:
            raise DataError(
                f"{len(record.words)} phrases in `words`, but an image takes "
                f"{self.encoder.num_query_token} positions (model.num_query_token)"
            )
        images = 1 if record.words else len(record.pictures)
        process = partial(process_around_images, self.text_processor)
        turns = [Turn(r, process(x)) if r == "user" else Turn(r, x) for r, x in record.shown_turns]
        left = sum(t.text.count(IMAGE_PLACEHOLDER) for t in turns if t.role == "user")
        if left != images:
            raise DataError(
                f"the text processor makes {left} image placeholders of {images}; it must not "
                f"write {IMAGE_PLACEHOLDER}"
            )
        return turns

    def spans(self, record: Record, epoch: int, index: int) -> Spans:
        """What a record's image spans show.

        Raises:
            DataError: an image or a video cannot be read.
        """
        if record.words:
            return Spans(words=self._word_ids(record.words))
        if not record.pictures:
            return Spans()
        if self.features is not None:
            cached = [self.features.read(picture, epoch) for picture in record.pictures]
            return Spans(features=torch.stack(cached))
        images = open_pictures(record.pictures)
        # Frames of a video are cropped and flipped alike: what moves in it is what moved.
        alike = [images] if record.video is None else [[image] for image in images]
        pixels: list[Tensor] = []
        for group in alike:
            with drawing_from(self.seed, epoch, index):
                pixels += [self.vis_processor(image) for image in group]
        return Spans(torch.stack(pixels))

    def _word_ids(self, words: Sequence[str]) -> Tensor:
        """(1, Q, W) token ids of the phrases that stand for an image."""
        rows = [self.encoder.tokenizer.encode(f" {phrase.strip()}") for phrase in words]
        width = max(map(len, rows))
        return torch.tensor([[[*row, *[-1] * (width - len(row))] for row in rows]])


class ConcatDataset(Dataset[Sample | BadSample]):
    """Several data sets end to end, asked by ``(epoch, index)``."""

    def __init__(self, datasets: Sequence[InstructionDataset | ConcatDataset]) -> None:
        self.datasets = list(datasets)
        self.sizes = tuple(map(len, self.datasets))

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(n for d in self.datasets for n in d.lengths)

    def __getitem__(self, key: Key) -> Sample | BadSample:
        epoch, index = key
        for dataset, size in zip(self.datasets, self.sizes, strict=True):
            if index < size:
                return dataset[epoch, index]
            index -= size
        raise IndexError(key)
