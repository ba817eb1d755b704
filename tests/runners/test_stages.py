"""``stages`` of a YAML: trained one after another, each from the weights of the one before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from examples.toybox.world.__main__ import write_split
from lavis.common.config import load_config, load_stages
from lavis.common.errors import ConfigError
from tests.test_parts import make_home

pytest.importorskip("peft")
LORA = {"r": 4, "targets": "all"}  # with dropout
STEPS = {"align": 4, "instruct": 6}
CONNECTOR = {"llm_proj.weight", "llm_proj.bias"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``stages.yaml``: a connector learns; then adapters, on other data, with it as it is."""
    home = make_home(tmp_path_factory.mktemp("stages"), "llama")
    write_split(home, "more", 12, 5, languages=("en",))
    content = yaml.safe_load((home / "run.yaml").read_text(encoding="utf-8"))
    info = content["datasets"].pop("toybox")["build_info"]
    content["run"] |= {"seed": 3, "save_every_steps": 1}

    def stage(split: str, learns: dict[str, Any], **run: Any) -> dict[str, Any]:
        annotations = {"train": {"storage": str(home / f"{split}.json")}}
        annotations |= {"test": info["annotations"]["test"]}
        block = {"builder": "instruction", "build_info": info | {"annotations": annotations}}
        return {"model": {"train": learns}, "datasets": {split: block}, "run": run}

    content["stages"] = {
        "align": stage("train", {"connector": 1e-2}, init_lr=1e-2),
        "instruct": stage("more", {"language": {"lora": LORA}}, init_lr=1e-3),
    }
    (home / "stages.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return home


def run(home: Path, output: Path, *arguments: str, options: tuple[str, ...] = ()) -> Path:
    """What ``train.py`` prints last."""
    path = home if home.suffix else home / "stages.yaml"
    argv = ["train.py", "--cfg-path", str(path), *arguments, "--options"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[object] = []
        patch.setattr(train, "print_once", printed.append)
        patch.setattr(sys, "argv", [*argv, f"run.output_dir={output}", *options])
        assert train.main() == 0
    return Path(str(printed[-1]))


AUTO = ("run.resume_ckpt_path=auto",)


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run in one process."""
    last = run(home, tmp_path_factory.mktemp("whole"))
    assert (last.parent.name, last.name) == ("instruct", "checkpoint_latest.pth")
    return last.parent.parent


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def check_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            check_equal(one[key], other[key])
    else:
        assert one == other


def check_same(one: Path, other: Path) -> None:
    """Weights, moments and progress of two checkpoints, bit for bit."""
    for key in ("model", "optimizer", "progress", "data", "epoch"):
        check_equal(content(one)[key], content(other)[key])


def losses(output: Path, stage: str) -> dict[int, tuple[float, float]]:
    """Of every step, over all runs in a folder; a step that was repeated had the same."""
    found: dict[int, tuple[float, float]] = {}
    for log in sorted(output.glob(f"*/{stage}/log.txt")):
        for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if "loss" in line:
                numbers = line["loss"], line["grad_norm"]
                assert found.setdefault(line["step"], numbers) == numbers
    return found


# --- one folder, one command ----------------------------------------------------------------


def test_one_folder_with_a_run_for_each_stage(home: Path, whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {"config.yaml", *STEPS}
    for stage, steps in STEPS.items():
        names = {p.name for p in (whole / stage).iterdir()}
        assert {"config.yaml", "log.txt", "loss.png", "checkpoint_0.pth"} <= names
        assert list(losses(whole.parent, stage)) == list(range(steps))
        assert content(whole / stage / "checkpoint_latest.pth")["progress"]["step"] == steps
    align, instruct = (content(whole / s / "checkpoint_latest.pth")["model"] for s in STEPS)
    assert set(align) == CONNECTOR
    assert set(instruct) > CONNECTOR
    assert all("lora_" in name for name in set(instruct) - CONNECTOR)
    assert all(torch.equal(instruct[name], align[name]) for name in CONNECTOR)


def test_a_stage_is_the_run_that_one_starts_by_hand(
    home: Path, whole: Path, tmp_path: Path
) -> None:
    """Two YAML files, the second of which names the first one's checkpoint."""
    stages = load_stages(home / "stages.yaml")
    first = ""
    for name, config in stages.items():
        path = tmp_path / f"{name}.yaml"
        tree = dict(config.tree)
        if first:
            tree["model"] = tree["model"] | {"load_finetuned": True, "finetuned": first}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        first = str(run(path, tmp_path / name))
        mine = content(Path(first))["model"]
        theirs = content(whole / name / "checkpoint_latest.pth")["model"]
        check_equal(mine, {k: v for k, v in theirs.items() if k in mine})
        assert len(theirs) - len(mine) == (2 if name == "instruct" else 0)


def test_the_folders_own_yaml_is_the_run(home: Path, whole: Path, tmp_path: Path) -> None:
    """``--options`` of all stages and of one are in it, each where it counted."""
    options = ["run.max_epoch=1", "stages.instruct.run.max_epoch=3", f"run.output_dir={tmp_path}"]
    made = load_stages(home / "stages.yaml", options)
    assert [c.run.max_epoch for c in made.values()] == [1, 3]
    again = load_stages(whole / "config.yaml", options)
    for name, config in load_stages(
        home / "stages.yaml", [f"run.output_dir={whole.parent}"]
    ).items():
        assert load_stages(whole / "config.yaml")[name].tree == config.tree
        assert load_config(whole / name / "config.yaml").tree == config.tree
        assert again[name].tree == made[name].tree


# --- one stage ------------------------------------------------------------------------------


def test_one_stage_after_another(home: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--stage instruct begins with a checkpoint of stage al"):
        run(home, tmp_path, "--stage", "instruct")
    first = run(home, tmp_path, "--stage", "align")
    check_same(first, whole / "align" / first.name)
    assert not (first.parent.parent / "instruct").exists()
    second = run(home, tmp_path, "--stage", "instruct", options=AUTO)
    check_same(second, whole / "instruct" / second.name)
    assert not (second.parent.parent / "align").exists()
    rest = tmp_path / "rest"  # what auto cannot find there
    for options in (
        (f"run.resume_ckpt_path={first}",),
        ("model.load_finetuned=true", f"model.finetuned={first}"),
    ):
        other = run(home, rest, "--stage", "instruct", options=options)
        check_same(other, second)


def test_a_stage_that_is_not_at_its_end(home: Path, whole: Path, tmp_path: Path) -> None:
    half = f"run.resume_ckpt_path={whole / 'align' / 'checkpoint_0.pth'}"
    with pytest.raises(ConfigError, match=r"stage align is not at its end \(1 of 2 epochs\)"):
        run(home, tmp_path, "--stage", "instruct", options=(half,))
    last = run(home, tmp_path, options=(half,))
    check_same(last, whole / "instruct" / last.name)
    assert list(losses(tmp_path, "align")) == [2, 3]


def test_checkpoints_of_no_stage(home: Path, whole: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.pth"
    moved.write_bytes((whole / "instruct" / "checkpoint_0.pth").read_bytes())
    options = (f"run.resume_ckpt_path={moved}",)
    with pytest.raises(ConfigError, match=r"in no folder of align or instruct; .* needs --stage"):
        run(home, tmp_path / "out", options=options)
    last = run(home, tmp_path / "out", "--stage", "instruct", options=options)
    check_same(last, whole / "instruct" / last.name)
    options = (f"run.resume_ckpt_path={whole / 'instruct' / 'checkpoint_0.pth'}",)
    with pytest.raises(ConfigError, match="in no folder of align; "):
        run(home, tmp_path / "out", "--stage", "align", options=options)
    with pytest.raises(ConfigError, match="has the stages align, instruct; did you mean 'align'"):
        run(home, tmp_path, "--stage", "alin")
    with pytest.raises(ConfigError, match="--stage align: .*run.yaml has no stages"):
        run(home / "run.yaml", tmp_path, "--stage", "align")
