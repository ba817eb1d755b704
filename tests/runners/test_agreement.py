"""What a run that goes on must share with the one before: data, order, rate, the best."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.common.errors import LavisError, WeightsError
from lavis.models.weights.files import load_pickle
from lavis.runners.agreement import fingerprint
from tests.conftest import DEMO, TOY
from tests.runners.test_runner import SHORT, final, prepare, same
from tests.runners.test_settings import ANNOTATIONS, VALID

WAY_OUT = ". Set that back, or resume from the checkpoint of a complete epoch"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of three steps, saved at each."""
    every = ("run.save_every_steps=1", "run.keep_last=9")
    runner = prepare(tmp_path_factory.mktemp("before"), *SHORT, *every, *VALID)
    runner.train()
    return runner.folder


@pytest.fixture()
def moved(tmp_path: Path) -> Path:
    """The demo's data in another place."""
    shutil.copytree(DEMO / "image", tmp_path / "data" / "image")
    shutil.copy(DEMO / "annotations.json", tmp_path / "data" / "annotations.json")
    return tmp_path / "data"


def data(folder: Path) -> tuple[str, str]:
    info = "datasets.demo.build_info"
    return (
        f"{info}.images.storage={folder / 'image'}",
        f"{ANNOTATIONS}.train.storage={folder / 'annotations.json'}",
    )


def refused(tmp_path: Path, source: Path, *options: str) -> str:
    with pytest.raises(WeightsError) as caught:
        prepare(tmp_path, *SHORT, *options, f"run.resume_ckpt_path={source}")
    return str(caught.value)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "lavis.runners.agreement"]


# --- data, seed, shares ---------------------------------------------------------------------


def change(folder: Path, how: str) -> None:
    path = folder / "annotations.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    if how == "order":
        records = records[::-1]
    elif how == "one answer":
        records[0]["output"] = "No."
    elif how == "one picture":
        records[3]["image"] = records[9]["image"]
    elif how == "fewer":
        records = records[:-1]
    path.write_text(json.dumps(records), encoding="utf-8")


@pytest.mark.parametrize("how", ["order", "one answer", "one picture", "fewer"])
def test_other_data(
    tmp_path: Path, before: Path, moved: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    then = load_pickle(before / "checkpoint_step_4.pth")["data"]["demo"]  # type: ignore[index]
    change(moved, how)
    source = before / "checkpoint_step_4.pth"
    message = refused(tmp_path, source, *data(moved))
    start = f"{source} stopped inside an epoch, the rest of which would show other samples: "
    assert message.startswith(f"{start}datasets was {{'demo': '{then}'}}, now {{'demo': '")
    assert message.endswith(WAY_OUT)
    caplog.clear()
    whole = before / "checkpoint_1.pth"
    runner = prepare(tmp_path, *SHORT, *data(moved), f"run.resume_ckpt_path={whole}")
    assert runner.step == 2 * runner.plan.steps_per_epoch
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{whole} goes on with other samples: datasets was {{'demo': '{then}")


def test_the_same_data_elsewhere(
    tmp_path: Path, before: Path, moved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = f"run.resume_ckpt_path={before / 'checkpoint_step_4.pth'}"
    runner = prepare(tmp_path, *SHORT, *VALID, *data(moved), source)
    assert warnings(caplog) == []
    assert same(final(runner.train()), final(before / "checkpoint_latest.pth"))


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["run.seed=7"], "run.seed was 42, now 7"),
        (
            ["run.train_dataset_ratios={demo: 1}"],
            "run.train_dataset_ratios was None, now {'demo': ",
        ),
    ],
)
def test_another_order(
    tmp_path: Path,
    before: Path,
    caplog: pytest.LogCaptureFixture,
    options: list[str],
    changed: str,
) -> None:
    message = refused(tmp_path, before / "checkpoint_step_5.pth", *options)
    assert f"would show other samples: {changed}" in message
    assert message.endswith(WAY_OUT)
    prepare(tmp_path, *SHORT, *options, f"run.resume_ckpt_path={before / 'checkpoint_0.pth'}")
    assert any(f"goes on with other samples: {changed}" in m for m in warnings(caplog))


def test_another_way_to_compute_a_step_is_no_difference(
    tmp_path: Path, before: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = before / "checkpoint_step_4.pth"
    half = ("run.batch_size_train=2", "run.accum_grad_iters=4", "run.max_tokens_per_batch=300")
    runner = prepare(tmp_path, "run.max_epoch=3", *half, f"run.resume_ckpt_path={source}")
    assert runner.step == 4
    assert warnings(caplog) == []


def test_an_older_file_is_not_compared_and_says_so(
    tmp_path: Path, before: Path, moved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content: Any = torch.load(before / "checkpoint_step_4.pth", weights_only=True)
    for key in ("data", "best"):
        del content[key]
    path = tmp_path / "older.pth"
    torch.save(content, path)
    change(moved, "order")
    source = f"run.resume_ckpt_path={path}"
    assert prepare(tmp_path, *SHORT, *data(moved), source).step == 4
    unknown = "does not say what it was trained on: data are not compared"
    assert warnings(caplog) == [f"{path} {unknown}"]
    assert "run.seed was 42, now 7" in refused(tmp_path, path, "run.seed=7")
    caplog.clear()
    original = TOY / "checkpoint_9.pth"
    prepare(tmp_path, "run.max_epoch=11", f"run.resume_ckpt_path={original}")
    assert warnings(caplog) == [f"{original} {unknown}"]


def test_settings_of_the_model_are_compared(
    tmp_path: Path, before: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["model.label_mask=assistant_only", "model.max_txt_len=100"]
    prepare(tmp_path, *SHORT, *options, f"run.resume_ckpt_path={before / 'checkpoint_step_4.pth'}")
    told = [r.message.partition(": ")[2] for r in caplog.records if "agreement" in r.name]
    assert "model.label_mask was chatml_delimiters, now assistant_only" in told
    assert any(m.startswith("model.max_txt_len was ") and m.endswith(" now 100") for m in told)


def test_the_fingerprint_of_data_sets_of_another_kind() -> None:
    assert fingerprint([[1, 2], [3]]).startswith("3 samples, ")


# --- rate, best -----------------------------------------------------------------------------


def test_more_epochs_raise_the_rate(
    tmp_path: Path, before: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = before / "checkpoint_1.pth"
    runner = prepare(tmp_path, *SHORT, "run.max_epoch=6", f"run.resume_ckpt_path={source}")
    then = prepare(tmp_path, *SHORT).schedule.lr(6)
    now = runner.schedule.lr(6)
    assert now > then
    assert warnings(caplog) == [
        f"the learning rate of step 6 is {now:.3g}, not {then:.3g} as in the run that wrote "
        f"{source}: run.max_epoch was 3, now 6"
    ]
    caplog.clear()
    rate = f"run.init_lr={2 * runner.run.init_lr}"
    prepare(tmp_path, *SHORT, rate, f"run.resume_ckpt_path={source}")
    (message,) = warnings(caplog)
    assert f": run.init_lr was {runner.run.init_lr}, now {2 * runner.run.init_lr}" in message


def test_settings_of_another_shape_give_no_rate(
    tmp_path: Path, before: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content: Any = torch.load(before / "checkpoint_1.pth", weights_only=True)
    path = tmp_path / "other.pth"
    for run in ({"init_lr": "high"}, {"lr_sched": "theirs"}, {"max_epoch": 0}, {}, "x"):
        content["config"]["run"] = run
        torch.save(content, path)
        prepare(tmp_path, *SHORT, "run.init_lr=0.5", f"run.resume_ckpt_path={path}")
    assert [m for m in warnings(caplog) if "learning rate" in m] == []


def test_one_that_is_no_better_is_not_the_best_after_a_resume(tmp_path: Path, before: Path) -> None:
    best = before / "checkpoint_best.pth"
    still = ("run.max_epoch=4", "run.init_lr=0", "run.min_lr=0")  # as good as before, not better
    resumed = prepare(
        tmp_path, *SHORT, *VALID, *still, f"run.resume_ckpt_path={before / 'checkpoint_2.pth'}"
    )
    content: Any = load_pickle(resumed.train())
    assert not (resumed.folder / "checkpoint_best.pth").exists()
    known: Any = load_pickle(best)
    assert content["best"] == known["best"]
    assert content["best"]["checkpoint"] == str(best)
    assert content["best"]["value"] == known["metrics"]["valid_loss"]
    assert content["metrics"]["valid_loss"] >= content["best"]["value"]


# --- what is no checkpoint ------------------------------------------------------------------


def test_a_folder_offers_the_newest_checkpoint_in_it(tmp_path: Path, before: Path) -> None:
    latest = before / "checkpoint_latest.pth"
    for folder in (before, before.parent):
        with pytest.raises(LavisError) as caught:
            prepare(tmp_path, f"run.resume_ckpt_path={folder}")
        assert str(caught.value) == (
            f"run.resume_ckpt_path: {folder} is a folder, not a checkpoint; it holds {latest}"
        )


def test_a_checkpoint_of_weights_alone_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": {}, "iteration": 3}, path)
    message = refused(tmp_path, path)
    assert "; it holds a dictionary of 2: model (dict), iteration (int). To start from " in message


def test_a_number_that_is_not_finite_is_found_at_resume(tmp_path: Path, before: Path) -> None:
    content: Any = torch.load(before / "checkpoint_1.pth", weights_only=True)
    content["model"]["llm_proj.bias"][2] = torch.inf
    path = tmp_path / "inf.pth"
    torch.save(content, path)
    assert f"{path}: llm_proj.bias holds numbers that are not finite" in refused(tmp_path, path)
    content["model"] = {f"module.{k}": t for k, t in final(before / "checkpoint_1.pth").items()}
    torch.save(content, path)
    resumed = prepare(tmp_path, *SHORT, *VALID, f"run.resume_ckpt_path={path}")
    assert same(final(resumed.train()), final(before / "checkpoint_2.pth"))
