"""The training loop of one process."""

from __future__ import annotations

import itertools
import logging
import math
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lavis.common.errors import ConfigError, DataError, LavisError
from lavis.common.optim import build_schedule, parameter_groups
from lavis.common.schema import Config
from lavis.common.types import Batch
from lavis.datasets.collate import collate
from lavis.datasets.instruction import augmentation_seed
from lavis.datasets.plan import BatchPlan, PlanSampler
from lavis.models.checkpoint import assign_model_state, trainable_state
from lavis.models.weights import WeightFile
from lavis.runners.checkpoint import Progress, copy_checkpoint, read_checkpoint, save_checkpoint
from lavis.runners.watch import Watch

logger = logging.getLogger(__name__)


class RunnerBase:
    """Trains a model.

    The gradient of an optimizer step is that of the mean cross-entropy over all its supervised
    tokens, however the step is cut into micro-batches.
    """

    def __init__(
        self, config: Config, task: Any, model: nn.Module, dataset: Dataset[Any], job_id: str
    ) -> None:
        """Prepare a run.

        Args:
            config: the whole configuration.
            task: defines a step.
            model: on its device, weights loaded.
            dataset: training samples by ``(epoch, index)``.
            job_id: name of the run's folder under ``run.output_dir``.

        Raises:
            ConfigError: nothing is trainable, or the schedule does not fit.
            WeightsError: the checkpoint to resume from cannot be used.
        """
        self.config, self.run = config, config.run
        self.task, self.model, self.dataset = task, model, dataset
        self.device = torch.device(next(model.parameters()).device)
        self.plan = BatchPlan(
            len(dataset),  # type: ignore[arg-type]
            self.run.batch_size_train,
            self.run.accum_grad_iters,
            self.run.seed,
        )
        self.schedule = build_schedule(self.run, self.plan.steps_per_epoch)
        groups = parameter_groups(
            model.named_parameters(),
            self.run.weight_decay,
            self.run.lr_layer_decay,
            config.model.vit_config.depth if hasattr(config.model, "vit_config") else 0,
        )
        self.trained = [p for group in groups for p in group["params"]]
        if not self.trained:
            raise ConfigError("nothing to train: every part of the model is frozen (freeze_*)")
        self.optimizer = torch.optim.AdamW(groups, lr=self.run.init_lr, betas=(0.9, self.run.beta2))
        fp16 = self.run.amp and self.run.autocast_dtype in ("fp16", "float16")
        self.autocast_dtype = torch.float16 if fp16 else torch.bfloat16
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.run.amp and fp16 and self.run.loss_scale
        )
        self.step = 0  # optimizer steps done
        self._stop: signal.Signals | None = None
        if self.run.resume_ckpt_path is not None:
            self._resume(Path(self.run.resume_ckpt_path))
        self.folder = Path(self.run.output_dir) / job_id
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.output_dir: {self.folder} cannot be made: {error}") from error
        OmegaConf.save(OmegaConf.create(config.tree), self.folder / "config.yaml")

    def train(self) -> Path:
        """Train all epochs.

        Returns:
            The last checkpoint. After Ctrl-C or SIGTERM that is the state of the last complete
            step, and :attr:`interrupted` is true.

        Raises:
            LavisError: a bad sample or a loss that is not finite; the state before it is saved.
        """
        total = self.run.max_epoch * self.plan.steps_per_epoch
        watch = Watch(self.folder, total, self.step, self.run.log_freq)
        first = self.step
        if first >= total:
            logger.warning(
                "nothing left to train: %d of %d steps are done; raise run.max_epoch", first, total
            )
        try:
            with self._catch_signals():
                for epoch in range(self.step // self.plan.steps_per_epoch, self.run.max_epoch):
                    self._train_epoch(epoch, watch)
                    if self.step == (epoch + 1) * self.plan.steps_per_epoch:
                        self._save_epoch(epoch, watch)
                    if self.interrupted:
                        return self._save_latest()
        except BaseException as error:
            if self.step > first:
                watch.flush()
                logger.error("stopped by %s; %s", type(error).__name__, self._how_to_resume())
                self._save_latest()
            raise
        finally:
            watch.close()
        return self.folder / "checkpoint_latest.pth" if self.step > first else self._save_latest()

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked the run to stop."""
        return self._stop is not None

    def _train_epoch(self, epoch: int, watch: Watch) -> None:
        self.model.train()
        in_epoch = self.step - epoch * self.plan.steps_per_epoch
        batches = iter(self._loader(epoch, in_epoch))
        for _ in range(in_epoch, self.plan.steps_per_epoch):
            micro_batches = list(itertools.islice(batches, self.run.accum_grad_iters))
            self._refuse_bad(micro_batches)
            self._train_step(epoch, [b for b in micro_batches if b.num_supervised], watch)
            if self.interrupted:
                logger.warning(
                    "%s: stopping after step %d; %s",
                    self._stop.name if self._stop else "", self.step, self._how_to_resume(),
                )  # fmt: skip
                return

    def _train_step(self, epoch: int, micro_batches: list[Batch], watch: Watch) -> None:
        lr = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        supervised = sum(b.num_supervised for b in micro_batches)
        loss_sum = 0.0
        for i, batch in enumerate(micro_batches):
            # Dropout, where there is any, depends on the step alone: resuming changes nothing.
            torch.manual_seed(augmentation_seed(self.run.seed, self.step, i))
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.run.amp):
                output = self.task.train_step(self.model, batch.to(self.device))
            self.scaler.scale(output.loss_sum / supervised).backward()
            loss_sum += output.loss_sum.item()
            if not math.isfinite(loss_sum):
                self._refuse_step("loss", batch.sample_ids)
        grad_norm = 0.0
        if micro_batches:
            self.scaler.unscale_(self.optimizer)
            grad_norm = float(
                nn.utils.clip_grad_norm_(self.trained, self.run.grad_norm_clip or math.inf)
            )
            if not math.isfinite(grad_norm) and not self.scaler.is_enabled():
                self._refuse_step("gradient", [s for b in micro_batches for s in b.sample_ids])
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        watch.step(
            step=self.step,
            epoch=epoch,
            loss_sum=loss_sum,
            supervised=supervised,
            tokens=sum(b.num_tokens for b in micro_batches),
            samples=sum(len(b.sample_ids) for b in micro_batches),
            lr=lr,
            grad_norm=grad_norm,
        )
        self.step += 1

    def _refuse_step(self, what: str, sample_ids: Sequence[str]) -> NoReturn:
        self.optimizer.zero_grad(set_to_none=True)
        raise LavisError(
            f"the {what} of step {self.step} is not finite; samples: {', '.join(sample_ids)}. "
            "Lower run.init_lr, or use bf16"
        )

    def _loader(self, epoch: int, first_step: int) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=PlanSampler(self.plan.micro_batches(epoch, first_step)),
            collate_fn=collate,
            num_workers=self.run.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
        )

    def _refuse_bad(self, batches: list[Batch]) -> None:
        for bad in (b for batch in batches for b in batch.bad):
            if self.run.on_bad_sample == "error":
                raise DataError(
                    f"{bad.sample_id}: {bad.reason} (run.on_bad_sample: skip leaves it out)"
                )
            logger.warning("skipped %s: %s", bad.sample_id, bad.reason)

    def _save_epoch(self, epoch: int, watch: Watch) -> None:
        watch.flush()
        path = self.folder / f"checkpoint_{epoch}.pth"
        self._save(path)
        copy_checkpoint(path, self.folder / "checkpoint_latest.pth")
        watch.write({"epoch": epoch, "checkpoint": path.name})

    def _save_latest(self) -> Path:
        path = self.folder / "checkpoint_latest.pth"
        self._save(path)
        return path

    def _save(self, path: Path) -> None:
        save_checkpoint(
            path,
            model=trainable_state(self.model),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict() if self.scaler.is_enabled() else None,
            config=self.config.tree,
            progress=Progress(self.step, self.plan.steps_per_epoch),
        )

    def _resume(self, path: Path) -> None:
        content, progress = read_checkpoint(path, self.plan.steps_per_epoch)
        assign_model_state(self.model, WeightFile.of(str(path), content["model"]))
        if content["optimizer"]:
            groups = self.optimizer.param_groups
            options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
            try:
                self.optimizer.load_state_dict(content["optimizer"])
            except (ValueError, KeyError, TypeError) as error:
                raise LavisError(
                    f"{path}: its optimizer belongs to other trainable parameters ({error}); "
                    "the freeze_* settings differ"
                ) from error
            for group, own in zip(self.optimizer.param_groups, options, strict=True):
                group.update(own)  # the configuration decides, and the original has no lr_scale
        else:
            logger.warning("%s holds no optimizer state: AdamW starts afresh", path)
        if self.scaler.is_enabled() and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.step = progress.step
        logger.info("resumed from %s at step %d", path, self.step)

    def _how_to_resume(self) -> str:
        # The folder's own configuration holds what --options said, too.
        config, path = self.folder / "config.yaml", self.folder / "checkpoint_latest.pth"
        command = ["python", "train.py", "--cfg-path", str(config)]
        return "resume with: " + shlex.join([*command, "--options", f"run.resume_ckpt_path={path}"])

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the current step; a second one ends it now."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return

        def request_stop(number: int, frame: object) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number)

        caught = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(s, request_stop) for s in caught]
        try:
            yield
        finally:
            for s, handler in zip(caught, before, strict=True):
                signal.signal(s, handler)


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when loading ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
