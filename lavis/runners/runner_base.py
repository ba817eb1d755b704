"""The training loop: the same for every strategy and any number of processes."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lavis.common import dist
from lavis.common.errors import ConfigError, LavisError
from lavis.common.optim import PartRate, parameter_groups
from lavis.common.schema import Config, RunConfig
from lavis.common.seeds import derived_seed
from lavis.common.types import Batch
from lavis.datasets.collate import settle_bad
from lavis.datasets.plan import Key
from lavis.models.compute.schedule import StepSchedule
from lavis.models.vision.tower import layers_above
from lavis.models.vlm import VLM
from lavis.models.weights.files import state_dict_in
from lavis.models.weights.trained import assign_model_state, trainable_state
from lavis.runners.agreement import fingerprint
from lavis.runners.checkpoint import Checkpoint, Progress
from lavis.runners.keeper import CheckpointFolder
from lavis.runners.launch import make_folder
from lavis.runners.prepare import RunPlan
from lavis.runners.signals import StopRequest
from lavis.runners.watch import RunLog, StepReport
from lavis.tasks.data import RunData, Splits, load_batches
from lavis.tasks.evaluate import evaluate
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask

logger = logging.getLogger(__name__)


class RunnerBase:
    """Trains a model.

    The gradient of an optimizer step is that of the mean cross-entropy over all its supervised
    tokens, however the step is cut into micro-batches and spread over processes.
    """

    def __init__(
        self,
        config: Config,
        task: ImageTextPretrainTask,
        model: VLM,
        dataset: Dataset[Any],
        job_id: str,
        plan: RunPlan | None = None,
    ) -> None:
        """Prepare a run. Every process calls this.

        Args:
            task: defines a step and what makes a model better.
            model: on its device, weights loaded; mapped, if the plan's strategy shards.
            dataset: training samples by ``(epoch, index)``; a :class:`RunData` where the run
                evaluates splits.
            job_id: name of the run's folder under ``run.output_dir``, the same in all processes.
            plan: what was found to fit before the model was built; by default it is made here.

        Raises:
            ConfigError: nothing is trainable, or as :meth:`RunPlan.of`.
            WeightsError: the checkpoint to resume from cannot be used.
        """
        self.config, self.run = config, config.run
        self.task, self.model, self.dataset = task, model, dataset
        plan = plan or RunPlan.of(config, dataset, next(model.parameters()).device)
        self.device = plan.strategy.device
        self.strategy, self.plan, self.schedule = plan.strategy, plan.batches, plan.schedule
        self.data, self.step = plan.data, plan.step  # optimizer steps done
        self._kept, self._arguments = plan.kept, plan.arguments
        self._rates = rates = plan.rates
        decay, by_layer = self.run.weight_decay, self.run.lr_layer_decay
        above = layers_above(name for name, _ in model.named_parameters())
        groups = parameter_groups(model.named_parameters(), decay, by_layer, above, rates)
        if not any(group["params"] for group in groups):
            raise ConfigError(
                f"nothing to train: every part of the model is frozen ({config.model.LEARNS_BY})"
            )
        for line in _what_learns(model, self.run, rates):
            logger.info("%s", line)
        before = plan.before
        if before is not None:
            assign_model_state(model, state_dict_in(before.path, before.model))
        self.strategy.setup(model, groups)
        del groups  # with what is whole of sharded parameters
        if self.strategy.shards:
            self.strategy.prove(model)
            reserved = self.strategy.reserved()
            schedule = StepSchedule.from_run(self.run, model, self.device, reserved)
            model.set_schedule(schedule)
        if before is not None:
            self._load_optimizer(before)
        self.folder = Path(self.run.output_dir) / job_id
        make_folder(self.folder, config.tree)
        best = before.best_by(task.metric) if before else None
        self.checkpoints = CheckpointFolder(self.folder, self.run.keep_last, task.metric, best)
        self.stop = StopRequest()
        self.interrupted = False  # whether a signal has stopped the run; the same everywhere

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
        log = RunLog(self.folder, total, self.step, self.config, self.model, self.device)
        first = self.step
        if first >= total:
            logger.warning(
                "nothing left to train: %d of %d steps are done; raise run.max_epoch", first, total
            )
        try:
            with self.stop.caught():
                for epoch in range(self.step // self.plan.steps_per_epoch, self.run.max_epoch):
                    self._train_epoch(epoch, log)
                    if self.step == (epoch + 1) * self.plan.steps_per_epoch:
                        self._end_epoch(epoch, log)
                    self._agree_to_stop(dist.add_up([self.stop.requested])[0])
                    if self.interrupted:
                        return self._save("latest")
        except BaseException as error:
            agreed = dist.world_size() == 1 or (isinstance(error, LavisError) and error.agreed)
            if self.step > first and agreed:
                self._save("latest")
                with contextlib.suppress(OSError):
                    log.flush()
                if dist.is_main():
                    logger.error("stopped by %s; %s", type(error).__name__, self._how_to_resume())
            if isinstance(error, OSError):
                raise LavisError(
                    f"{self.folder} cannot be written: {error}. {self.checkpoints.last_good()}"
                ) from error
            raise
        finally:
            log.close()
        if self.step == first:
            self._save("latest")
        if self.run.test_splits:
            splits, out = self._splits(self.run.test_splits), self.folder / "evaluation"
            logger.info("%s", evaluate(self.model.eval(), splits, self.run, out))
        return self.checkpoints.path("latest")

    def _train_epoch(self, epoch: int, log: RunLog) -> None:
        self.model.train()
        in_epoch = self.step - epoch * self.plan.steps_per_epoch
        plan = self.plan.micro_batches(epoch, dist.rank(), in_epoch)
        ahead = max(map(len, plan), default=1)  # a step is asked for as a whole
        batches = iter(self._loader([micro for step in plan for micro in step], ahead))
        for micro_batches in plan:
            self._train_step(epoch, [next(batches) for _ in micro_batches], log)
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

    def _train_step(self, epoch: int, micro_batches: list[Batch], log: RunLog) -> None:
        supervised = self._start_step(micro_batches)
        lr = self.schedule.lr(self.step)
        for group in self.strategy.optimizer.param_groups:
            own = self._rates[group["part"]].schedule if group["part"] else None
            group["lr"] = (own.lr(self.step) if own else lr) * group["lr_scale"]
        losses: list[Tensor] = []
        for i, batch in enumerate(micro_batches):
            # Dropout, where there is any, depends on the step alone: resuming changes nothing.
            number = i * dist.world_size() + dist.rank()  # no other process has it in this step
            torch.manual_seed(derived_seed(self.run.seed, self.step, number))
            with self.strategy.micro_batch(last=i == len(micro_batches) - 1):
                output = self.task.train_step(self.strategy.module, batch)
                self.strategy.backward(output.loss_sum / max(supervised, 1))
            losses.append(output.loss_sum.detach())
        numbers = torch.stack(losses).tolist()  # the only time in a step that the host waits here
        loss_sum, grad_norm = sum(numbers), 0.0
        real = [b for b in micro_batches if b.sample_ids]
        loss_sum, bad, tokens, fillers, images, samples, stop = dist.add_up(
            [
                loss_sum,
                not math.isfinite(loss_sum),
                sum(b.num_tokens for b in real),
                sum(b.num_tokens for b in micro_batches if not b.sample_ids),
                sum(b.spans.images for b in real),
                sum(len(b.sample_ids) for b in real),
                self.stop.requested,
            ]
        )
        self._agree_to_stop(stop)
        if bad:
            both = zip(micro_batches, numbers, strict=True)
            nonfinite = [s for b, loss in both if not math.isfinite(loss) for s in b.sample_ids]
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
        log.step(
            StepReport(
                step=self.step,
                epoch=epoch,
                loss_sum=0.0 if skipped else loss_sum,
                supervised=0 if skipped else supervised,
                tokens=tokens,
                fillers=fillers,
                images=images,
                samples=samples,
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
            self.interrupted = True

    def _refuse_step(self, what: str, sample_ids: Iterable[str]) -> bool:
        """Leave the weights as they are; then stop the run or go on, as ``run.on_nonfinite`` says.

        The same on every process: what is not finite has been summed over all.
        """
        self.strategy.zero_grad()
        names = ", ".join(s for share in dist.gather(list(sample_ids)) for s in share)
        message = f"the {what} of step {self.step} is not finite; samples: {names}"
        if self.run.on_nonfinite == "skip":
            if dist.is_main():
                logger.warning("%s. The step is skipped (run.on_nonfinite)", message)
            return True
        raise LavisError(
            f"{message}. {self.checkpoints.last_good()} Lower run.init_lr, or use bf16; "
            "run.on_nonfinite: skip leaves such steps out",
            agreed=True,
        )

    def _end_epoch(self, epoch: int, log: RunLog) -> None:
        log.flush()
        metrics: dict[str, float] = {}
        last = epoch + 1 == self.run.max_epoch
        if self.run.valid_splits and ((epoch + 1) % self.run.eval_freq == 0 or last):
            splits = self._splits(self.run.valid_splits)
            metrics = self.task.validate(self.strategy.module, splits, self.device)
        path = self._save(str(epoch), metrics)
        log.write({"epoch": epoch, "checkpoint": path.name, **metrics})

    def _splits(self, names: Iterable[str]) -> Splits:
        assert isinstance(self.dataset, RunData), "only RunData holds splits to evaluate"
        return {name: self.dataset.evaluated[name] for name in names}

    def _save(self, name: str, metrics: dict[str, float] | None = None) -> Path:
        """Write ``checkpoint_<name>.pth``; every process takes part, the main one writes."""
        run, plan = self.run, self.plan
        began_with = plan.samples_per_step // (run.batch_size_train * run.accum_grad_iters)
        checkpoint = Checkpoint(
            model={**self._kept, **trainable_state(self.model, self.strategy.full)},
            optimizer=self.strategy.optimizer_state(),
            config=self.config.tree,
            scaler=self.strategy.scaler.state_dict() if self.strategy.rescales else None,
            progress=Progress(self.step, plan.steps_per_epoch, plan.samples_per_step, began_with),
            metrics=metrics or {},
            data=self.data,
        )
        path = self.checkpoints.path(name)
        with dist.raise_together():
            try:
                if dist.is_main():
                    splits = self._splits(run.valid_splits) if metrics else {}
                    valid = fingerprint([d for parts in splits.values() for d in parts])
                    self.checkpoints.save(name, checkpoint, valid)
            except OSError as error:
                raise LavisError(
                    f"{path} cannot be written: {error}. {self.checkpoints.last_good()}"
                ) from error
        return path

    def _load_optimizer(self, before: Checkpoint) -> None:
        if before.optimizer:
            try:
                self.strategy.load_optimizer_state(before.optimizer)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise LavisError(
                    f"{before.path}: its optimizer belongs to other trainable parameters "
                    f"({error}); {self.config.model.LEARNS_BY} differs"
                ) from error
        else:
            logger.warning("%s holds no optimizer state: AdamW starts afresh", before.path)
        if self.strategy.rescales and before.scaler:
            self.strategy.scaler.load_state_dict(before.scaler)
        logger.info("resumed from %s at step %d", before.path, self.step)

    def _loader(self, keys: Iterable[Sequence[Key]], ahead: int = 1) -> DataLoader[Any]:
        cuda, workers = self.device.type == "cuda", self.run.num_workers
        return load_batches(self.dataset, keys, workers, ahead=ahead, pin_memory=cuda)

    def _how_to_resume(self) -> str:
        # The folder's own configuration holds what --options said, too.
        config, path = self.folder / "config.yaml", self.checkpoints.path("latest")
        arguments = self._arguments or ("--cfg-path", str(config))
        command = ["python", "train.py", *arguments]
        if dist.world_size() > 1:
            each = dist.world_size() // dist.machines()
            launcher = f"-m torch.distributed.run --nproc_per_node={each}".split()
            command[1:1] = launcher
        where = " (on each machine, with its --nnodes and --rdzv options)"
        return f"resume with{where * (dist.machines() > 1)}: " + shlex.join(
            [*command, "--options", f"run.resume_ckpt_path={path}"]
        )


def _what_learns(model: nn.Module, run: RunConfig, rates: Mapping[str, PartRate]) -> Iterator[str]:
    """A line for each part that learns."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[name.partition(".")[0]] += parameter.numel()
    for part, count in counts.items():
        share, decay, own = rates.get(part, PartRate(1.0, run.weight_decay))
        schedule = f", {own.run.lr_sched} of its own" if own else ""
        yield (
            f"learns: {part}, {count:,} parameters, learning rate "
            f"{own.run.init_lr if own else share * run.init_lr:g}, weight decay {decay:g}{schedule}"
        )
