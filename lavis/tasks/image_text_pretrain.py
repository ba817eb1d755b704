"""Instruction tuning on image-text conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.paths import is_file, require_writable
from lavis.common.registry import BUILDERS, MODELS
from lavis.common.schema import Config
from lavis.common.types import Batch
from lavis.datasets.plan import ConcatDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTextPretrainTask:
    """Minimizes the cross-entropy of answers, given images and questions."""

    config: Config

    def check_paths(self, splits: Sequence[str] | None = None) -> None:
        """Check that every file that the run needs exists, before anything is read.

        Args:
            splits: default: the training splits.

        Raises:
            ConfigError, WeightsError, DataError: naming the setting and the path.
        """
        if not self.config.datasets:
            raise ConfigError("datasets is empty: name at least one data set")
        self.config.model.check_files(self.config.env.cache_root)
        run = self.config.run
        for builder in self._builders():
            builder.check_paths(tuple(splits or run.train_splits))
        self._check_image_sizes()
        if run.resume_ckpt_path is not None and not is_file(Path(run.resume_ckpt_path)):
            raise WeightsError(f"run.resume_ckpt_path: no checkpoint {run.resume_ckpt_path}")
        require_writable(Path(run.output_dir), "run.output_dir", ConfigError)

    def build_datasets(self) -> Dataset[Any]:
        """Read and check all annotations; the training splits end to end.

        Raises:
            DataError: a record cannot be used and ``run.on_bad_sample`` is ``error``.
        """
        splits = self.config.run.train_splits
        return ConcatDataset([d for split in splits for d in self.build_split(split, train=True)])

    def build_split(self, split: str, *, train: bool) -> list[Any]:
        """Read and check one split of every data set.

        Args:
            train: use the training processors rather than the evaluation ones.

        Raises:
            DataError: as :meth:`build_datasets`.
        """
        run, model = self.config.run, self.config.model
        encoder = MODELS.get(model.arch).build_encoder(model, self.config.env.cache_root)
        parts = []
        for builder in self._builders():
            parts.append(
                builder.build(split, encoder, train=train, seed=run.seed, on_bad=run.on_bad_sample)
            )
            logger.info("datasets.%s, %s: %d samples", builder.name, split, len(parts[-1]))
        return parts

    def build_model(self, device: torch.device) -> nn.Module:
        """Build the model and load its weights."""
        model = self.config.model
        return MODELS.get(model.arch).from_config(
            model, cache_root=self.config.env.cache_root, device=device
        )

    def train_step(self, model: nn.Module, batch: Batch) -> Any:
        """Summed loss of one micro-batch, a :class:`LossOutput`."""
        return model(batch)

    def _check_image_sizes(self) -> None:
        wanted = getattr(self.config.model, "image_size", None)
        for name, block in self.config.datasets.items():
            chosen = block.vis_processor.train or self.config.preprocess.vis_processor.train
            size = getattr(chosen, "image_size", wanted)
            if size != wanted:
                section = f"datasets.{name}" if block.vis_processor.train else "preprocess"
                raise ConfigError(
                    f"{self.config.source}: {section}.vis_processor.train.image_size is {size}, "
                    f"but model.image_size is {wanted}; they must be equal"
                )

    def _builders(self) -> list[Any]:
        return [
            BUILDERS.get(block.builder)(
                name, block, self.config.preprocess, self.config.env.cache_root
            )
            for name, block in self.config.datasets.items()
        ]
