"""Several processes: one loss curve, one projector, whatever the strategy; kills and resumes."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.toybox.world.__main__ import write_split
from tests.processes import Running
from tests.runners.worker import options

STEPS = 16  # 61 samples, four a step
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
SHARDED = ["fsdp2", *(f"zero{stage}" for stage in range(4) if HAS_DEEPSPEED)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a third of the conversations without one."""
    out = tmp_path_factory.mktemp("data")
    for split, count in (("train", 61), ("val", 5), ("test", 19)):
        write_split(out, split, count, seed=11)
    records = json.loads((out / "train.json").read_text(encoding="utf-8"))
    for record in records[::3]:
        del record["image"]
        for key, value in list(record.items()):
            text = json.dumps(value, ensure_ascii=False)
            record[key] = json.loads(text.replace("<Img><ImageHere></Img> ", ""))
    (out / "train.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return out


def strategy(name: str) -> list[str]:
    if not name.startswith("zero"):
        return [f"run.strategy={name}"]
    section = f"{{zero_optimization: {{stage: {name[-1]}}}}}"
    return ["run.strategy=deepspeed", f"run.deepspeed_config={section}"]


def start(
    tmp: Path,
    runs: list[list[str]],
    processes: int,
    module: str = "tests.runners.worker",
    *,
    anew: bool = False,
) -> Running:
    """Of a setting that a run gives twice, the last counts."""
    plan = tmp / f"runs-{time.monotonic_ns()}.json"
    last = [list({item.partition("=")[0]: item for item in run}.values()) for run in runs]
    plan.write_text(json.dumps(last), encoding="utf-8")
    return Running(tmp, module, [plan], processes, anew=anew)


def finish(process: Running, status: int = 0) -> str:
    done = process.wait()
    assert done.returncode == status, process.said()[-6000:]
    return process.said()


def folder(output: Path) -> Path:
    (job,) = output.iterdir()
    return job


def curve(output: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder(output) / "log.txt").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines if "loss" in r]


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one["model"][k] - other["model"][k]).abs().max()) for k in one["model"])


def answers(output: Path) -> list[str]:
    return [row["answer"] for row in rows(folder(output) / "evaluation" / "test.jsonl")]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


EVALUATED = ["run.test_splits=[test]", "run.valid_splits=[val]"]
TWO = ["run.batch_size_train=1", "run.accum_grad_iters=2"]  # of four samples, on two processes


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal: one process, four samples at once."""
    out = tmp_path_factory.mktemp("alone")
    four = ["run.batch_size_train=4", "run.accum_grad_iters=1"]
    finish(start(out, [[*options(data), *four, *EVALUATED, f"run.output_dir={out / 'run'}"]], 1))
    return out / "run"


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two processes."""
    out = tmp_path_factory.mktemp("pair")
    finish(start(out, [[*options(data), *TWO, f"run.output_dir={out / 'run'}"]], 2))
    return out / "run"


def check_step(got: tuple[int, float, float], expected: tuple[int, float, float]) -> None:
    """Loss within the tolerance; the gradient's norm too, at first.

    Later it is that of projectors which Adam has let differ in the seventh digit.
    """
    assert got[0] == expected[0]
    assert got[1] == pytest.approx(expected[1], abs=TOLERANCE)
    assert got[2] == pytest.approx(expected[2], rel=TOLERANCE if got[0] < 5 else 10 * TOLERANCE)


def check_same(output: Path, alone: Path) -> None:
    """Loss and gradient norm of every step, projector, validation loss, answers."""
    for got, expected in zip(curve(output), curve(alone), strict=True):
        check_step(got, expected)
    one, other = (state(folder(p) / "checkpoint_latest.pth") for p in (output, alone))
    assert one["progress"]["step"] == STEPS
    assert difference(one, other) <= TOLERANCE
    assert one["metrics"] == pytest.approx(other["metrics"], abs=TOLERANCE)
    assert answers(output) == answers(alone)


def test_strategies_give_one_result(data: Path, alone: Path, tmp_path: Path) -> None:
    """DDP, FSDP2 and ZeRO 0 to 3 on two processes, images and text mixed, and packing.

    The last step has one sample for two processes. Then each goes on from another's checkpoint.
    """
    common = [*options(data), *TWO, "run.save_every_steps=10", "run.keep_last=9"]
    runs = {"ddp": strategy("ddp"), "packed": ["run.max_tokens_per_batch=400"]}
    runs |= {name: strategy(name) for name in SHARDED}
    first = [
        [*common, *run, *EVALUATED, f"run.output_dir={tmp_path / name}"]
        for name, run in runs.items()
    ]
    finish(start(tmp_path, first, 2))
    for name in runs:
        check_same(tmp_path / name, alone)
    names = list(runs)
    second = [
        [
            *common,
            *runs[name],
            f"run.output_dir={tmp_path / name}-resumed",
            f"run.resume_ckpt_path={folder(tmp_path / before) / 'checkpoint_step_10.pth'}",
        ]
        for before, name in zip(names, [*names[1:], names[0]], strict=True)
    ]
    finish(start(tmp_path, second, 2))
    whole = state(folder(alone) / "checkpoint_latest.pth")
    for name in names:
        end = state(folder(tmp_path / f"{name}-resumed") / "checkpoint_latest.pth")
        assert end["progress"]["step"] == STEPS
        assert difference(end, whole) <= TOLERANCE, name


def test_a_vision_side_that_learns(data: Path, tmp_path: Path) -> None:
    """One process has pictures and the other has none, and both wait for its gradient."""
    learn = ["model.freeze_qformer=false", "model.freeze_queries=false", "run.init_lr=1e-4"]
    common = [*options(data), *learn]
    four = ["run.batch_size_train=4", "run.accum_grad_iters=1"]
    finish(start(tmp_path, [[*common, *four, f"run.output_dir={tmp_path / 'one'}"]], 1))
    names = ["ddp", "fsdp2"]
    runs = [[*common, *TWO, *strategy(n), f"run.output_dir={tmp_path / n}"] for n in names]
    finish(start(tmp_path, runs, 2))
    expected = state(folder(tmp_path / "one") / "checkpoint_latest.pth")
    assert len(expected["model"]) > 50
    for name in names:
        end = state(folder(tmp_path / name) / "checkpoint_latest.pth")
        # Adam makes a whole step of a gradient of rounding errors.
        assert difference(end, expected) <= 1e-4
        assert [loss for _, loss, _ in curve(tmp_path / name)] == pytest.approx(
            [loss for _, loss, _ in curve(tmp_path / "one")], abs=TOLERANCE
        )


def test_killed_at_random_steps(data: Path, pair: Path, tmp_path: Path) -> None:
    """SIGKILL to all processes, four times; the end is bit for bit that of an unbroken run."""
    rng = random.Random(3)
    resume: list[str] = []
    done = 0
    for attempt in range(5):
        out = tmp_path / str(attempt)
        run = [*options(data), *TWO, *resume, "run.save_every_steps=1", f"run.output_dir={out}"]
        process = start(tmp_path, [run], 2)
        if attempt == 4:
            finish(process)
            break
        # The last step seen may be killed in its own save; the one before it is whole.
        _wait_for_step(process, out, done + rng.randint(2, 3))
        process.kill()
        resume = [f"run.resume_ckpt_path={folder(out) / 'checkpoint_latest.pth'}"]
        done = state(folder(out) / "checkpoint_latest.pth")["progress"]["step"]
    assert done >= 5
    one, other = (state(folder(p) / "checkpoint_latest.pth") for p in (out, pair))
    assert difference(one, other) == 0.0
    for i, entries in one["optimizer"]["state"].items():
        assert all(torch.equal(v, other["optimizer"]["state"][i][k]) for k, v in entries.items())


def test_killed_while_a_checkpoint_is_written(data: Path, alone: Path, tmp_path: Path) -> None:
    """Half of a file is on disk; the one before it is whole, and the run goes on from there."""
    out = tmp_path / "run"
    four = ["run.batch_size_train=4", "run.accum_grad_iters=1", "run.save_every_steps=1"]
    run = [*options(data), *four, f"run.output_dir={out}"]
    finish(start(tmp_path, [run], 1, "tests.runners.dying_worker"), -signal.SIGKILL)
    latest = folder(out) / "checkpoint_latest.pth"
    assert state(latest)["progress"]["step"] == 2
    assert len(list(folder(out).glob(".*.tmp"))) == 1  # what was being written has no name yet
    resumed = tmp_path / "resumed"
    run = [*options(data), *four, f"run.resume_ckpt_path={latest}", f"run.output_dir={resumed}"]
    finish(start(tmp_path, [run], 1))
    ends = [state(folder(p) / "checkpoint_latest.pth") for p in (resumed, alone)]
    assert difference(*ends) == 0.0


def test_two_processes_then_one_then_two(data: Path, alone: Path, tmp_path: Path) -> None:
    """The same samples in the same steps; the end within the tolerance."""
    resume: list[str] = []
    for stage, (processes, until) in enumerate([(2, 5), (1, 10), (2, STEPS)]):
        out = tmp_path / str(stage)
        run = [*options(data), *TWO, *resume, "run.save_every_steps=1", f"run.output_dir={out}"]
        process = start(tmp_path, [run], processes)
        if until < STEPS:
            _wait_for_step(process, out, until)
            process.kill()
        else:
            finish(process)
        for entry in curve(out):
            check_step(entry, curve(alone)[entry[0]])
        resume = [f"run.resume_ckpt_path={folder(out) / 'checkpoint_latest.pth'}"]
    one, other = (state(folder(p) / "checkpoint_latest.pth") for p in (out, alone))
    assert difference(one, other) <= TOLERANCE


def test_a_signal_to_one_process_stops_all(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = [*options(data), *TWO, "run.max_epoch=50", f"run.output_dir={out}"]
    process = start(tmp_path, [run], 2)
    _wait_for_step(process, out, 3)
    _, _, second = process.family()
    os.kill(second, signal.SIGTERM)  # not the one that writes
    log = finish(process, status=1)  # the launcher's, as its processes ended with 130
    saved = state(folder(out) / "checkpoint_latest.pth")
    assert 3 <= saved["progress"]["step"] < 50 * STEPS
    assert "resume with: python -m torch.distributed.run --nproc_per_node=2 train.py" in log


def test_a_signal_to_the_group_stops_all_and_saves(data: Path, tmp_path: Path) -> None:
    """The launcher passes it on to each process's group, loader workers and all."""
    out = tmp_path / "run"
    workers = ["run.num_workers=1", "run.max_epoch=50", f"run.output_dir={out}"]
    process = start(tmp_path, [[*options(data), *TWO, *workers]], 2, anew=True)
    _wait_for_step(process, out, 3)
    assert len(process.family()) == 5
    os.killpg(process.pid, signal.SIGTERM)
    log = finish(process, status=1)  # the launcher's
    saved = state(folder(out) / "checkpoint_latest.pth")
    assert 3 <= saved["progress"]["step"] < 50 * STEPS
    assert "resume with: python -m torch.distributed.run --nproc_per_node=2 train.py" in log
    assert "DataLoader worker" not in log


@pytest.mark.parametrize("rule", ["skip", "error"])
def test_a_bad_sample_in_one_process(data: Path, tmp_path: Path, rule: str) -> None:
    """All skip it, or all stop with its name; none waits for another."""
    records = json.loads((data / "train.json").read_text(encoding="utf-8"))[:8]
    bad = next(r for r in records if "image" in r)
    broken = data / "image" / "broken.png"
    broken.write_bytes(b"hello")
    bad["image"] = broken.name
    annotations = tmp_path / "train.json"
    annotations.write_text(json.dumps(records), encoding="utf-8")
    out = tmp_path / "run"
    storage = f"datasets.toybox.build_info.annotations.train.storage={annotations}"
    run = [*options(data), storage, *TWO, "run.warmup_steps=0", f"run.on_bad_sample={rule}"]
    log = finish(
        start(tmp_path, [[*run, f"run.output_dir={out}"]], 2), status=0 if rule == "skip" else 1
    )
    assert f"{bad['id']}" in log
    assert "is not an image that can be read" in log
    if rule == "skip":
        assert state(folder(out) / "checkpoint_latest.pth")["progress"]["step"] == 2


@pytest.mark.parametrize("rule", ["skip", "error"])
def test_a_bad_picture_to_ask_about_in_one_process(data: Path, tmp_path: Path, rule: str) -> None:
    """One message; the answers until then are kept."""
    records = json.loads((data / "test.json").read_text(encoding="utf-8"))
    (data / "image" / "broken.png").write_bytes(b"hello")
    # Prompts of like length are answered together: the longest comes last.
    bad = max(records, key=lambda r: len(r["instruction"]))
    bad["image"], bad["instruction"] = "broken.png", bad["instruction"] + " Tell me." * 9
    annotations = tmp_path / "test.json"
    annotations.write_text(json.dumps(records), encoding="utf-8")
    storage = f"datasets.toybox.build_info.annotations.test.storage={annotations}"
    run = [*options(data), storage, "run.evaluate=true", "run.test_splits=[test]"]
    run += ["run.batch_size_eval=1", "run.max_new_tokens=2", f"run.on_bad_sample={rule}"]
    log = finish(
        start(tmp_path, [[*run, f"run.output_dir={tmp_path / 'out'}"]], 2), int(rule == "error")
    )
    evaluation = folder(tmp_path / "out") / "evaluation"
    reason = f"{data / 'image' / 'broken.png'} is not an image that can be read"
    (message,) = [line for line in log.splitlines() if reason in line]
    assert f"(id {bad['id']})" in message
    if rule == "skip":
        assert "skipped test.json" in message
        answered = rows(evaluation / "test.jsonl")
        assert [r["sample_id"] for r in answered if r["skipped"]] == [
            f"test.json[{records.index(bad)}] (id {bad['id']})"
        ]
        assert len(answered) == 19
        return
    # Ten batches of two; the last is the bad record and, a second time, the shortest prompt.
    assert f"18 of 19 answers are in {evaluation / 'test.part.jsonl'}" in log
    kept = rows(evaluation / "test.part.jsonl")
    assert len({r["sample_id"] for r in kept}) == len(kept) == 18
    # The launcher may end the other process before it has ended itself.
    codes = re.findall(r"exitcode  : (\S+)", log)
    assert "gloo" not in log and "2" in codes and set(codes) <= {"2", "-15"}
    assert [p.name for p in evaluation.iterdir()] == ["test.part.jsonl"]


@pytest.mark.parametrize("rule", ["skip", "error"])
def test_a_bad_sample_to_validate_on_in_one_process(data: Path, tmp_path: Path, rule: str) -> None:
    """All count it once, or all stop after saving the epoch's end."""
    records = json.loads((data / "val.json").read_text(encoding="utf-8"))
    (data / "image" / "broken.png").write_bytes(b"hello")
    records[4]["image"] = "broken.png"  # alone in the third batch, of which the other has none
    files = {"val": records, "train": json.loads((data / "train.json").read_text())[:4]}
    run = [*options(data), *TWO, "run.warmup_steps=0", "run.batch_size_eval=2"]
    run += [
        "run.valid_splits=[val]",
        f"run.on_bad_sample={rule}",
        f"run.output_dir={tmp_path / 'out'}",
    ]
    for split, content in files.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        storage = f"annotations.{split}.storage={tmp_path / split}.json"
        run.append(f"datasets.toybox.build_info.{storage}")
    log = finish(start(tmp_path, [run], 2), int(rule == "error"))
    assert log.count("broken.png is not an image that can be read") == 1
    saved = state(folder(tmp_path / "out") / "checkpoint_latest.pth")
    assert saved["progress"]["step"] == 1
    assert saved["metrics"].get("valid_skipped") == (1.0 if rule == "skip" else None)
    assert "gloo" not in log


def _wait_for_step(process: Running, output: Path, step: int) -> None:
    """Wait until so many steps are done and saved."""
    deadline = time.monotonic() + 120
    while True:
        assert not process.ended(), process.said()[-6000:]
        assert time.monotonic() < deadline
        logs = list(output.glob("*/log.txt"))
        lines = logs[0].read_text().splitlines() if logs else []
        if any(json.loads(line).get("step", -1) + 1 >= step for line in lines if line[-1:] == "}"):
            return
        time.sleep(0.02)
