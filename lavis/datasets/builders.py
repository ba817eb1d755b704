"""Builders: a block of ``datasets`` in YAML -> checked data sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from lavis.common.errors import ConfigError, DataError, in_lines
from lavis.common.frames import VideoConfig
from lavis.common.images import read_size
from lavis.common.paths import cache_path, require
from lavis.common.registry import PROCESSORS, did_you_mean
from lavis.common.schema import DatasetConfig, PreprocessConfig, ProcessorConfig
from lavis.common.tiles import Grid
from lavis.common.types import BadSample
from lavis.common.videos import read_header
from lavis.datasets.annotations import Record, read_annotations
from lavis.datasets.collate import report_bad
from lavis.datasets.features import CachedFeatures, is_random
from lavis.datasets.instruction import InstructionDataset
from lavis.datasets.lengths import Length, count_tokens
from lavis.processors.config import BaseInstructionConfig
from lavis.processors.conversation import ConversationEncoder

logger = logging.getLogger(__name__)
_THREADS = 8  # that read the headers of videos


@dataclass(frozen=True)
class InstructionBuilder:
    """Builds the splits of one instruction data set.

    Attributes:
        name: the block's name under ``datasets``.
        config: the block.
        preprocess: the model's processors, used where the block names none.
        cache_root: folder that the block's paths are relative to.
    """

    name: str
    config: DatasetConfig
    preprocess: PreprocessConfig
    cache_root: str

    def check_paths(self, splits: tuple[str, ...]) -> None:
        """Check that annotation files and image folders exist.

        Raises:
            ConfigError: a split is not described.
            DataError: a path is missing.
        """
        key, known = f"datasets.{self.name}.build_info", self.config.build_info.annotations
        for split in splits:
            if split not in known:
                raise ConfigError(
                    f"{key}.annotations has no split {split!r}{did_you_mean(split, known)} "
                    f"(it has: {', '.join(known)})"
                )
            for path in self._annotation_files(split):
                storage = f"{key}.annotations.{split}.storage"
                require(path, storage, DataError, directory=self._in_folders)
        if (folder := self._media_root) is not None:
            require(folder, f"{key}.images.storage", DataError, directory=True)

    def build(
        self,
        split: str,
        encoder: ConversationEncoder,
        *,
        train: bool,
        seed: int,
        on_bad: str,
        limit: int | None = None,
        views: int | None = None,
    ) -> InstructionDataset:
        """Read and check every record of a split, whose paths :meth:`check_paths` has checked.

        Args:
            train: use the training processors rather than the evaluation ones.
            seed: of the augmentation.
            on_bad: ``error`` or ``skip``.
            limit: keep the first records.
            views: give features of so many views of an image in place of pixels.

        Raises:
            DataError: naming the first bad records, with ``on_bad="error"``; or nothing is left.
        """
        vis = self._processor("vis_processor", train)
        text = self._processor("text_processor", train)
        images = PROCESSORS.get(vis.name)(vis)
        dataset = InstructionDataset(
            (),
            encoder,
            images,
            PROCESSORS.get(text.name)(text),
            seed,
            features=None if views is None else CachedFeatures(images, seed, views),
        )
        good, bad = self._read(split, dataset)
        report_bad(
            bad,
            on_bad,
            f"datasets.{self.name}, split {split!r}: {len(bad)} of {len(good) + len(bad)} records "
            "cannot be used",
            f"datasets.{self.name}, {split}: skipped {len(bad)}",
        )
        if not good:
            which = in_lines([f"{b.sample_id}: {b.reason}" for b in bad])
            raise DataError(f"datasets.{self.name}, split {split!r}: no usable record{which}")
        if cut := [n for _, n in good if n.cut]:
            logger.warning(
                "datasets.%s, %s: %d of %d records are longer than model.max_txt_len %d: %d tokens "
                "and %d whole answers at their ends are left out",
                self.name, split, len(cut), len(good), encoder.max_txt_len,
                sum(n.cut for n in cut), sum(n.cut_answers for n in cut),
            )  # fmt: skip
        kept = good[:limit]
        return replace(
            dataset, records=[r for r, _ in kept], lengths=tuple(n.kept for _, n in kept)
        )

    def _read(
        self, split: str, dataset: InstructionDataset
    ) -> tuple[list[tuple[Record, Length]], list[BadSample]]:
        good: list[tuple[Record, Length]] = []
        bad: list[BadSample] = []
        for name, read in self._records(split, dataset.encoder):
            scored = [self._scored(r) if isinstance(r, Record) else r for r in read]
            records = self._measured(scored, dataset, name)
            readable = [r for r in records if isinstance(r, Record)]
            counts = iter(count_tokens(readable, dataset.encode, name))
            for record in records:
                if isinstance(record, BadSample):
                    bad.append(record)
                elif isinstance(count := next(counts), str):
                    bad.append(BadSample(record.sample_id, count))
                else:
                    good.append((record, count))
        return good, bad

    def _records(
        self, split: str, encoder: ConversationEncoder
    ) -> Iterator[tuple[str, Iterable[Record | BadSample]]]:
        """What each file holds, by its name."""
        check_system = cache(encoder.check_system)
        for path in self._annotation_files(split):
            kind = self.config.format
            yield path.name, read_annotations(path, self._media_root, kind, check_system)

    def _scored(self, record: Record) -> Record:
        if not self._score:
            return record
        reference = replace(record.reference, score=self._score, dataset=self.name)
        return replace(record, reference=reference)

    @property
    def _score(self) -> str:
        """The metric, or nothing."""
        return self.config.score or ""

    @property
    def _in_folders(self) -> bool:
        """Whether the annotations are named by their folder."""
        return False

    def _measured(
        self, records: Sequence[Record | BadSample], dataset: InstructionDataset, file: str
    ) -> list[Record | BadSample]:
        """Records with the numbers of their videos' frames, and the grids of their pictures."""
        tokens = dataset.encoder.num_query_token
        tiles = self._tiles(dataset)
        good = [r for r in records if isinstance(r, Record)]
        if not any(r.video is not None or (tiles and r.images) for r in good):
            return list(records)
        video, most = self.preprocess.video, self.config.build_info.max_frames
        if most not in (None, video.max_frames):
            logger.warning(
                "datasets.%s.build_info.max_frames is %d; chat shows up to %d frames of a video "
                "(preprocess.video.max_frames), other than what is trained on",
                self.name, most, video.max_frames,
            )  # fmt: skip
        video = replace(video, max_frames=most or video.max_frames).within(tokens)
        find = partial(_with_header, video=video, tiles=tiles)
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(find, records)
            return list(tqdm(found, f"headers of {file}", len(records), unit=" records"))

    def _tiles(self, dataset: InstructionDataset) -> Callable[[int, int], Grid] | None:
        """The grid of a picture by its width and height; nothing if pictures are not cut."""
        encoder, processor = dataset.encoder, dataset.vis_processor
        tiles = self.preprocess.tiles.within(
            encoder.num_query_token, encoder.max_txt_len, "model.max_txt_len"
        )
        if tiles.max == 1:
            return None
        name = type(processor).__name__
        if is_random(processor):
            raise ConfigError(
                f"datasets.{self.name}: preprocess.tiles and {name}, which draws random numbers, "
                "do not go together: a tile would be cropped again; take blip_image_eval"
            )
        side = getattr(processor, "image_size", None)
        if not isinstance(side, int):
            raise ConfigError(
                f"datasets.{self.name}: preprocess.tiles needs an image processor that "
                f"says its image_size, which {name} does not"
            )
        return partial(tiles.grid, side=side)

    @property
    def _media_root(self) -> Path | None:
        storage = self.config.build_info.images.storage
        return None if storage is None else cache_path(storage, self.cache_root)

    def _annotation_files(self, split: str) -> list[Path]:
        paths = self.config.build_info.annotations[split].paths
        return [cache_path(path, self.cache_root) for path in paths]

    def _processor(self, kind: str, train: bool) -> ProcessorConfig:
        """The block's processor of a kind, or the model's."""
        side = "train" if train else "eval"
        for section in (self.config, self.preprocess):
            chosen: ProcessorConfig | None = getattr(getattr(section, kind), side)
            if chosen is not None:
                return chosen
        if kind == "text_processor":
            return BaseInstructionConfig("base_instruction")
        raise ConfigError(
            f"datasets.{self.name}.{kind}.{side} is missing, and the model's preprocess section "
            "names none"
        )


def _with_header(
    record: Record | BadSample, video: VideoConfig, tiles: Callable[[int, int], Grid] | None
) -> Record | BadSample:
    """A record with the numbers of its video's frames, or the grids of its pictures; bad if a file
    cannot be read."""
    if isinstance(record, BadSample):
        return record
    try:
        if record.video is not None:
            return replace(record, frames=tuple(video.choose(*read_header(record.video))))
        if tiles is None:
            return record
        return replace(record, grids=tuple(tiles(*read_size(path)) for path in record.images))
    except DataError as error:
        return BadSample(record.sample_id, str(error))
