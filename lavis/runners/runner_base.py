"""The training loop: the same for every strategy and any number of processes."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lavis.common import dist
from lavis.common.errors import ConfigError, LavisError
from lavis.common.optim import parameter_groups
from lavis.common.schema import Config, RunConfig
from lavis.common.types import Batch
from lavis.common.workers import leave_signals_to_parent
from lavis.datasets.collate import collate, settle_bad
from lavis.datasets.instruction import augmentation_seed
from lavis.datasets.plan import PlanSampler
from lavis.models.config import PartsConfig
from lavis.models.vision.eva_qformer import layers_above
from lavis.models.weights.files import state_dict_in
from lavis.models.weights.trained import assign_model_state, trainable_state
from lavis.runners.agreement import fingerprint
from lavis.runners.checkpoint import Best, Progress
from lavis.runners.keeper import Keeper
from lavis.runners.launch import make_folder
from lavis.runners.prepare import RunPlan
from lavis.runners.signals import StopRequest
from lavis.runners.watch import StepReport, build_watch

logger = logging.getLogger(__name__)


class RunnerBase:
    """Trains a model.

    The gradient of an optimizer step is that of the mean cross-entropy over all its supervised
    tokens, however the step is cut into micro-batches and spread over processes.
    """

    def __init__(
        self,
        config: Config,
        task: Any,
        model: nn.Module,
        dataset: Dataset[Any],
        job_id: str,
        plan: RunPlan | None = None,
    ) -> None:
        """Prepare a run. Every process calls this.

        Args:
            config: the whole configuration.
            task: defines a step and what makes a model better.
            model: on its device, weights loaded.
            dataset: training samples by ``(epoch, index)``.
            job_id: name of the run's folder under ``run.output_dir``, the same in all processes.
            plan: what was found to fit before the model was built; by default it is made here.

        Raises:
            ConfigError: nothing is trainable, or as :meth:`RunPlan.of`.
            WeightsError: the checkpoint to resume from cannot be used.
        """
        self.config, self.run = config, config.run
        self.task, self.model, self.dataset = task, model, dataset
        self.device = torch.device(next(model.parameters()).device)
        plan = plan or RunPlan.of(config, dataset, self.device)
        self.strategy, self.plan, self.schedule = plan.strategy, plan.batches, plan.schedule
        self.data, self.step = plan.data, plan.step  # optimizer steps done
        depth, rates = _rates(config)
        groups = parameter_groups(
            model.named_parameters(),
            self.run.weight_decay,
            self.run.lr_layer_decay,
            partial(layers_above, depth=depth),
            rates,
        )
        if not any(group["params"] for group in groups):
            raise ConfigError("nothing to train: every part of the model is frozen (freeze_*)")
        for line in _what_learns(model, self.run, rates):
            logger.info("%s", line)
        source, content, best = self.run.resume_ckpt_path, plan.content, None
        if content is not None:
            assign_model_state(model, state_dict_in(source, content))
            best = Best.of(content, source, task.metric)
        self.strategy.setup(model, groups)
        if content is not None:
            self._load_optimizer(content, source)
        self.folder = make_folder(Path(self.run.output_dir) / job_id, config)
        self.keeper = Keeper(self.folder, self.run.keep_last, task.metric, best)
        self.stop = StopRequest()
        self._stopping = False  # whether every process is about to stop

    @property
    def optimizer(self) -> Any:
        """The strategy's optimizer."""
        return self.strategy.optimizer

    @property
    def interrupted(self) -> bool:
        """Whether a signal has stopped the run. The same in all processes."""
        return self._stopping

    def train(self) -> Path:
        """Train all epochs.

        Returns:
            The last checkpoint. After Ctrl-C or SIGTERM that is the state of the last complete
            step, and :attr:`interrupted` is true.

        Raises:
            LavisError: a bad sample, a number that is not finite, a full disk; the state before
                it is saved where that is possible.
        """
        total = self.run.max_epoch * self.plan.steps_per_epoch
        watch = build_watch(self.folder, total, self.step, self.config, self.model, self.device)
        first = self.step
        if first >= total:
            logger.warning(
                "nothing left to train: %d of %d steps are done; raise run.max_epoch", first, total
            )
        try:
            with self.stop.caught():
                for epoch in range(self.step // self.plan.steps_per_epoch, self.run.max_epoch):
                    self._train_epoch(epoch, watch)
                    if self.step == (epoch + 1) * self.plan.steps_per_epoch:
                        self._end_epoch(epoch, watch)
                    self._agree_to_stop(dist.add_up([self.stop.requested])[0])
                    if self.interrupted:
                        return self._save("latest")
        except BaseException as error:
            agreed = dist.world_size() == 1 or (isinstance(error, LavisError) and error.agreed)
            if self.step > first and agreed:
                self._save("latest")
                with contextlib.suppress(OSError):
                    watch.flush()
                if dist.is_main():
                    logger.error("stopped by %s; %s", type(error).__name__, self._how_to_resume())
            if isinstance(error, OSError):
                raise LavisError(
                    f"{self.folder} cannot be written: {error}. {self.keeper.last_good()}"
                ) from error
            raise
        finally:
            watch.close()
        path = self.folder / "checkpoint_latest.pth" if self.step > first else self._save("latest")
        if self.run.test_splits:
            logger.info("%s", self.task.test(self.model, self.folder.name))
        return path

    def _train_epoch(self, epoch: int, watch: Any) -> None:
        self.model.train()
        in_epoch = self.step - epoch * self.plan.steps_per_epoch
        plan = self.plan.micro_batches(epoch, dist.rank(), in_epoch)
        batches = iter(self._loader(PlanSampler(plan)))
        for micro_batches in plan:
            self._train_step(epoch, [next(batches) for _ in micro_batches], watch)
            if self.interrupted:
                if dist.is_main():
                    logger.warning(
                        "%s: stopping after step %d; %s",
                        self.stop.name, self.step, self._how_to_resume(),
                    )  # fmt: skip
                return
            every = self.run.save_every_steps
            if every and self.step % every == 0 and self.step % self.plan.steps_per_epoch:
                self._save(f"step_{self.step}")

    def _train_step(self, epoch: int, micro_batches: list[Batch], watch: Any) -> None:
        supervised = self._start_step(micro_batches)
        lr = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss_sum, grad_norm = 0.0, 0.0
        nonfinite: list[str] = []
        for i, batch in enumerate(micro_batches):
            # Dropout, where there is any, depends on the step alone: resuming changes nothing.
            torch.manual_seed(augmentation_seed(self.run.seed, self.step, self._number(i)))
            with self.strategy.micro_batch(last=i == len(micro_batches) - 1):
                output = self.task.train_step(self.strategy.module, batch.to(self.device))
                self.strategy.backward(output.loss_sum / max(supervised, 1))
            loss = output.loss_sum.item()
            loss_sum += loss
            if not math.isfinite(loss):
                nonfinite += batch.sample_ids
        real = [b for b in micro_batches if b.sample_ids]
        loss_sum, bad, tokens, fillers, images, samples, stop = dist.add_up(
            [
                loss_sum,
                not math.isfinite(loss_sum),
                sum(b.num_tokens for b in real),
                sum(b.num_tokens for b in micro_batches if not b.sample_ids),
                sum(b.num_images for b in real),
                sum(len(b.sample_ids) for b in real),
                self.stop.requested,
            ]
        )
        self._agree_to_stop(stop)
        if bad:
            skipped = self._refuse_step("loss", nonfinite)
        elif not supervised:
            self.strategy.zero_grad()
            skipped = True
        else:
            grad_norm = self.strategy.clip()
            skipped = not math.isfinite(grad_norm) and not self.strategy.rescales
            if skipped:
                self._refuse_step("gradient", [s for b in micro_batches for s in b.sample_ids])
            else:
                self.strategy.step()
        watch.step(
            StepReport(
                step=self.step,
                epoch=epoch,
                loss_sum=0.0 if skipped else loss_sum,
                supervised=0 if skipped else supervised,
                tokens=int(tokens),
                fillers=int(fillers),
                images=int(images),
                samples=int(samples),
                lr=lr,
                grad_norm=grad_norm,
            )
        )
        self.step += 1

    def _start_step(self, micro_batches: Sequence[Batch]) -> int:
        """Agree with the other processes on what is common to a step.

        Returns:
            Supervised tokens of the step, over all processes.
        """
        bad = [b for batch in micro_batches for b in batch.bad]
        counts = [sum(b.num_supervised for b in micro_batches), len(bad)]
        supervised, problems = dist.add_up(counts)
        if problems:
            settle_bad(bad, self.run.on_bad_sample)
        return int(supervised)

    def _agree_to_stop(self, requests: float) -> None:
        """Stop if any process was asked to: a signal reaches them at different moments."""
        if requests:
            self.stop.requested_elsewhere()
            self._stopping = True

    def _refuse_step(self, what: str, sample_ids: Iterable[str]) -> bool:
        """Leave the weights as they are; then stop the run or go on, as ``run.on_nonfinite`` says.

        The same on every process: what is not finite has been summed over all.
        """
        self.strategy.zero_grad()
        names = ", ".join(s for told in dist.gather(list(sample_ids)) for s in told)
        message = f"the {what} of step {self.step} is not finite; samples: {names}"
        if self.run.on_nonfinite == "skip":
            if dist.is_main():
                logger.warning("%s. The step is skipped (run.on_nonfinite)", message)
            return True
        raise LavisError(
            f"{message}. {self.keeper.last_good()} Lower run.init_lr, or use bf16; "
            "run.on_nonfinite: skip leaves such steps out",
            agreed=True,
        )

    def _number(self, micro_batch: int) -> int:
        """A number of a micro-batch within its step that no other process gives away."""
        return micro_batch * dist.world_size() + dist.rank()

    def _end_epoch(self, epoch: int, watch: Any) -> None:
        watch.flush()
        metrics: dict[str, float] = {}
        last = epoch + 1 == self.run.max_epoch
        if self.run.valid_splits and ((epoch + 1) % self.run.eval_freq == 0 or last):
            metrics = self.task.validate(self.strategy.module, self.device)
        path = self._save(str(epoch), metrics)
        watch.write({"epoch": epoch, "checkpoint": path.name, **metrics})

    def _save(self, name: str, metrics: dict[str, float] | None = None) -> Path:
        """Write ``checkpoint_<name>.pth``; every process takes part, the main one writes."""
        content = {
            "model": trainable_state(self.model, self.strategy.full),
            "optimizer": self.strategy.optimizer_state(),
            "scaler": self.strategy.scaler.state_dict() if self.strategy.rescales else None,
            "config": self.config.tree,
            "data": self.data,
        }
        plan = self.plan
        each = self.run.batch_size_train * self.run.accum_grad_iters
        progress = Progress(
            self.step, plan.steps_per_epoch, plan.samples_per_step, plan.samples_per_step // each
        )
        error = None
        if dist.is_main():
            splits = self.run.valid_splits if metrics else ()
            valid = fingerprint([d for s in splits for d in self.task.evaluation_split(s)])
            try:
                self.keeper.save(name, content, progress, metrics or {}, valid)
            except OSError as caught:
                error = str(caught)
        if error := dist.from_main(error):
            raise LavisError(
                f"{self.folder}/checkpoint_{name}.pth cannot be written: {error}. "
                f"{self.keeper.last_good()}"
            )
        return self.folder / f"checkpoint_{name}.pth"

    def _load_optimizer(self, content: dict[str, Any], source: str | None) -> None:
        if content["optimizer"]:
            try:
                self.strategy.load_optimizer_state(content["optimizer"])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise LavisError(
                    f"{source}: its optimizer belongs to other trainable parameters ({error}); "
                    "the freeze_* settings differ"
                ) from error
        else:
            logger.warning("%s holds no optimizer state: AdamW starts afresh", source)
        if self.strategy.rescales and content.get("scaler"):
            self.strategy.scaler.load_state_dict(content["scaler"])
        logger.info("resumed from %s at step %d", source, self.step)

    def _loader(self, sampler: PlanSampler) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.run.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals_to_parent,
        )

    def _how_to_resume(self) -> str:
        # The folder's own configuration holds what --options said, too.
        config, path = self.folder / "config.yaml", self.folder / "checkpoint_latest.pth"
        command = ["python", "train.py", "--cfg-path", str(config)]
        if dist.world_size() > 1:
            launcher = f"-m torch.distributed.run --nproc_per_node={dist.world_size()}".split()
            command[1:1] = launcher
        return "resume with: " + shlex.join([*command, "--options", f"run.resume_ckpt_path={path}"])


def _what_learns(
    model: nn.Module, run: RunConfig, rates: Mapping[str, tuple[float, float]]
) -> Iterator[str]:
    """A line for each part that learns."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[name.partition(".")[0]] += parameter.numel()
    for part, count in counts.items():
        share, decay = rates.get(part, (1.0, run.weight_decay))
        yield (
            f"learns: {part}, {count:,} parameters, learning rate {share * run.init_lr:g}, "
            f"weight decay {decay:g}"
        )


def _rates(config: Config) -> tuple[int, dict[str, tuple[float, float]]]:
    """Blocks of the vision encoder, and each part's share of the rate and weight decay."""
    model, run = config.model, config.run
    if not isinstance(model, PartsConfig):
        return 0, {}
    rates = {}
    for part, how in model.training.items():
        if how.lr and not run.init_lr:
            raise ConfigError(
                f"model.train.{part} learns at {how.lr:g}, but rates are shares of run.init_lr, "
                "which is 0; set it"
            )
        share = 1.0 if not run.init_lr or how.lr is None else how.lr / run.init_lr
        rates[part] = share, run.weight_decay if how.weight_decay is None else how.weight_decay
    return model.parts[0].vit_config.depth, rates
