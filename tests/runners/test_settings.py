"""What ``run`` can ask of the training loop besides the plain case."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lavis.common import dist
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, LavisError
from lavis.common.registry import TASKS
from lavis.common.schema import RunConfig
from lavis.runners.checkpoint import Checkpoint, Progress
from lavis.runners.launch import new_job_id, strategy_name
from lavis.runners.prepare import samples_per_step
from lavis.runners.runner_base import RunnerBase
from tests.conftest import DEMO, REPO, TOY
from tests.runners.test_runner import SHORT, after_steps, final, prepare, progress, same, steps

ANNOTATIONS = "datasets.demo.build_info.annotations"
VALID = (f"{ANNOTATIONS}.valid.storage={DEMO / 'annotations.json'}", "run.valid_splits=[valid]")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def trained_on(runner: RunnerBase) -> list[tuple[int, tuple[str, ...]]]:
    """Fills up with the step and the samples of every micro-batch."""
    original = runner.task.train_step
    seen: list[tuple[int, tuple[str, ...]]] = []

    def train_step(model: Any, batch: Any) -> Any:
        seen.append((runner.step, batch.sample_ids))
        return original(model, batch)

    object.__setattr__(runner.task, "train_step", train_step)
    return seen


def validate(runner: RunnerBase) -> dict[str, float]:
    """What a validation gives."""
    return runner.task.validate(
        runner.model, runner._splits(runner.run.valid_splits), torch.device("cpu")
    )


# --- numbers that are not finite ------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    runner = prepare(tmp_path, *SHORT, "run.on_nonfinite=skip")
    weight, bias = runner.model.connector.weight, runner.model.connector.bias
    seen = trained_on(runner)
    before: dict[str, Any] = {}

    def poison() -> None:
        before.update(weight=weight.detach().clone(), bias=bias.detach().clone())
        before["optimizer"] = runner.strategy.optimizer_state()["state"]
        if what == "loss":
            bias.data[3] = math.nan
        else:
            handle = weight.register_hook(lambda grad: handle.remove() or grad * math.inf)

    def look() -> None:
        if what == "loss":
            bias.data[3] = before["bias"][3]
        assert torch.equal(weight, before["weight"])
        assert torch.equal(bias, before["bias"])
        after = runner.strategy.optimizer_state()["state"]
        for index, state in before["optimizer"].items():
            assert same(after[index], state)

    after_steps(runner, 2, poison)
    after_steps(runner, 3, look)
    checkpoint = runner.train()
    assert [line["step"] for line in steps(runner.folder)] == list(range(9))
    supervised = [line["supervised_tokens"] for line in steps(runner.folder)]
    assert [count == 0 for count in supervised] == [s == 2 for s in range(9)]
    assert [line["loss"] is None for line in steps(runner.folder)] == [s == 2 for s in range(9)]
    names = [name for step, ids in seen if step == 2 for name in ids]
    message = (
        f"the {what} of step 2 is not finite; samples: {', '.join(names)}. The step is skipped"
    )
    assert [m for m in caplog.messages if "not finite" in m] == [f"{message} (run.on_nonfinite)"]
    assert not torch.equal(final(checkpoint)["llm_proj.weight"], before["weight"])  # went on
    assert torch.isfinite(final(checkpoint)["llm_proj.weight"]).all()


def test_the_error_names_step_samples_and_the_last_whole_checkpoint(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT, "run.save_every_steps=1")
    seen = trained_on(runner)
    weight = runner.model.connector.weight
    after_steps(runner, 5, lambda: weight.register_hook(lambda grad: grad * math.nan))
    with pytest.raises(LavisError) as caught:
        runner.train()
    names = ", ".join(name for step, ids in seen if step == 5 for name in ids)
    latest = runner.folder / "checkpoint_latest.pth"
    assert str(caught.value) == (
        f"the gradient of step 5 is not finite; samples: {names}. The last whole checkpoint is "
        f"{runner.folder / 'checkpoint_step_5.pth'}. Lower run.init_lr, or use bf16; "
        "run.on_nonfinite: skip leaves such steps out"
    )
    assert torch.load(latest, weights_only=True)["progress"] == progress(step=5)


# --- validation, tests ----------------------------------------------------------------------


def test_validation_every_few_epochs_and_after_the_last(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT, *VALID, "run.eval_freq=2", "run.batch_size_eval=4")
    runner.train()
    of_epochs = [line for line in lines(runner.folder) if "checkpoint" in line]
    assert [line["checkpoint"] for line in of_epochs] == [f"checkpoint_{i}.pth" for i in range(3)]
    assert ["valid_loss" in line for line in of_epochs] == [False, True, True]
    losses = {i: of_epochs[i]["valid_loss"] for i in (1, 2)}
    best = min(losses, key=losses.__getitem__)
    content = torch.load(runner.folder / "checkpoint_best.pth", weights_only=True)
    assert content["metrics"] == {"valid_loss": losses[best]}
    assert content["epoch"] == best
    assert 1 < losses[best] < 10


def test_validation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    plain = prepare(tmp_path, *SHORT, job="plain").train()
    watched = prepare(tmp_path, *SHORT, *VALID, job="watched").train()
    assert same(final(plain), final(watched))


def test_validation_loss_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    runner = prepare(tmp_path, *SHORT, *VALID)
    losses = []
    for size in (1, 4, 18):
        object.__setattr__(runner.config.run, "batch_size_eval", size)
        runner.model.train()
        losses.append(validate(runner)["valid_loss"])
        assert runner.model.training
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_test_splits_are_scored_after_training(tmp_path: Path) -> None:
    storage = f"{ANNOTATIONS}.test.storage={DEMO / 'annotations.json'}"
    options = (storage, "run.test_splits=[test]", "run.max_new_tokens=2", "run.batch_size_eval=9")
    runner = prepare(tmp_path, *SHORT, "run.max_epoch=1", *options)
    checkpoint = runner.train()
    assert checkpoint == runner.folder / "checkpoint_latest.pth"
    scores = json.loads((runner.folder / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"test"}
    assert scores["test"]["count"] == 18
    answers = (runner.folder / "evaluation" / "test.jsonl").read_text(encoding="utf-8")
    assert len(answers.splitlines()) == 18


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    arguments = ["--cfg-path", str(DEMO / "train.yaml"), "--options", f"env.cache_root={REPO}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *options])
    return train.main()


def test_evaluation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No training data are needed and nothing is trained."""
    status = command(
        monkeypatch, "run.evaluate=true", "run.test_splits=[test]", "run.max_new_tokens=2",
        f"{ANNOTATIONS}.test.storage={DEMO / 'annotations.json'}", "run.batch_size_eval=9",
        f"{ANNOTATIONS}.train.storage=none.json", f"run.output_dir={tmp_path}",
        "model.load_finetuned=true", f"model.finetuned={TOY / 'checkpoint_9.pth'}",
    )  # fmt: skip
    assert status == 0
    *_, last = capsys.readouterr().out.splitlines()
    folder = Path(last.partition("answers, pictures and scores: ")[2])
    assert folder.parent.parent == tmp_path
    assert {p.name for p in folder.iterdir()} == {"scores.json", "test.jsonl", "test.png"}
    assert [p.name for p in folder.parent.iterdir()] == ["evaluation"]  # no checkpoint, no log


def test_evaluation_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="evaluate: true needs test_splits"):
        command(monkeypatch, "run.evaluate=true", f"run.output_dir={tmp_path}")


def test_splits_that_are_not_described_are_found_early(tmp_path: Path) -> None:
    for key in ("valid_splits", "test_splits"):
        with pytest.raises(ConfigError, match=r"annotations has no split 'tset'"):
            prepare(tmp_path, f"run.{key}=[tset]")


# --- which strategy -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "settings", "wanted"),
    [
        (1, {}, "single"),
        (2, {}, "ddp"),
        (2, {"strategy": "single"}, "2 processes were started"),
        (2, {"fsdp": True}, "fsdp2"),
        (2, {"fsdp": True, "strategy": "fsdp2"}, "fsdp2"),
        (2, {"fsdp": True, "strategy": "ddp"}, "run.strategy is ddp, but run.fsdp is true; leave"),
        (2, {"runner": "deepspeed_runner"}, "deepspeed"),
        (2, {"runner": "deepspeed_runner", "deepspeed_config": {}}, "deepspeed"),
        (1, {"runner": "deepspeed_runner", "strategy": "single"}, "is deepspeed_runner; leave one"),
        (2, {"runner": "deepspeed_runner", "fsdp": True}, "is true, but run.runner is deepspeed_"),
        (2, {"deepspeed_config": {}}, "run.deepspeed_config is given, but DeepSpeed is not chosen"),
    ],
)
def test_every_way_to_choose_a_strategy(
    monkeypatch: pytest.MonkeyPatch, world: int, settings: dict[str, Any], wanted: str
) -> None:
    monkeypatch.setattr("lavis.runners.launch.check_packages", lambda *_: None)
    run = RunConfig(**settings)
    if " " not in wanted:
        assert strategy_name(run, world) == wanted
        return
    with pytest.raises(ConfigError) as caught:
        strategy_name(run, world)
    assert wanted in str(caught.value)


# --- batches --------------------------------------------------------------------------------


def test_packed_to_a_number_of_tokens(tmp_path: Path) -> None:
    """The loss of a step is of its samples, however they are packed."""
    curves, projectors, batches = [], [], []
    # 8 samples a step either way: warm-up of none, since Adam's first steps amplify rounding
    for name, options in (("plain", ()), ("packed", ("run.max_tokens_per_batch=200",))):
        runner = prepare(tmp_path, *SHORT, "run.warmup_ratio=0", *options, job=name)
        seen = trained_on(runner)
        projectors.append(final(runner.train()))
        curves.append([line["loss"] for line in steps(runner.folder)])
        batches.append([sorted(i for s, ids in seen if s == n for i in ids) for n in range(9)])
    assert batches[0] == batches[1]
    assert len({len(ids) for _, ids in seen}) > 1  # not of four each
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    for name, tensor in projectors[0].items():
        assert (tensor - projectors[1][name]).abs().max() < 1e-5


def test_a_budget_that_a_sample_exceeds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run.max_tokens_per_batch is 20, but a sample has "):
        prepare(tmp_path, *SHORT, "run.max_tokens_per_batch=20")


@pytest.fixture()
def other(tmp_path: Path) -> tuple[str, ...]:
    """Options that add a second data set, of four records."""
    shutil.copytree(DEMO / "image", tmp_path / "image")
    records = json.loads((DEMO / "annotations.json").read_text(encoding="utf-8"))[:4]
    for name in ("four", "two"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(records if name == "four" else records[:2]), encoding="utf-8"
        )
    return (
        "datasets.other.builder=instruction",
        f"datasets.other.build_info.annotations.train.storage={tmp_path / 'four.json'}",
        f"datasets.other.build_info.annotations.more.storage={tmp_path / 'two.json'}",
        f"datasets.other.build_info.images.storage={tmp_path / 'image'}",
        f"{ANNOTATIONS}.more.storage={tmp_path / 'two.json'}",
    )


def test_shares_of_data_sets(tmp_path: Path, other: tuple[str, ...]) -> None:
    runner = prepare(tmp_path, *SHORT, *other, "run.train_dataset_ratios={other: 1, demo: 1}")
    seen = trained_on(runner)
    runner.train()
    ids = Counter(name for _, names in seen for name in names)
    small = {name: n for name, n in ids.items() if name.startswith("four.json[")}
    large = {name: n for name, n in ids.items() if name.startswith("annotations.json[")}
    assert ids.total() == 3 * 22
    assert sum(small.values()) == sum(large.values()) == 33
    assert sorted(small.values()) == [8, 8, 8, 9]
    assert sorted(large.values()) == [1] * 3 + [2] * 15


def test_shares_count_all_splits_of_a_data_set(tmp_path: Path, other: tuple[str, ...]) -> None:
    runner = prepare(
        tmp_path, *SHORT, *other, "run.train_splits=[train,more]", "run.max_epoch=1",
        "run.train_dataset_ratios={demo: 20, other: 6}",
    )  # fmt: skip
    assert runner.plan.sizes == (20, 6)
    seen = trained_on(runner)
    runner.train()
    counts = Counter(name.partition("[")[0] for _, names in seen for name in names)
    assert counts == {"annotations.json": 18, "four.json": 4, "two.json": 2 + 2}


def test_a_split_that_is_named_twice_is_shown_twice(tmp_path: Path) -> None:
    assert prepare(tmp_path, *SHORT, "run.train_splits=[train,train]").plan.sizes == (36,)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ("{demo: 1}", "names demo; it must name every data set: demo, other"),
        ("{demo: 1, othre: 1}", "names demo, othre; it must name every data set: demo, other"),
        ("{demo: 0, other: 0}", "must not be negative, and not all zero"),
        ("{demo: -1, other: 2}", "must not be negative, and not all zero"),
    ],
)
def test_shares_that_do_not_fit(other: tuple[str, ...], ratios: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO / "train.yaml", [*other, f"run.train_dataset_ratios={ratios}"])
    assert f"run.train_dataset_ratios {message}" in str(caught.value)


# --- another number of processes ------------------------------------------------------------


def saved_by(world: int, samples: int) -> Checkpoint:
    return Checkpoint({}, {}, {}, progress=Progress(5, 3, samples, world))


@pytest.mark.parametrize(
    ("world", "before", "wanted"),
    [
        (1, None, 6),
        (4, None, 24),
        (2, saved_by(4, 24), 24),  # two processes go on with the step of four
        (8, saved_by(4, 24), 24),
        (4, saved_by(4, 24), 24),
        (3, saved_by(4, 24), 24),
        (2, saved_by(4, 32), 12),  # batch_size_train was another: the configuration decides
        (2, saved_by(2, 8), 12),
        (2, Checkpoint({}, {}, {}, epoch=9), 12),  # the original's file
    ],
)
def test_a_resumed_run_keeps_its_step_on_other_processes(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    world: int,
    before: Checkpoint | None,
    wanted: int,
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: world)
    run = RunConfig(batch_size_train=3, accum_grad_iters=2)
    assert samples_per_step(run, before) == wanted
    assert len(caplog.messages) == (wanted != 6 * world)
    if caplog.messages:
        assert f"now there are {world}: a step keeps its 24 samples" in caplog.messages[0]


def test_a_run_of_two_processes_goes_on_in_one_again_and_again(tmp_path: Path) -> None:
    """The second resume knows the step of the run's first processes, too."""
    first = prepare(tmp_path, *SHORT, job="first")  # 8 samples a step
    after_steps(first, 1, lambda: first.stop.requested_elsewhere())
    content = torch.load(first.train(), weights_only=True)
    content["progress"]["world_size"] = 2  # as two processes of 4 samples would have written
    path = tmp_path / "two.pth"
    torch.save(content, path)
    half = ("run.max_epoch=3", "run.batch_size_train=4", "run.accum_grad_iters=1")
    second = prepare(tmp_path, *half, f"run.resume_ckpt_path={path}", job="second")
    assert (second.step, second.plan.samples_per_step) == (2, 8)
    after_steps(second, 3, lambda: second.stop.requested_elsewhere())
    third = prepare(tmp_path, *half, f"run.resume_ckpt_path={second.train()}", job="third")
    assert (third.step, third.plan.samples_per_step) == (4, 8)
    whole = prepare(tmp_path, *SHORT, job="whole").train()
    for name, tensor in final(third.train()).items():
        assert (tensor - final(whole)[name]).abs().max() < 1e-5


# --- names of runs --------------------------------------------------------------------------


def test_runs_of_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "20260102030405")
    run = RunConfig(output_dir=str(tmp_path / "new" / "输出"))
    names = [new_job_id(run) for _ in range(3)]  # before any of them has written anything
    assert names == ["20260102030405", "20260102030405-2", "20260102030405-3"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run.output_dir: no folder can be made in "):
        new_job_id(RunConfig(output_dir=str(tmp_path / "file")))


def test_a_mistake_in_the_data_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ann.json").write_text("[]")
    with pytest.raises(LavisError, match="no usable record"):
        command(
            monkeypatch, f"{ANNOTATIONS}.train.storage={tmp_path / 'ann.json'}",
            f"run.output_dir={tmp_path / 'out'}",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_every_built_in_task_says_what_is_better() -> None:
    assert TASKS.get("image_text_pretrain").metric.name == "valid_loss"
    assert not TASKS.get("image_text_pretrain").metric.higher_is_better
