"""Builders: a block of ``datasets`` in YAML -> checked data sets."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from lavis.common.errors import ConfigError, DataError, in_lines
from lavis.common.paths import cache_path, require
from lavis.common.registry import PROCESSORS, did_you_mean
from lavis.common.schema import DatasetConfig, PreprocessConfig, ProcessorConfig
from lavis.common.types import BadSample
from lavis.datasets.annotations import Record, read_annotations
from lavis.datasets.instruction import InstructionDataset
from lavis.datasets.lengths import Length, count_tokens
from lavis.processors.config import BaseInstructionConfig
from lavis.processors.conversation import ConversationEncoder

logger = logging.getLogger(__name__)


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
        info = self.config.build_info
        for split in splits:
            if split not in info.annotations:
                known = ", ".join(info.annotations)
                raise ConfigError(
                    f"datasets.{self.name}.build_info.annotations has no split {split!r}"
                    f"{did_you_mean(split, info.annotations)} (it has: {known})"
                )
            for path in self._annotation_files(split):
                require(path, f"{self._key}.annotations.{split}.storage", DataError)
        if info.images.storage is not None:
            require(
                cache_path(info.images.storage, self.cache_root),
                f"{self._key}.images.storage",
                DataError,
                directory=True,
            )

    def build(
        self, split: str, encoder: ConversationEncoder, *, train: bool, seed: int, on_bad: str
    ) -> InstructionDataset:
        """Read and check every record of a split.

        Args:
            train: use the training processors rather than the evaluation ones.
            seed: of the augmentation.
            on_bad: ``error`` or ``skip``.

        Raises:
            DataError: naming the first bad records, with ``on_bad="error"``; or nothing is left.
        """
        self.check_paths((split,))
        info = self.config.build_info
        storage = info.images.storage
        media_root = None if storage is None else cache_path(storage, self.cache_root)
        dataset = InstructionDataset(
            [],
            encoder,
            PROCESSORS.get(self._vis(train).name)(self._vis(train)),
            PROCESSORS.get(self._text(train).name)(self._text(train)),
            info.max_frames,
            seed,
        )
        good: list[Record] = []
        bad: list[BadSample] = []
        lengths: list[Length] = []
        for path in self._annotation_files(split):
            records = list(read_annotations(path, media_root, self.config.format))
            readable = [r for r in records if isinstance(r, Record)]
            counts = iter(count_tokens(readable, dataset, path.name))
            for record in records:
                if isinstance(record, BadSample):
                    bad.append(record)
                elif isinstance(count := next(counts), str):
                    bad.append(BadSample(record.sample_id, count))
                else:
                    good.append(record)
                    lengths.append(count)
        report_bad(self.name, split, good, bad, on_bad)
        if cut := [n for n in lengths if n.cut]:
            logger.warning(
                "datasets.%s, %s: %d of %d records are longer than model.max_txt_len %d: %d tokens "
                "and %d whole answers at their ends are left out",
                self.name, split, len(cut), len(good), encoder.max_txt_len,
                sum(n.cut for n in cut), sum(n.cut_answers for n in cut),
            )  # fmt: skip
        dataset.records, dataset.lengths = good, tuple(n.kept for n in lengths)
        return dataset

    @property
    def _key(self) -> str:
        return f"datasets.{self.name}.build_info"

    def _annotation_files(self, split: str) -> list[Path]:
        paths = self.config.build_info.annotations[split].paths
        return [cache_path(path, self.cache_root) for path in paths]

    def _vis(self, train: bool) -> ProcessorConfig:
        own, default = self.config.vis_processor, self.preprocess.vis_processor
        chosen = (own.train or default.train) if train else (own.eval or default.eval)
        if chosen is None:
            raise ConfigError(
                f"datasets.{self.name}.vis_processor.{'train' if train else 'eval'} is missing, "
                "and the model's preprocess section names none"
            )
        return chosen

    def _text(self, train: bool) -> ProcessorConfig:
        own, default = self.config.text_processor, self.preprocess.text_processor
        chosen = (own.train or default.train) if train else (own.eval or default.eval)
        return chosen or BaseInstructionConfig("base_instruction")


def report_bad(
    name: str, split: str, good: list[Record], bad: list[BadSample], on_bad: str
) -> None:
    """Refuse or log bad samples.

    Raises:
        DataError: with ``on_bad="error"`` and a bad sample, or if no sample is left.
    """
    which = in_lines([f"{b.sample_id}: {b.reason}" for b in bad])
    if bad and on_bad == "error":
        raise DataError(
            f"datasets.{name}, split {split!r}: {len(bad)} of {len(good) + len(bad)} records "
            f"cannot be used (run.on_bad_sample: skip leaves them out):{which}"
        )
    if not good:
        raise DataError(f"datasets.{name}, split {split!r}: no usable record{which}")
    if bad:
        logger.warning("datasets.%s, %s: skipped %d:%s", name, split, len(bad), which)
