"""Which checkpoints stay, and what happens when one is damaged or the disk is full."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.common.errors import LavisError, WeightsError
from lavis.common.types import Metric
from lavis.runners.checkpoint import Best, Checkpoint, Progress
from lavis.runners.keeper import CheckpointFolder, newest_whole, open_checkpoint
from tests.runners.test_runner import SHORT, after_steps, final, prepare, same, steps

LOSS = Metric("valid_loss", higher_is_better=False)
SCORE = Metric("score", higher_is_better=True)


def save(keeper: CheckpointFolder, name: str, step: int, **metrics: float) -> None:
    model = {"x": torch.full((1000,), float(step))}
    keeper.save(name, Checkpoint(model, {}, {}, progress=Progress(step, 10), metrics=metrics))


def step_of(path: Path) -> int:
    """The step a checkpoint says, and its weights."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.progress is not None
    assert checkpoint.progress.step == checkpoint.model["x"][7]
    return checkpoint.progress.step


def saved_step(path: Path) -> int:
    """The step that a run's checkpoint says."""
    progress = open_checkpoint(path).progress
    assert progress is not None
    return progress.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- which stay -----------------------------------------------------------------------------


def test_of_those_inside_epochs_the_newest_stay(tmp_path: Path) -> None:
    keeper = CheckpointFolder(tmp_path, 2, LOSS)
    for step in (3, 6, 9):
        save(keeper, f"step_{step}", step)
    save(keeper, "0", 10)
    save(keeper, "step_12", 12)
    assert names(tmp_path) == [
        "checkpoint_0.pth",
        "checkpoint_latest.pth",
        "checkpoint_step_12.pth",
        "checkpoint_step_9.pth",
    ]
    assert step_of(tmp_path / "checkpoint_step_9.pth") == 9


@pytest.mark.parametrize("links", [True, False])
def test_latest_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    keeper = CheckpointFolder(tmp_path, 1, LOSS)
    for name, step in (("step_3", 3), ("0", 10), ("latest", 11), ("step_12", 12)):
        save(keeper, name, step)
        assert step_of(tmp_path / "checkpoint_latest.pth") == step
    assert step_of(tmp_path / "checkpoint_0.pth") == 10
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        (LOSS, [3.0, 2.0, 2.5], 20),
        (SCORE, [3.0, 2.0, 3.5, 1.0], 30),
        (LOSS, [math.nan, 2.0, math.nan, 3.0], 20),
        (SCORE, [math.nan, -2.0, math.nan, -3.0], 20),
        (LOSS, [2.0, 2.0], 10),  # an equal one is not better
        (LOSS, [math.inf, 5.0], 20),
    ],
)
def test_best_follows_the_metric(
    tmp_path: Path, metric: Metric, values: list[float], best: int
) -> None:
    keeper = CheckpointFolder(tmp_path, 1, metric)
    save(keeper, "step_5", 5)  # nothing was measured
    assert not (tmp_path / "checkpoint_best.pth").exists()
    for epoch, value in enumerate(values):
        save(keeper, str(epoch), 10 * (epoch + 1), **{metric.name: value})
    path = tmp_path / "checkpoint_best.pth"
    assert step_of(path) == best
    assert open_checkpoint(path).metrics == {metric.name: values[best // 10 - 1]}


BEFORE = Best(2.0, "/before/checkpoint_best.pth", "valid_loss", "18 samples, ab")


@pytest.mark.parametrize(
    ("value", "measured_on", "best"),
    [
        (1.5, "18 samples, ab", "here"),
        (2.0, "18 samples, ab", "before"),
        (2.5, "18 samples, ab", "before"),
        (2.5, "18 samples, cd", "here"),  # not comparable
    ],
)
def test_the_best_of_the_run_before_is_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, measured_on: str, best: str
) -> None:
    keeper = CheckpointFolder(tmp_path, 1, LOSS, BEFORE)
    metrics = {"valid_loss": value}
    with caplog.at_level("INFO"):
        keeper.save(
            "0", Checkpoint({}, {}, {}, progress=Progress(10, 10), metrics=metrics), measured_on
        )
    path = tmp_path / "checkpoint_best.pth"
    wanted = Best(value, str(path), "valid_loss", measured_on) if best == "here" else BEFORE
    assert keeper.best == wanted
    assert open_checkpoint(tmp_path / "checkpoint_0.pth").best_by(LOSS) == wanted
    assert path.exists() == (best == "here")
    assert any(str(BEFORE.checkpoint) in m for m in caplog.messages) == (value > 1.5)


@pytest.mark.parametrize(
    ("content", "best"),
    [
        ({"best": vars(BEFORE), "metrics": {"valid_loss": 9.0}}, BEFORE),
        ({"metrics": {"valid_loss": 3.0}}, Best(3.0, "here.pth")),  # an older file
        ({"best": None, "metrics": {}}, None),
        ({"best": vars(BEFORE) | {"metric": "score"}}, None),
        ({"best": {"value": "x", "checkpoint": ""}}, None),
        ({"best": {"x": 1}}, None),
        ({"best": [3]}, None),
        ({"metrics": 3}, None),
        ({}, None),
    ],
)
def test_what_a_checkpoint_knows_of_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], best: Best | None
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "optimizer": {}, "epoch": 0} | content, "here.pth")
    assert open_checkpoint(Path("here.pth")).best_by(LOSS) == best


def test_in_a_run(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT, "run.save_every_steps=1", "run.keep_last=2")
    runner.train()
    kept = [path.name for path in runner.folder.glob("*.pth")]
    assert sorted(kept) == [
        "checkpoint_0.pth",
        "checkpoint_1.pth",
        "checkpoint_2.pth",
        "checkpoint_latest.pth",
        "checkpoint_step_7.pth",
        "checkpoint_step_8.pth",  # 9 is the epoch's
    ]
    inside = runner.folder / "checkpoint_step_7.pth"
    resumed = prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={inside}", job="resumed")
    assert resumed.step == 7
    assert same(final(resumed.train()), final(runner.folder / "checkpoint_latest.pth"))


# --- damage ---------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()  # and not what is linked to it
    if how == "cut short":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:  # in the middle of a tensor's numbers
        weight = final_bytes(content)
        content[weight] ^= 0x40
    path.write_bytes(content)


def final_bytes(content: bytes | bytearray) -> int:
    """Where a byte of the first tensor's numbers is."""
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (info,) = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
        numbers = archive.read(info)
    start = bytes(content).index(numbers)
    return start + len(numbers) // 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    runner = prepare(tmp_path_factory.mktemp("finished"), *SHORT, "run.max_epoch=2")
    runner.train()
    return runner.folder


@pytest.mark.parametrize("how", ["cut short", "empty", "one bit is wrong"])
def test_a_damaged_checkpoint_is_refused_and_a_whole_one_offered(
    tmp_path: Path, finished: Path, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("checkpoint_latest.pth", "checkpoint_1.pth"):
        damage(folder / name, how)
    latest, whole = folder / "checkpoint_latest.pth", folder / "checkpoint_0.pth"
    with pytest.raises(WeightsError) as caught:
        prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={latest}")
    first, _, last = str(caught.value).rpartition("\n")
    assert str(latest) in first
    assert last == (
        f"The newest whole checkpoint beside it is {whole}; resume from that with "
        f"--options run.resume_ckpt_path={whole}"
    )
    assert prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={whole}").step == 3
    damage(whole, how)
    with pytest.raises(WeightsError) as caught:
        prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={latest}")
    assert "whole checkpoint" not in str(caught.value)
    assert newest_whole(folder) is None


def test_one_wrong_bit_is_named(tmp_path: Path) -> None:
    keeper = CheckpointFolder(tmp_path, 1, LOSS)
    save(keeper, "0", 10)
    path = tmp_path / "checkpoint_0.pth"
    damage(path, "one bit is wrong")
    assert torch.load(path, weights_only=True)["model"]["x"].unique().numel() == 2  # unnoticed
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path} is damaged: the checksum of its part ")


def test_the_newest_is_the_one_farthest_in_training(tmp_path: Path) -> None:
    keeper = CheckpointFolder(tmp_path, 3, LOSS)
    for name, step in (("step_19", 19), ("1", 20), ("step_100", 100), ("latest", 101)):
        save(keeper, name, step)
    (tmp_path / "checkpoint_9.pth").write_bytes(b"rubbish")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint_latest.pth"
    (tmp_path / "checkpoint_latest.pth").unlink()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint_step_100.pth"
    assert keeper.last_good() == (
        f"The last whole checkpoint is {tmp_path / 'checkpoint_step_100.pth'}."
    )


def test_auto_goes_on_with_the_same_configuration_only(
    tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was killed and started again by the same command."""
    auto = (*SHORT, "run.max_epoch=2", "run.resume_ckpt_path=auto")
    parent = finished.parent
    assert prepare(tmp_path, *auto).step == 0
    assert caplog.messages[-1] == (
        f"run.resume_ckpt_path: auto finds no checkpoint of a run of this configuration in "
        f"{tmp_path} (0 runs of others): it starts from the beginning"
    )
    shutil.copytree(finished, tmp_path / "first")  # of another output_dir: another configuration
    assert prepare(tmp_path, *auto, job="second").step == 0
    assert "(1 runs of others)" in caplog.messages[-1]

    killed = parent / "killed"  # begun without `auto`, at its third step
    killed.mkdir()
    shutil.copy(finished / "config.yaml", killed)
    shutil.copy(finished / "checkpoint_0.pth", killed / "checkpoint_step_3.pth")
    (parent / "half").mkdir()
    (parent / "half" / "config.yaml").write_text("run: {task")
    try:
        runner = prepare(parent, *auto, job="third")
        assert runner.step == 6
        damage(finished / "checkpoint_1.pth", "cut short")
        damage(finished / "checkpoint_latest.pth", "cut short")
        assert prepare(parent, *auto, job="fourth").step == 3
        assert prepare(parent, *auto, "run.seed=1", job="fifth").step == 0
    finally:
        for name in ("third", "fourth", "fifth", "killed", "half"):
            shutil.rmtree(parent / name, ignore_errors=True)


# --- a full disk ----------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["torch.save", "os.fsync"])
def test_a_disk_that_fills_up_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    runner = prepare(tmp_path, *SHORT, "run.save_every_steps=1")
    after_steps(runner, 4, lambda: monkeypatch.setattr(call, full_disk))
    with pytest.raises(LavisError) as caught:
        runner.train()
    monkeypatch.undo()
    whole = runner.folder / "checkpoint_step_4.pth"
    latest = runner.folder / "checkpoint_latest.pth"
    message = str(caught.value)
    assert message.startswith(f"{runner.folder}/checkpoint_")
    assert " cannot be written: [Errno 28] No space left on device. " in message
    named = Path(message.rpartition("The last whole checkpoint is ")[2].rstrip("."))
    assert named in (whole, latest)
    assert not [m for m in caplog.messages if "resume with" in m]  # of a file that is not new
    assert not list(runner.folder.glob(".*.tmp"))
    assert saved_step(whole) == 4
    resumed = prepare(tmp_path, *SHORT, f"run.resume_ckpt_path={named}", job="resumed")
    assert resumed.step == 4
    resumed.train()


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are in order, so they are saved; the error is one that the user can mend."""
    runner = prepare(tmp_path, *SHORT)
    from lavis.runners.watch import RunLog

    after_steps(runner, 4, lambda: monkeypatch.setattr(RunLog, "write", full_disk))
    with pytest.raises(LavisError) as caught:
        runner.train()
    latest = runner.folder / "checkpoint_latest.pth"
    assert str(caught.value) == (
        f"{runner.folder} cannot be written: [Errno 28] No space left on device. "
        f"The last whole checkpoint is {latest}."
    )
    assert len(steps(runner.folder)) == 4
    assert saved_step(latest) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT)
    (runner.folder / "log.txt").symlink_to("/dev/full")
    with pytest.raises(LavisError) as caught:
        runner.train()
    assert str(caught.value) == (
        f"{runner.folder} cannot be written: [Errno 28] No space left on device. "
        "No checkpoint was written yet."
    )
