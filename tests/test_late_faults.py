"""Whatever can be known before weights are read is told before they are.

The vision encoder's weights are junk here: whoever reads them fails with another message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cli_demo
import evaluate
import test_model_chat
import train
from examples.toybox.world import __main__ as toybox
from examples.toybox.world.__main__ import write_split
from lavis.common.cli import run_cli
from lavis.tools import cache_features, export, prune_vocab
from tests.conftest import REPO
from tests.processes import run as run_apart

TOYBOX = REPO / "examples" / "toybox"
YAML = """
env: {{cache_root: {repo}}}
model: {{arch: minigpt4qwen, model_type: toybox, vit_weights: {data}/junk.pth}}
datasets:
  toybox:
    builder: instruction
    build_info:
      annotations:
        train: {{storage: {data}/test.json}}
        val: {{storage: {data}/test.json}}
        test: {{storage: {data}/test.json}}
      images: {{storage: {data}/image}}
run:
  lr_sched: linear_warmup_cosine_lr_step-wise
  batch_size_train: 4
  device: cpu
  output_dir: {data}/out
"""
INFO = "datasets.toybox.build_info"
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records, junk for weights, and files and folders that stand in the way."""
    folder = tmp_path_factory.mktemp("late")
    write_split(folder, "test", 8, seed=0)
    (folder / "run.yaml").write_text(YAML.format(repo=REPO, data=folder), encoding="utf-8")
    for name in ("junk.pth", "other.pth"):
        (folder / name).write_bytes(b"no weights")
    (folder / "broken.json").write_text("[{]")
    records = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    (folder / "bad.json").write_text(json.dumps([*records, {"instruction": "?", "output": ""}]))
    (folder / "file").touch()
    (folder / "dangling").symlink_to(folder / "nowhere")
    for name, step in (("checkpoint_0.pth", 1), ("checkpoint_latest.pth", 2)):
        path = folder / "runs" / "job" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        progress = {"step": step, "steps_per_epoch": 7, "samples_per_step": 4, "world_size": 1}
        content = {"model": {}, "optimizer": {}, "epoch": -1, "progress": progress}
        torch.save(content, path)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture()
def fails(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail; return what it says."""

    def run(command: Any, *arguments: object) -> str:
        listed = [str(a).replace("DATA", str(data)) for a in arguments]
        monkeypatch.setattr(sys, "argv", [command.__name__, *listed])
        with pytest.raises(SystemExit) as caught:
            run_cli(command.main)
        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        assert "Traceback" not in error
        assert not (data / "out").exists()
        return error.replace(str(data), "DATA")

    return run


CONFIG = ("--cfg-path", "DATA/run.yaml")
LONG = "x" * 300
SETTINGS = [  # (--options, the message)
    ("run.warmup_steps=2", "run.warmup_steps: 2 steps of warm-up do not fit into a run of 2 steps"),
    ("run.warmup_steps=500", "run.warmup_steps: 500 steps of warm-up do not fit into a run of 2 s"),
    ("run.max_tokens_per_batch=16", "run.max_tokens_per_batch is 16, but a sample has "),
    ("model.freeze_proj=true", "nothing to train: every part of the model is frozen (freeze_*)"),
    ("run.min_lr=1", "--options: run.min_lr must be at most 0.0001 (init_lr), not 1.0"),
    ("run.warmup_lr=0.1", "--options: run.warmup_lr must be at most 0.0001 (init_lr), not 0.1"),
    ("run.warmup_lr=.nan", "--options: run.warmup_lr must be in [-inf, inf), not nan"),
    ("run.lr_decay_rate=1.5", "--options: run.lr_decay_rate must be at most 1, not 1.5"),
    ("run.eps=-1e-8", "--options: run.eps must be positive, not -1e-08"),
    ("run.eps=0", "--options: run.eps must be positive, not 0.0"),
    ("model.lora_alpha=0", "--options: model.lora_alpha must be at least 1, not 0"),
    ("run.max_new_tokens=0", "--options: run.max_new_tokens must be at least 1, not 0"),
    ("run.device=gpu", "run.device: 'gpu' is none of cuda, cuda:N, cpu, auto"),
    ("model.llm_config={seq_length: 100}", "model.max_txt_len 500 is past this language model's"),
    (
        "preprocess.vis_processor.train.image_size=70",
        "DATA/run.yaml: preprocess.vis_processor.train.image_size is 70, but model.image_size is",
    ),
    ("run.resume_ckpt_path=DATA/other.pth", "DATA/other.pth is a text file"),
    ("run.resume_ckpt_path=DATA/runs/job/checkpoint_9.pth", "checkpoint_9.pth; did you mean 'che"),
    (
        "run.resume_ckpt_path=DATA/runs/job/checkpoint_0.pth",
        "checkpoint_0.pth stopped inside an epoch of 7 steps, but this configuration has 2 steps",
    ),
    (
        "run.resume_ckpt_path=DATA/runs",
        "run.resume_ckpt_path: DATA/runs is a folder, not a checkpoint; it holds "
        "DATA/runs/job/checkpoint_latest.pth",
    ),
    ("run.resume_ckpt_path=DATA/empty", "DATA/empty is a folder, not a checkpoint, and holds no c"),
    ("run.output_dir=DATA/dangling", "DATA/dangling is a broken link to DATA/nowhere"),
    ("run.output_dir=DATA/dangling/a/b", "DATA/dangling is a broken link to DATA/nowhere"),
    ("run.output_dir=DATA/file/a", "DATA/file/a cannot be a folder, since DATA/file is a file"),
    (f"run.output_dir=DATA/new/{LONG}", "cannot be written: [Errno 36] File name too long"),
    ("run.output_dir=/proc/none/a", "run.output_dir: /proc/none/a cannot be written: "),
    ("run.output_dir=~no-such-user/a", "run.output_dir: ~no-such-user/a: no such user has a home"),
    ("run.output_dir=$HOME/a", "run.output_dir: $HOME/a: for an environment variable write ${oc.e"),
    ("run.output_dir=${HOME}/a", "the environment variable is ${oc.env:HOME}"),
    (
        "run.output_dir=123",
        "--options: run.output_dir must be a string, not 123 (int); text that l",
    ),
    ("run.output_dir=@a", """needs quotes: --options 'run.output_dir="@a"'"""),
]
EVALUATED = [
    (f"{INFO}.annotations.SPLIT.storage=DATA/broken.json", "DATA/broken.json is not valid JSON"),
    (f"{INFO}.annotations.SPLIT.storage=DATA/bad.json", "split 'SPLIT': 1 of 9 records cannot be "),
    (f"{INFO}.annotations.SPLIT.storage=DATA/none.json", f"{INFO}.annotations.SPLIT.storage: no f"),
    (
        "preprocess.vis_processor.eval.image_size=70",
        "preprocess.vis_processor.eval.image_size is 70, but model.image_size is 84; they must be",
    ),
    (
        "datasets.toybox.vis_processor.eval={name: blip_image_eval, image_size: 384}",
        "datasets.toybox.vis_processor.eval.image_size is 384, but model.image_size is 84; they ",
    ),
]
ANSWERED = [
    ("run.max_new_tokens=99999", "run.max_new_tokens 99999 leaves no room for a question in this "),
    ("run.max_new_tokens=0", "run.max_new_tokens must be at least 1, not 0"),
]


def test_nothing_is_wrong_but_the_weights(fails: Fails) -> None:
    """Otherwise the rest of this file says nothing."""
    junk = "DATA/junk.pth is a text file"
    assert junk in fails(train, *CONFIG)
    options = ("--options", "run.test_splits=[test]", "run.valid_splits=[val]")
    assert junk in fails(train, *CONFIG, *options)
    assert junk in fails(train, *CONFIG, *options, "run.evaluate=true")
    assert junk in fails(evaluate, *CONFIG, "--out", "DATA/answers")
    assert junk in fails(cache_features, *CONFIG, "--options", "run.feature_cache.dir=DATA/cache")
    for command in (test_model_chat, cli_demo):
        assert junk in fails(command, *CHAT)


@pytest.mark.parametrize(("option", "message"), SETTINGS)
def test_training(fails: Fails, option: str, message: str) -> None:
    assert message in fails(train, *CONFIG, "--options", option)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("option", "message"), EVALUATED)
def test_evaluation_after_training(fails: Fails, split: str, option: str, message: str) -> None:
    option, message = option.replace("SPLIT", split), message.replace("SPLIT", split)
    splits = "run.valid_splits=[val]" if split == "val" else "run.test_splits=[test]"
    assert message in fails(train, *CONFIG, "--options", splits, option)


@pytest.mark.parametrize(("option", "message"), EVALUATED + ANSWERED)
def test_evaluation_alone(fails: Fails, option: str, message: str) -> None:
    option, message = option.replace("SPLIT", "test"), message.replace("SPLIT", "test")
    options = ("--options", "run.evaluate=true", "run.test_splits=[test]", option)
    assert message in fails(train, *CONFIG, *options)
    arguments = ("--out", "DATA/answers", "--baselines", "--options", option)
    assert message in fails(evaluate, *CONFIG, *arguments)


@pytest.mark.parametrize(("option", "message"), ANSWERED)
def test_answers_after_training(fails: Fails, option: str, message: str) -> None:
    assert message in fails(train, *CONFIG, "--options", "run.test_splits=[test]", option)


@pytest.mark.parametrize(("option", "message"), EVALUATED)
def test_features_ahead(fails: Fails, option: str, message: str) -> None:
    option, message = option.replace("SPLIT", "val"), message.replace("SPLIT", "val")
    options = ("run.valid_splits=[val]", "run.feature_cache.dir=DATA/cache", option)
    assert message in fails(cache_features, *CONFIG, "--options", *options)
    assert message in fails(cache_features, *CONFIG, "--splits", "val", "--options", *options[1:])


def test_folders_of_features(fails: Fails) -> None:
    options = ("--options", "run.feature_cache.dir=DATA/dangling/x")
    message = "run.feature_cache.dir: DATA/dangling/x cannot be a folder, since DATA/dangling is a"
    assert message in fails(cache_features, *CONFIG, *options)
    assert message in fails(train, *CONFIG, *options, "run.feature_cache.enabled=true")


CHECKPOINTS = [
    ("DATA/none.pth", "no checkpoint DATA/none.pth"),
    ("DATA/runs/job/checkpoint_9.pth", "checkpoint_9.pth; did you mean 'checkpoint_0.pth'?"),
    (
        "DATA/runs/job",
        "DATA/runs/job is a folder, not a checkpoint; it holds DATA/runs/job/checkpoi",
    ),
    ("DATA/other.pth", "DATA/other.pth is a text file"),
    ("~no-such-user/a.pth", "~no-such-user/a.pth: no such user has a home folder"),
]
CHAT = (
    "--checkpoint", TOYBOX / "checkpoint.pth", "--image", TOYBOX / "image" / "scene.png",
    "--device", "cpu", *CONFIG,
)  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "message"), CHECKPOINTS)
def test_checkpoints(fails: Fails, data: Path, checkpoint: str, message: str) -> None:
    arguments = (*CONFIG, "--baselines", "--out", "DATA/answers", "--checkpoint", checkpoint)
    assert message in fails(evaluate, *arguments)
    for command in (test_model_chat, cli_demo):
        assert message in fails(command, *CHAT, "--checkpoint", checkpoint)
    options = ("run.evaluate=true", "run.test_splits=[test]", f"run.resume_ckpt_path={checkpoint}")
    assert message in fails(train, *CONFIG, "--options", *options)
    if "other" not in checkpoint:  # export reads no weights, and misses a configuration first
        assert message in fails(export, "--checkpoint", checkpoint, "--out", "DATA/out/x")
    assert not (data / "answers").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("DATA/file", "argument --out: DATA/file cannot be a folder, since DATA/file is a file"),
        ("DATA/dangling/a", "argument --out: DATA/dangling/a cannot be a folder, since DATA/dangl"),
        (f"DATA/{LONG}", "File name too long"),
        ("~no-such-user", "~no-such-user: no such user has a home folder"),
    ],
)
def test_folders_to_write(fails: Fails, out: str, message: str) -> None:
    assert message in fails(evaluate, *CONFIG, "--out", out)
    checkpoint = TOYBOX / "checkpoint.pth"
    assert message in fails(export, "--checkpoint", checkpoint, "--out", out)


def test_export_of_a_checkpoint_without_its_configuration(fails: Fails) -> None:
    error = fails(export, "--checkpoint", "DATA/other.pth", "--out", "DATA/out/x")
    assert "no configuration file DATA/config.yaml" in error


@pytest.mark.parametrize("command", [test_model_chat, cli_demo])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "~no-such-user/a.png"), "~no-such-user/a.png: no such user has a home folde"),
        (("--image", "DATA/file"), "DATA/file is not an image that can be read"),
        (("--max-new-tokens", "99999"), "--max-new-tokens 99999 leaves no room for a question"),
        (("--device", "gpu"), "'gpu' is none of cuda, cuda:N, cpu, auto"),
        (
            ("--options", "preprocess.vis_processor.eval.image_size=70"),
            "preprocess.vis_processor.eval.image_size is 70, but model.image_size is 84; they must",
        ),
        (
            ("--options", "preprocess.vis_processor.eval=null"),
            "the configuration's preprocess.vis_processor has no `eval`",
        ),
    ],
)
def test_chat(fails: Fails, command: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in fails(command, *CHAT, *arguments)


SCENE = TOYBOX / "image" / "scene.png"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (train, ("--options", "run.eps=0", "--options", "run.seed=1"), "run.eps must be positive"),
        (train, ("--options", "run.seed=2", "--options", "run.seed=1"), "run.seed is given as '2'"),
        (evaluate, ("--splits", "none", "--splits", "test"), "annotations has no split 'none'"),
        (evaluate, ("--splits", "test", "--splits", "none"), "annotations has no split 'none'"),
        (cache_features, ("--splits", "none", "--splits", "val"), "has no split 'none'"),
        (cli_demo, ("--image", "DATA/file", "--image", SCENE), "DATA/file is not an image"),
        (prune_vocab, ("--corpus", "DATA/none.txt", "--corpus", "DATA/file"), "no file DATA/none."),
    ],
)
def test_an_argument_given_twice(
    fails: Fails, command: Any, arguments: tuple[Any, ...], message: str
) -> None:
    others = {
        cli_demo: CHAT[:2] + CHAT[4:],
        prune_vocab: ("--vocab", "DATA/file", "--out", "DATA/out/x"),
    }
    assert message in fails(command, *others.get(command, CONFIG), *arguments)


def test_splits_given_twice_are_written_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--splits", "val", "--splits", "test", "--val", "1", "--test", "1"]
    monkeypatch.setattr(sys, "argv", ["toybox", "--out", str(tmp_path), *arguments])
    assert toybox.main() == 0
    assert {p.name for p in tmp_path.glob("*.json")} == {"val.json", "test.json"}


def test_a_deepspeed_section_that_deepspeed_refuses(data: Path, tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed changes much of the one that imports it."""
    pytest.importorskip("deepspeed")
    section = "run.deepspeed_config={zero_optimization: {stage: 2, bogus: 1}}"
    command = ["--cfg-path", data / "run.yaml", "--use-deepspeed", "--options", section]
    done = run_apart(tmp_path, "train", command)
    assert done.returncode == 2
    assert "error: run.deepspeed_config: DeepSpeed refuses it: " in done.stderr
    assert "bogus" in done.stderr.splitlines()[-1]
