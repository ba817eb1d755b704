"""Instruction tuning on image-text conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from lavis.common import dist
from lavis.common.errors import ConfigError, DataError
from lavis.common.packages import check_packages
from lavis.common.paths import cache_path, require_checkpoint, require_writable
from lavis.common.registry import BUILDERS, MODELS
from lavis.common.schema import Config
from lavis.common.types import DTYPES, Batch, Metric
from lavis.datasets.collate import settle_bad
from lavis.datasets.feature_cache import Counts, fill_features
from lavis.datasets.instruction import InstructionDataset
from lavis.datasets.plan import shared_batches
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import PartsConfig
from lavis.models.vision.frozen import FrozenVision
from lavis.models.weights.files import open_pth
from lavis.tasks.data import RunData, Splits, load_batches
from lavis.tasks.scoring import check_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTextPretrainTask:
    """Minimizes the cross-entropy of answers, given images and questions."""

    config: Config
    metric: ClassVar[Metric] = Metric("valid_loss", higher_is_better=False)

    def check_paths(self, splits: Sequence[str] | None = None, trained: Sequence[str] = ()) -> None:
        """Check all settings, and that every file that the run needs exists.

        Args:
            splits: to be evaluated. Without, the whole run of ``train.py`` is checked, with its
                output folder and the checkpoint to resume from.
            trained: splits whose training samples are needed besides.

        Raises:
            ConfigError, WeightsError, DataError: naming the setting and the path.
        """
        config, run = self.config, self.config.run
        if not config.datasets:
            raise ConfigError("datasets is empty: name at least one data set")
        config.model.check_files(config.env.cache_root)
        answers = splits is not None or bool(self._answered)
        if splits is None:
            splits, trained = self._evaluated, () if run.evaluate else run.train_splits
            self._check_run()
        for builder in self._builders():
            builder.check_paths((*trained, *splits))
        self._builders(*("train",) * bool(trained), *("eval",) * bool(splits))
        if run.wandb_project is not None:
            check_packages("wandb", "run.wandb_project")
        self._check_model(answers=answers)
        if run.feature_cache.enabled:
            FrozenVision(config).check()

    def build_datasets(self) -> RunData:
        """Read and check all annotations.

        Raises:
            DataError: a record cannot be used and ``run.on_bad_sample`` is ``error``.
            ConfigError: answers to a test split could not be scored.
        """
        run = self.config.run
        names = () if run.evaluate else run.train_splits
        trained = [self.build_split(s, train=True) for s in names]
        answered = self.build_questions(self._answered)
        others = [s for s in self._evaluated if s not in answered]
        validated = {s: self.build_split(s, train=False) for s in others}
        return RunData(trained, {**validated, **answered})

    def build_questions(self, splits: Sequence[str], limit: int | None = None) -> Splits:
        """Read and check splits whose questions are going to be answered.

        Raises:
            DataError: as :meth:`build_datasets`, or answers could not be scored.
            ConfigError: they could not be scored here.
        """
        read = {s: self.build_split(s, train=False, limit=limit) for s in splits}
        check_scores(r for parts in read.values() for part in parts for r in part.records)
        return read

    def build_split(
        self, split: str, *, train: bool, limit: int | None = None
    ) -> list[InstructionDataset]:
        """Read and check one split of every data set.

        Args:
            train: use the training processors rather than the evaluation ones.
            limit: keep the first records of each data set.

        Raises:
            DataError: as :meth:`build_datasets`.
        """
        run, model = self.config.run, self.config.model
        encoder = MODELS.get(model.arch).build_encoder(model, self.config.env.cache_root)
        cached = run.feature_cache.enabled
        views = (run.feature_cache.views if train else 1) if cached else None
        parts = []
        for builder in self._builders("train" if train else "eval"):
            part = builder.build(
                split,
                encoder,
                train=train,
                seed=run.seed,
                on_bad=run.on_bad_sample,
                limit=limit,
                views=views,
            )
            logger.info("datasets.%s, %s: %d samples", builder.name, split, len(part))
            parts.append(part)
        return parts

    def cache_features(
        self, data: RunData, device: torch.device, *, estimate: bool = False
    ) -> Counts:
        """Give the data their images' features; encode what the feature cache lacks.

        Every process must call it. With ``estimate`` nothing is encoded.

        Raises:
            ConfigError, DataError: as :func:`fill_features`.
        """
        trained = [part for parts in data.trained for part in parts]
        evaluated = [part for parts in data.evaluated.values() for part in parts]
        vision, datasets = FrozenVision(self.config), [*trained, *evaluated]
        return fill_features(self.config, datasets, vision, device, estimate=estimate)

    def build_model(
        self,
        device: torch.device,
        data: RunData | None = None,
        *,
        mapped: bool = False,
        start: bool = False,
    ) -> nn.Module:
        """Build the model and load its weights.

        Args:
            data: with ``run.feature_cache.enabled`` they get features, and the model has no vision
                side. Every process must call it.
            mapped: leave the weights in their files, for a strategy that shards them.
            start: of training, or a checkpoint is going to be loaded: ``model.finetuned`` may lack
                what is new.
        """
        config, run = self.config.model, self.config.run
        options: dict[str, Any] = {"cache_root": self.config.env.cache_root, "device": device}
        options |= {"mapped": True} if mapped else {}
        options |= {"start": True} if start and getattr(config, "load_finetuned", False) else {}
        if run.feature_cache.enabled and data is not None:
            self.cache_features(data, device)
            options["vision"] = False
        model = MODELS.get(config.arch).from_config(config, **options)
        if hasattr(model, "set_schedule") and not mapped:  # the runner knows what memory is left
            learns = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            each = 3 + (dist.world_size() > 1)  # a gradient, two moments, what is sent of it
            model.set_schedule(StepSchedule.from_run(run, model, reserved=each * learns))
        return model

    def validate(self, module: nn.Module, splits: Splits, device: torch.device) -> dict[str, float]:
        """Loss of some splits, each sample counted once over all processes.

        Args:
            module: computes a batch; every process calls it equally often.

        Returns:
            ``valid_loss``, nats per supervised token; ``valid_skipped``, if any were left out.

        Raises:
            DataError: a sample cannot be read and ``run.on_bad_sample`` is ``error``, or none can.
        """
        run = self.config.run
        loss_sum, supervised, skipped = 0.0, 0, 0
        training = module.training
        module.eval()
        for dataset in (part for parts in splits.values() for part in parts):
            keys = shared_batches(len(dataset), run.batch_size_eval)
            loader = load_batches(dataset, keys, run.num_workers)
            for batch in tqdm(loader, desc="validating", disable=not dist.is_main()):
                skipped += len(settle_bad(batch.bad, run.on_bad_sample))
                dtype = DTYPES[run.autocast_dtype]
                with torch.no_grad(), torch.autocast(device.type, dtype, enabled=run.amp):
                    output = self.train_step(module, batch)
                loss_sum += output.loss_sum.item()
                supervised += output.num_tokens
        module.train(training)
        loss_sum, total = dist.add_up([loss_sum, supervised])
        if not total:
            raise DataError(
                f"run.valid_splits ({', '.join(splits)}): there is no token to compute "
                f"a loss of; {skipped} samples could not be read",
                agreed=True,
            )
        metrics = {"valid_loss": loss_sum / total}
        return metrics | ({"valid_skipped": float(skipped)} if skipped else {})

    def train_step(self, model: nn.Module, batch: Batch) -> Any:
        """Summed loss of one micro-batch, a :class:`LossOutput`."""
        return model(batch)

    @property
    def _answered(self) -> tuple[str, ...]:
        run = self.config.run
        return run.test_splits or (run.valid_splits if run.evaluate else ())

    @property
    def _evaluated(self) -> tuple[str, ...]:
        run = self.config.run
        return self._answered if run.evaluate else (*run.valid_splits, *run.test_splits)

    def _check_run(self) -> None:
        run, model = self.config.run, self.config.model
        if not run.evaluate and not getattr(model, "trains", True):
            raise ConfigError(
                f"nothing to train: every part of the model is frozen ({model.LEARNS_BY})"
            )
        if (
            not run.evaluate
            and isinstance(model, PartsConfig)
            and model.parts[2].device_map == "auto"
        ):
            raise ConfigError(
                f"{model.key('language', 'device_map')} is auto, which spreads a language model "
                "over cards for chat and cannot train it; remove it. A model that is too large for "
                "a card trains with run.strategy: fsdp2"
            )
        if run.resume_ckpt_path not in (None, "auto"):
            path = require_checkpoint(run.resume_ckpt_path, "run.resume_ckpt_path")
            if run.evaluate:
                open_pth(path)
        require_writable(Path(run.output_dir), "run.output_dir", ConfigError)

    def _check_model(self, *, answers: bool) -> None:
        model: Any = self.config.model
        root = self.config.env.cache_root
        if getattr(model, "load_finetuned", False):
            open_pth(cache_path(model.finetuned, root))  # its table of contents
        if describe := getattr(MODELS.get(model.arch), "describe", None):
            _, spec, _ = describe(model, root)
            if answers:
                spec.require_room(self.config.run.max_new_tokens, "run.max_new_tokens")

    def _builders(self, *sides: str) -> list[Any]:
        """A builder of each data set, whose image processors of these sides fit the model."""
        config, builders = self.config, []
        for name, block in config.datasets.items():
            fit: dict[str, Any] = {}
            for side in sides:
                processor, home = getattr(block.vis_processor, side), f"datasets.{name}"
                if processor is None:
                    processor, home = getattr(config.preprocess.vis_processor, side), "preprocess"
                fit[side] = config.fit(f"{home}.vis_processor.{side}", processor)
            block = replace(block, vis_processor=replace(block.vis_processor, **fit))
            kind = BUILDERS.get(block.builder)
            builders.append(kind(name, block, config.preprocess, config.env.cache_root))
        return builders
