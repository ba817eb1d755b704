"""The training loop: invariance, resuming, interruption, bad samples, what is written."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError, LavisError, WeightsError
from lavis.common.registry import RUNNERS, TASKS
from lavis.common.workers import leave_signals_to_parent
from lavis.runners import runner_base
from lavis.runners.checkpoint import Checkpoint, Progress, copy_checkpoint
from lavis.runners.runner_base import RunnerBase
from lavis.tasks.data import load_batches
from tests.conftest import DEMO, REPO, TOY

State = dict[str, torch.Tensor]


def prepare(output: Path, *options: str, job: str = "job", cfg: Path | None = None) -> RunnerBase:
    """What ``train.py`` does before training."""
    config = load_config(
        cfg or DEMO / "train.yaml",
        [f"env.cache_root={REPO}", f"run.output_dir={output}", "run.log_freq=1", *options],
    )
    task = TASKS.get(config.run.task)(config)
    task.check_paths()
    dataset = task.build_datasets()
    torch.manual_seed(config.run.seed)
    model = task.build_model(torch.device("cpu"), dataset)
    return RUNNERS.get(config.run.runner)(config, task, model, dataset, job)


def final(checkpoint: Path) -> State:
    return torch.load(checkpoint, weights_only=True)["model"]


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``log.txt`` that are about steps."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def after_steps(runner: RunnerBase, count: int, action: Callable[[], Any]) -> None:
    """Do something while a micro-batch of the step after ``count`` is computed."""
    original = runner.task.train_step
    done = False

    def train_step(model: Any, batch: Any) -> Any:
        nonlocal done
        if runner.step == count and not done:
            done = True
            action()
        return original(model, batch)

    object.__setattr__(runner.task, "train_step", train_step)


# --- invariance -----------------------------------------------------------------------------


def test_however_a_step_is_cut(tmp_path: Path) -> None:
    """1x8, 2x4, 4x2 and 8x1: one loss curve, one projector."""
    curves, projectors = [], []
    for batch_size, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
        runner = prepare(
            tmp_path,
            f"run.batch_size_train={batch_size}",
            f"run.accum_grad_iters={accumulation}",
            "run.max_epoch=2",
            "run.warmup_ratio=0",
            job=f"{batch_size}x{accumulation}",
        )
        projectors.append(final(runner.train()))
        curves.append([line["loss"] for line in steps(runner.folder)])
    assert [len(curve) for curve in curves] == [6] * 4  # 18 samples: steps of 8, 8 and 2
    assert curves[0][0] - curves[0][-1] > 0.01  # something is learnt
    for curve, projector in zip(curves[1:], projectors[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-6)
        for name, tensor in projector.items():
            assert (tensor - projectors[0][name]).abs().max() < 1e-6


def test_workers_change_nothing(tmp_path: Path) -> None:
    one = prepare(tmp_path, "run.max_epoch=1", job="alone").train()
    other = prepare(tmp_path, "run.max_epoch=1", "run.num_workers=2", job="shared").train()
    assert same(final(one), final(other))


def test_workers_read_a_step_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    original = runner_base.load_batches

    def load(*args: Any, **options: Any) -> Any:
        asked.update(options)
        return original(*args, **options)

    monkeypatch.setattr(runner_base, "load_batches", load)
    prepare(tmp_path, "run.batch_size_train=1", "run.accum_grad_iters=4").train()
    assert asked["ahead"] == 4
    for ahead, wanted in ((1, 2), (16, 6)):  # of each of three workers
        loader = load_batches([], [], 3, ahead=ahead)  # type: ignore[arg-type]
        assert loader.prefetch_factor == wanted


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_signals_to_the_group_do_not_reach_the_workers(tmp_path: Path, name: str) -> None:
    """They go to all processes, but the main one decides when loading ends."""
    options = ("run.max_epoch=1", "run.batch_size_train=1", "run.accum_grad_iters=1")
    runner = prepare(tmp_path, *options, "run.num_workers=2")
    children: list[Any] = []

    def interrupt_workers() -> None:
        children.extend(multiprocessing.active_children())
        for _ in range(2):  # they inherit a handler that bears the first
            for child in children:
                assert child.pid is not None
                subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)
            time.sleep(0.2)

    after_steps(runner, 0, interrupt_workers)
    runner.train()
    assert len(children) == 2
    assert len(steps(runner.folder)) == 18


def test_a_worker_obeys_its_parent() -> None:
    """By SIGTERM Python ends at its exit what still runs, and then waits without a limit."""
    context = multiprocessing.get_context("fork")
    deaf = context.Event()

    def work() -> None:
        leave_signals_to_parent()
        deaf.set()
        time.sleep(60)

    worker = context.Process(target=work, daemon=True)
    worker.start()
    assert deaf.wait(30)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


# --- resuming -------------------------------------------------------------------------------

SHORT = ("run.max_epoch=3", "run.batch_size_train=4", "run.accum_grad_iters=2")  # 3 x 3 steps


def progress(step: int) -> dict[str, int]:
    """What a checkpoint of such a run says after so many steps."""
    return {"step": step, "steps_per_epoch": 3, "samples_per_step": 8, "world_size": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of nine steps."""
    torch.manual_seed(1)
    runner = prepare(tmp_path_factory.mktemp("whole"), *SHORT)
    runner.train()
    return runner.folder


def test_resumed_from_an_epoch(tmp_path: Path, uninterrupted: Path) -> None:
    torch.manual_seed(2)  # whatever state the generators are in
    resumed = prepare(
        tmp_path, *SHORT, f"run.resume_ckpt_path={uninterrupted / 'checkpoint_0.pth'}"
    )
    assert resumed.step == 3
    last = resumed.train()
    whole = torch.load(uninterrupted / "checkpoint_latest.pth", weights_only=True)
    again = torch.load(last, weights_only=True)
    assert same(again["model"], whole["model"])
    for index, state in whole["optimizer"]["state"].items():
        assert same(again["optimizer"]["state"][index], state)
    assert again["progress"] == whole["progress"] == progress(step=9)
    pairs = zip(steps(resumed.folder), steps(uninterrupted)[3:], strict=True)
    for one, other in pairs:
        assert {k: one[k] for k in ("step", "epoch", "loss", "lr", "grad_norm")} == {
            k: other[k] for k in ("step", "epoch", "loss", "lr", "grad_norm")
        }


def test_interrupted_inside_an_epoch_and_resumed(
    tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = prepare(tmp_path, *SHORT)
    after_steps(runner, 4, lambda: signal.raise_signal(signal.SIGINT))
    with caplog.at_level("WARNING"):
        stopped = runner.train()
    assert runner.interrupted
    assert stopped == runner.folder / "checkpoint_latest.pth"
    content = torch.load(stopped, weights_only=True)
    assert content["progress"] == progress(step=5)  # the step was finished
    assert content["epoch"] == 0  # the last complete one
    assert not (runner.folder / "checkpoint_1.pth").exists()
    (message,) = [m for m in caplog.messages if "resume with: " in m]
    assert message.startswith("SIGINT: stopping after step 5; resume with: python train.py ")
    # as the message says: the folder's own configuration, with all options
    words = shlex.split(message.partition("python train.py ")[2])
    assert words == [
        "--cfg-path",
        str(runner.folder / "config.yaml"),
        "--options",
        f"run.resume_ckpt_path={stopped}",
    ]
    resumed = prepare(tmp_path, *words[3:], cfg=Path(words[1]), job="resumed")
    assert resumed.step == 5
    assert resumed.plan == runner.plan
    assert same(final(resumed.train()), final(uninterrupted / "checkpoint_latest.pth"))
    assert {p.name for p in resumed.folder.glob("*.pth")} == {
        "checkpoint_1.pth",
        "checkpoint_2.pth",
        "checkpoint_latest.pth",
    }


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT)

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    after_steps(runner, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    saved = torch.load(runner.folder / "checkpoint_latest.pth", weights_only=True)
    assert saved["progress"]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before  # given back


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latest = uninterrupted / "checkpoint_latest.pth"
    runner = prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={latest}")
    assert same(final(runner.train()), final(latest))
    assert steps(runner.folder) == []
    assert "nothing left to train: 9 of 9 steps are done; raise run.max_epoch" in caplog.messages


def test_interrupted_in_the_last_step_of_an_epoch(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT)
    after_steps(runner, 2, lambda: signal.raise_signal(signal.SIGINT))
    runner.train()
    assert {path.name for path in runner.folder.glob("*.pth")} == {
        "checkpoint_0.pth",
        "checkpoint_latest.pth",
    }


def test_settings_of_the_configuration_go_before_those_of_the_checkpoint(
    tmp_path: Path, uninterrupted: Path
) -> None:
    runner = prepare(
        tmp_path,
        *SHORT,
        "run.weight_decay=0.375",
        "run.beta2=0.5",
        f"run.resume_ckpt_path={uninterrupted / 'checkpoint_1.pth'}",
    )
    groups = runner.strategy.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.375, 0.0]
    assert {group["betas"] for group in groups} == {(0.9, 0.5)}


def test_resume_from_the_original(tmp_path: Path) -> None:
    """Its checkpoint 9 holds the projector of ten epochs and no optimizer."""
    path = TOY / "checkpoint_9.pth"
    runner = prepare(
        tmp_path,
        "run.max_epoch=11",
        "run.init_lr=0",
        "run.min_lr=0",
        "run.batch_size_train=6",
        "run.accum_grad_iters=1",
        f"run.resume_ckpt_path={path}",
    )
    assert runner.step == 30
    assert same(final(runner.train()), final(path))  # a rate of zero moves nothing
    assert [line["epoch"] for line in steps(runner.folder)] == [10] * 3
    assert (runner.folder / "checkpoint_10.pth").is_file()


def test_resume_from_the_originals_optimizer(tmp_path: Path, uninterrupted: Path) -> None:
    """Its parameter groups know nothing of ours."""
    content = torch.load(uninterrupted / "checkpoint_1.pth", weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        del group["lr_scale"]
    for key in ("progress", "versions"):
        del content[key]
    path = tmp_path / "checkpoint_1.pth"
    torch.save(content, path)
    runner = prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={path}")
    assert runner.step == 6
    assert same(final(runner.train()), final(uninterrupted / "checkpoint_latest.pth"))


def test_another_batch_plan(tmp_path: Path, uninterrupted: Path) -> None:
    """From a whole epoch it is allowed; inside one the file is refused."""
    epoch = f"run.resume_ckpt_path={uninterrupted / 'checkpoint_1.pth'}"
    assert prepare(tmp_path, *SHORT, "run.batch_size_train=1", epoch).step == 2 * 9
    content = torch.load(uninterrupted / "checkpoint_1.pth", weights_only=True)
    content["progress"]["step"] = 5
    path = tmp_path / "inside.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError) as caught:
        prepare(tmp_path, *SHORT, "run.batch_size_train=1", f"run.resume_ckpt_path={path}")
    assert str(caught.value) == (
        f"{path} stopped inside an epoch of 3 steps, but this configuration has 9 steps per epoch: "
        "data, batch_size_train or accum_grad_iters differ. Resume from the checkpoint of a "
        "complete epoch"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, " cannot be resumed: its `model`, `optimizer` and `epoch` are missing or "),
        ({"epoch": "9"}, " cannot be resumed: its `model`, `optimizer` and `epoch` are missing "),
        ({"progress": {"step": 3}}, ": its `progress` is damaged: {'step': 3}"),
        ({"progress": {"step": 3, "steps_per_epoch": 0}}, ": its `progress` is damaged: "),
        (
            {"optimizer": {"state": {}, "param_groups": []}},
            ": its optimizer belongs to other trainable parameters (",
        ),
        ({"optimizer": {"x": 1}}, ": its optimizer belongs to other trainable parameters ("),
        ({"model": {}}, " lacks llm_proj.weight, which is trained with this configuration; "),
    ],
)
def test_checkpoint_that_cannot_be_resumed(
    tmp_path: Path, uninterrupted: Path, change: dict[str, Any], message: str
) -> None:
    content = torch.load(uninterrupted / "checkpoint_1.pth", weights_only=True)
    path = tmp_path / "c.pth"
    torch.save(content | change, path)
    with pytest.raises(LavisError) as caught:
        prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={path}")
    assert str(caught.value).startswith(f"{path}{message}")


# --- mistakes that are found before any weight is read --------------------------------------


def _unreadable(*options: str) -> str:
    """The message, with weight files that cannot be read."""
    config = load_config(DEMO / "train.yaml", [f"env.cache_root={REPO}", *options])
    with pytest.raises(LavisError) as caught:
        TASKS.get(config.run.task)(config).check_paths()
    return str(caught.value)


def test_found_early(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert _unreadable(f"run.resume_ckpt_path={tmp_path / 'none.pth'}") == (
        f"run.resume_ckpt_path: no checkpoint {tmp_path / 'none.pth'}"
    )
    assert _unreadable(f"run.output_dir={file / 'deep'}") == (
        f"run.output_dir: {file / 'deep'} cannot be a folder, since {file} is a file"
    )
    assert _unreadable("model.image_size=70") == (
        f"{DEMO / 'train.yaml'}: preprocess.vis_processor.train.image_size is 56, but "
        "model.image_size is 70; they must be equal"
    )
    assert _unreadable("model.vit_weights=none.pth").startswith("model.vit_weights: no file ")
    assert _unreadable("datasets.demo.build_info.images.storage=none").startswith(
        "datasets.demo.build_info.images.storage: no folder "
    )
    assert not list(tmp_path.glob("*/"))  # nothing is made by checking


def test_no_data_set() -> None:
    config = load_config(DEMO / "train.yaml", [f"env.cache_root={REPO}"])
    object.__setattr__(config, "datasets", {})
    with pytest.raises(ConfigError, match=r"^datasets is empty: name at least one data set$"):
        TASKS.get(config.run.task)(config).check_paths()


def test_everything_frozen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path, "model.freeze_proj=true")
    assert str(caught.value) == ("nothing to train: every part of the model is frozen (freeze_*)")
    assert not (tmp_path / "job").exists()


# --- bad samples ----------------------------------------------------------------------------


@pytest.fixture()
def data(tmp_path: Path) -> Path:
    """A copy of the demo's data, four records long, in a Chinese folder."""
    folder = tmp_path / "数据 集"
    shutil.copytree(DEMO / "image", folder / "image")
    records = json.loads((DEMO / "annotations.json").read_text(encoding="utf-8"))
    picked = [r for r in records if r["id"].endswith("-en")][:4]
    (folder / "ann.json").write_text(json.dumps(picked, ensure_ascii=False), encoding="utf-8")
    return folder


def using(data: Path, *options: str) -> tuple[str, ...]:
    info = "datasets.demo.build_info"
    return (
        f"{info}.annotations.train.storage={data / 'ann.json'}",
        f"{info}.images.storage={data / 'image'}",
        "run.max_epoch=2",
        "run.batch_size_train=1",
        "run.accum_grad_iters=2",
        *options,
    )


def broken(data: Path) -> str:
    """Damage the image of the second sample of epoch 0; return its path."""
    from lavis.datasets.plan import BatchPlan

    index = BatchPlan((4,), samples_per_step=2, batch_size=1, seed=42).order(0)[
        3
    ]  # in the second step
    name = json.loads((data / "ann.json").read_text(encoding="utf-8"))[index]["image"]
    (data / "image" / name).write_bytes(b"hello")
    return str(data / "image" / name)


def test_bad_sample_at_check_time(tmp_path: Path, data: Path) -> None:
    records = json.loads((data / "ann.json").read_text(encoding="utf-8"))
    records[2]["output"] = ""
    (data / "ann.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, *using(data))
    assert str(caught.value) == (
        "datasets.demo, split 'train': 1 of 4 records cannot be used "
        "(run.on_bad_sample: skip leaves them out):\n"
        f"  ann.json[2] (id {records[2]['id']}): the answer of turn 1 is empty"
    )
    runner = prepare(tmp_path, *using(data, "run.on_bad_sample=skip"))
    assert len(runner.dataset) == 3  # type: ignore[arg-type]
    runner.train()


def test_bad_sample_at_run_time_stops_the_run(tmp_path: Path, data: Path) -> None:
    runner = prepare(tmp_path, *using(data))
    image = broken(data)
    with pytest.raises(DataError) as caught:
        runner.train()
    assert f"{image} is not an image that can be read (run.on_bad_sample: skip leaves it out)" in (
        str(caught.value)
    )
    saved = torch.load(runner.folder / "checkpoint_latest.pth", weights_only=True)
    assert saved["progress"] == {
        "step": 1,
        "steps_per_epoch": 2,
        "samples_per_step": 2,
        "world_size": 1,
    }


def test_bad_sample_at_run_time_is_skipped(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = prepare(tmp_path, *using(data, "run.on_bad_sample=skip"))
    image = broken(data)
    runner.train()
    skipped = [m for m in caplog.messages if m.startswith("skipped ann.json[")]
    assert len(skipped) == 2  # once an epoch
    assert all(m.endswith(f"{image} is not an image that can be read") for m in skipped)
    assert len(steps(runner.folder)) == 4


def test_a_step_of_bad_samples_only(tmp_path: Path, data: Path) -> None:
    runner = prepare(
        tmp_path,
        *using(data, "run.on_bad_sample=skip", "run.accum_grad_iters=1", "run.max_epoch=1"),
    )
    broken(data)
    before = runner.model.connector.weight.clone()
    checkpoint = runner.train()
    lines = steps(runner.folder)
    assert [line["supervised_tokens"] > 0 for line in lines] == [True, True, True, False]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert torch.isfinite(final(checkpoint)["llm_proj.weight"]).all()
    assert not torch.equal(before, final(checkpoint)["llm_proj.weight"])


# --- numbers that are not finite ------------------------------------------------------------


def test_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT)

    def poison() -> None:
        runner.model.connector.bias.data[3] = math.nan

    after_steps(runner, 2, poison)
    with pytest.raises(LavisError) as caught:
        runner.train()
    message = str(caught.value)
    assert message.startswith("the loss of step 2 is not finite; samples: annotations.json[")
    assert message.endswith(
        ". No checkpoint was written yet. Lower run.init_lr, or use bf16; run.on_nonfinite: skip "
        "leaves such steps out"
    )


def test_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT)
    weight = runner.model.connector.weight
    kept: list[torch.Tensor] = []

    def poison() -> None:
        kept.append(weight.detach().clone())
        weight.register_hook(lambda grad: grad * math.inf)

    after_steps(runner, 2, poison)
    with pytest.raises(LavisError, match=r"^the gradient of step 2 is not finite; samples: "):
        runner.train()
    saved = torch.load(runner.folder / "checkpoint_latest.pth", weights_only=True)
    assert saved["progress"]["step"] == 2
    assert torch.equal(saved["model"]["llm_proj.weight"], kept[0])


# --- what is written ------------------------------------------------------------------------


def test_output_folder(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert names - events == {
        "config.yaml",
        "log.txt",
        "loss.png",
        "checkpoint_0.pth",
        "checkpoint_1.pth",
        "checkpoint_2.pth",
        "checkpoint_latest.pth",
    }
    assert len(events) == 1 or "tensorboard" not in sys.modules
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (uninterrupted / "log.txt").read_text().splitlines()]
    assert [line["checkpoint"] for line in lines if "checkpoint" in line] == [
        "checkpoint_0.pth",
        "checkpoint_1.pth",
        "checkpoint_2.pth",
    ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(9))
    assert {"time", "step", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "eta_s"} <= set(
        lines[0]
    )


def test_config_in_the_output_folder_is_the_runs(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT, "run.seed=13")
    assert load_config(runner.folder / "config.yaml") == runner.config


def test_checkpoint_holds_what_is_trained_in_the_originals_entries(uninterrupted: Path) -> None:
    content = torch.load(uninterrupted / "checkpoint_2.pth", weights_only=True)
    assert {"model", "optimizer", "config", "scaler", "epoch"} <= set(content)
    assert set(content) == {
        "model", "optimizer", "config", "scaler", "epoch", "progress", "metrics",
        "best", "data", "versions",
    }  # fmt: skip
    assert list(content["model"]) == ["llm_proj.weight", "llm_proj.bias"]
    assert content["model"]["llm_proj.weight"].shape == (64, 48)
    assert content["epoch"] == 2
    assert content["scaler"] is None
    assert content["config"]["run"]["max_epoch"] == 3
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or (
        torch.__version__.startswith(content["versions"]["torch"])
    )
    assert same(content["model"], final(uninterrupted / "checkpoint_latest.pth"))


def checkpoint_of(value: float) -> Checkpoint:
    return Checkpoint({"x": torch.tensor([value])}, {}, {}, progress=Progress(5, 2))


def test_a_failing_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_0.pth"
    checkpoint_of(3.0).write(path)
    old = path.read_bytes()
    assert torch.load(path, weights_only=True)["epoch"] == 1  # of 2 steps, two are complete

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint_of(4.0).write(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]  # no rubbish beside it


def test_a_copy_does_not_follow_its_source(tmp_path: Path) -> None:
    source, target = tmp_path / "a.pth", tmp_path / "b.pth"
    target.write_bytes(b"older")
    checkpoint_of(3.0).write(source)
    copy_checkpoint(source, target)
    assert target.read_bytes() == source.read_bytes()
    checkpoint_of(4.0).write(source)
    assert torch.load(target, weights_only=True)["model"]["x"] == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]


def test_a_job_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "job").touch()
    with pytest.raises(ConfigError, match=f"^run.output_dir: {tmp_path / 'job'} cannot be made: "):
        prepare(tmp_path)


# --- precision ------------------------------------------------------------------------------


def test_an_overflow_that_the_scaler_skips_is_null_in_the_log(tmp_path: Path) -> None:
    """JSON has no infinity."""
    runner = prepare(tmp_path, *SHORT, "run.max_epoch=1", "run.amp=true", "run.autocast_dtype=fp16")
    weight = runner.model.connector.weight
    before = weight.detach().clone()
    after_steps(runner, 0, lambda: weight.register_hook(lambda grad: grad * math.inf))
    runner.train()
    text = (runner.folder / "log.txt").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert [line["grad_norm"] for line in steps(runner.folder)] == [None] * 3
    assert torch.equal(weight, before)  # every step was skipped


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16"])
def test_half_precision_runs_and_keeps_the_projector_in_fp32(tmp_path: Path, dtype: str) -> None:
    runner = prepare(
        tmp_path, *SHORT, "run.max_epoch=1", "run.amp=true", f"run.autocast_dtype={dtype}"
    )
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    assert runner.strategy.dtype == half
    checkpoint = runner.train()
    content = torch.load(checkpoint, weights_only=True)
    assert content["model"]["llm_proj.weight"].dtype == torch.float32
    assert (content["scaler"] is not None) == (half == torch.float16)
    losses = [line["loss"] for line in steps(runner.folder)]
    plain = prepare(tmp_path, *SHORT, "run.max_epoch=1", job="plain")
    plain.train()
    wanted = [line["loss"] for line in steps(plain.folder)]
    assert losses == pytest.approx(wanted, abs=0.02)
    assert losses != wanted


# --- the command ----------------------------------------------------------------------------


def test_last_line_is_the_checkpoints_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cfg-path", str(DEMO / "train.yaml"), "--options", "run.max_epoch=1"]
    arguments += [f"env.cache_root={REPO}", f"run.output_dir={tmp_path / '输 出'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    path = Path(line)
    assert path.parent.parent == tmp_path / "输 出"
    assert path.name == "checkpoint_latest.pth"
    assert set(final(path)) == {"llm_proj.weight", "llm_proj.bias"}


def test_ctrl_c(tmp_path: Path) -> None:
    """A real process: a usable checkpoint, one line with the resume command, status 130."""
    command = [sys.executable, "train.py", "--cfg-path", str(DEMO / "train.yaml"), "--options"]
    command += [f"run.output_dir={tmp_path}", "run.max_epoch=9000", "run.log_freq=1"]
    process = subprocess.Popen(
        [*command, "run.num_workers=1"],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not any(log.stat().st_size for log in tmp_path.glob("*/log.txt")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the workers, too
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in err
    path = Path(out.splitlines()[-1])
    content = torch.load(path, weights_only=True)
    step = content["progress"]["step"]
    assert step >= 1
    lines = [line for line in err.splitlines() if "resume with: " in line]
    assert len(lines) == 1
    assert f"SIGINT: stopping after step {step}; resume with: python train.py " in lines[0]
    words = shlex.split(lines[0].partition("python train.py ")[2])
    config = load_config(words[1], words[3:])
    assert config.run.resume_ckpt_path == str(path)
    assert config.run.max_epoch == 9000
    assert (path.parent / "loss.png").is_file()
