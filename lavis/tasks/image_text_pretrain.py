"""Instruction tuning on image-text conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lavis.common import dist
from lavis.common.errors import ConfigError, DataError
from lavis.common.packages import check_packages
from lavis.common.paths import cache_path, require_checkpoint, require_writable
from lavis.common.registry import BUILDERS, MODELS
from lavis.common.schema import Config
from lavis.common.types import DTYPES, Batch, Metric
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.collate import collate, settle_bad
from lavis.datasets.plan import ConcatDataset, shared_batches
from lavis.models.compute.schedule import StepSchedule
from lavis.models.weights.files import open_pth
from lavis.tasks.evaluate import answer_splits
from lavis.tasks.features import Counts, FeatureCache
from lavis.tasks.scoring import require_bleu

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTextPretrainTask:
    """Minimizes the cross-entropy of answers, given images and questions."""

    config: Config
    _splits: dict[tuple[str, int | None], list[Any]] = field(
        default_factory=dict, init=False, repr=False
    )
    _features: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
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
        answers = splits is not None or run.evaluate or bool(run.test_splits)
        if splits is None:
            splits, trained = self._evaluated, () if run.evaluate else run.train_splits
            self._check_run()
        for builder in self._builders():
            builder.check_paths((*trained, *splits))
        for side in ("train",) * bool(trained) + ("eval",) * bool(splits):
            for name, block in config.datasets.items():
                own = getattr(block.vis_processor, side)
                path = f"{f'datasets.{name}' if own else 'preprocess'}.vis_processor.{side}"
                default = getattr(config.preprocess.vis_processor, side)
                config.check_image_size(path, own or default)
        self._check_packages()
        self._check_model(answers=answers)
        if run.feature_cache.enabled:
            FeatureCache(config).check()

    def build_datasets(self) -> Dataset[Any]:
        """Read and check all annotations; the training splits end to end.

        Raises:
            DataError: a record cannot be used and ``run.on_bad_sample`` is ``error``.
            ConfigError: answers to a test split could not be scored.
        """
        run = self.config.run
        trained = () if run.evaluate else run.train_splits
        splits = [self.build_split(s, train=True) for s in trained]
        read = {split: self.evaluation_split(split) for split in self._evaluated}
        answered = run.test_splits or (run.valid_splits if run.evaluate else ())
        asked = [r for split in answered for part in read[split] for r in part.records]
        require_bleu(r.tags.get("kind") for r in asked)
        # One part for each block of `datasets`, whose share train_dataset_ratios may give.
        return ConcatDataset(
            [p[0] if len(p) == 1 else ConcatDataset(p) for p in zip(*splits, strict=True)]
        )

    def build_split(self, split: str, *, train: bool, limit: int | None = None) -> list[Any]:
        """Read and check one split of every data set.

        Args:
            train: use the training processors rather than the evaluation ones.
            limit: keep the first records of each data set.

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
            parts[-1].records = parts[-1].records[:limit]
            parts[-1].lengths = parts[-1].lengths[:limit]
        if run.feature_cache.enabled:
            views = run.feature_cache.views if train else 1
            self._features.setdefault("waiting", []).extend((part, views) for part in parts)
            if "device" in self._features:
                self.cache_features(self._features["device"])
        return parts

    def evaluation_split(self, split: str, limit: int | None = None) -> list[Any]:
        """One split of every data set for evaluation, read once."""
        if (split, limit) not in self._splits:
            self._splits[split, limit] = self.build_split(split, train=False, limit=limit)
        return self._splits[split, limit]

    def cache_features(self, device: torch.device) -> Counts:
        """Encode the images of all splits built so far, as far as the feature cache lacks them.

        With ``run.feature_cache.enabled``, :meth:`build_model` calls it, and a split that is built
        afterwards is encoded at once. Every process must call it.

        Raises:
            ConfigError, DataError: as :meth:`FeatureCache.fill`.
        """
        cache = self._features.setdefault("cache", FeatureCache(self.config))
        waiting = self._features.pop("waiting", [])
        self._features["device"] = device
        return cache.fill([d for d, _ in waiting], device, views=[v for _, v in waiting])

    def build_model(self, device: torch.device) -> nn.Module:
        """Build the model and load its weights; without its vision side for cached features."""
        config, run = self.config.model, self.config.run
        options: dict[str, Any] = {"cache_root": self.config.env.cache_root, "device": device}
        if run.feature_cache.enabled:
            self.cache_features(device)
            options["vision"] = False
        model = MODELS.get(config.arch).from_config(config, **options)
        if hasattr(model, "schedule"):
            model.schedule = StepSchedule.from_run(run, model)
        return model

    def validate(self, module: Any, device: torch.device) -> dict[str, float]:
        """Loss of the validation splits, each sample counted once over all processes.

        Args:
            module: computes a batch; every process calls it equally often.

        Returns:
            ``valid_loss``, nats per supervised token; ``valid_skipped``, if any were left out.

        Raises:
            DataError: a sample cannot be read and ``run.on_bad_sample`` is ``error``, or none can.
        """
        run = self.config.run
        parts = [d for split in run.valid_splits for d in self.evaluation_split(split)]
        loss_sum, supervised, skipped = 0.0, 0, 0
        training = module.training
        module.eval()
        with torch.no_grad():
            for dataset in parts:
                batches = shared_batches(len(dataset), run.batch_size_eval)
                loader = DataLoader(
                    dataset,
                    batch_sampler=batches,
                    collate_fn=collate,
                    num_workers=run.num_workers,
                    worker_init_fn=leave_signals_to_parent,
                )
                for batch in tqdm(loader, desc="validating", disable=not dist.is_main()):
                    skipped += len(settle_bad(batch.bad, run.on_bad_sample))
                    dtype = DTYPES[run.autocast_dtype]
                    with torch.autocast(device.type, dtype, enabled=run.amp):
                        output = self.train_step(module, batch.to(device))
                    loss_sum += output.loss_sum.item()
                    supervised += output.num_tokens
        module.train(training)
        loss_sum, total = dist.add_up([loss_sum, supervised])
        if not total:
            raise DataError(
                f"run.valid_splits ({', '.join(run.valid_splits)}): there is no token to compute "
                f"a loss of; {skipped} samples could not be read",
                agreed=True,
            )
        metrics = {"valid_loss": loss_sum / total}
        return metrics | ({"valid_skipped": float(skipped)} if skipped else {})

    def test(self, model: Any, job_id: str) -> str:
        """Answer the questions of the test splits, of the validation splits without any.

        Returns:
            A table of scores; answers, pictures and ``scores.json`` are in the run's folder.
        """
        run = self.config.run
        splits = {s: self.evaluation_split(s) for s in run.test_splits or run.valid_splits}
        out = Path(run.output_dir) / job_id / "evaluation"
        return answer_splits(run, model.eval(), splits, out)

    def train_step(self, model: nn.Module, batch: Batch) -> Any:
        """Summed loss of one micro-batch, a :class:`LossOutput`."""
        return model(batch)

    @property
    def _evaluated(self) -> tuple[str, ...]:
        run = self.config.run
        if run.evaluate:
            return run.test_splits or run.valid_splits
        return (*run.valid_splits, *run.test_splits)

    def _check_run(self) -> None:
        run = self.config.run
        if not run.evaluate and not getattr(self.config.model, "trains", True):
            raise ConfigError("nothing to train: every part of the model is frozen (freeze_*)")
        if run.resume_ckpt_path is not None:
            path = require_checkpoint(run.resume_ckpt_path, "run.resume_ckpt_path")
            if run.evaluate:
                open_pth(path)
        require_writable(Path(run.output_dir), "run.output_dir", ConfigError)

    def _check_packages(self) -> None:
        run = self.config.run
        if run.strategy == "deepspeed" or run.runner == "deepspeed_runner":
            check_packages("deepspeed", "run.strategy: deepspeed")
        if run.wandb_project is not None:
            check_packages("wandb", "run.wandb_project")

    def _check_model(self, *, answers: bool) -> None:
        model: Any = self.config.model
        root = self.config.env.cache_root
        if getattr(model, "load_finetuned", False):
            open_pth(cache_path(model.finetuned, root))  # its table of contents
        if describe := getattr(MODELS.get(model.arch), "describe", None):
            _, spec, _ = describe(model, root)
            if answers:
                spec.require_room(self.config.run.max_new_tokens, "run.max_new_tokens")

    def _builders(self) -> list[Any]:
        return [
            BUILDERS.get(block.builder)(
                name, block, self.config.preprocess, self.config.env.cache_root
            )
            for name, block in self.config.datasets.items()
        ]
