"""``stages`` of a YAML: trained one after another, each from the weights of the one before."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import evaluate
import train
from examples.toybox.world.__main__ import write_split
from lavis.chat import ChatEngine, Conversation
from lavis.common.config import load_config, load_stages
from lavis.common.errors import ConfigError, DataError, LavisError, WeightsError
from lavis.models import load_model_and_preprocess
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from lavis.tools import cache_features
from tests.conftest import REPO
from tests.runners.test_distributed import kill
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


def test_adapters_that_no_longer_learn(home: Path, tmp_path: Path) -> None:
    learns = f"{{language: {{lora: {LORA}}}, connector: 1e-3}}"
    later = f"{{language: {{lora: {LORA}, lr: 0}}, connector: 1e-3}}"
    content_ = yaml.safe_load((home / "stages.yaml").read_text(encoding="utf-8"))
    for stage, train_ in zip(content_["stages"].values(), (learns, later), strict=True):
        stage["model"]["train"] = yaml.safe_load(train_)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content_, sort_keys=False), encoding="utf-8")
    last = run(tmp_path / "run.yaml", tmp_path / "out")
    first, second = (content(last.parents[1] / s / last.name)["model"] for s in STEPS)
    assert first.keys() == second.keys()
    assert {n for n in first if not torch.equal(first[n], second[n])} == CONNECTOR


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_a_stage_leaves_no_model_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    built: list[weakref.ref[Any]] = []
    build = ImageTextPretrainTask.build_model

    def count(*args: Any, **options: Any) -> Any:
        assert all(model() is None for model in built)
        model = build(*args, **options)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ImageTextPretrainTask, "build_model", count)
    run(home, tmp_path, options=("run.max_epoch=1", f"run.strategy={strategy}"))
    assert len(built) == 2


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
    for arguments in (["--stage", "instruct"], []):  # there is nothing left
        done = run(home, tmp_path, *arguments, options=AUTO)
        check_equal(content(done)["model"], content(second)["model"])
        assert (done.parent / "log.txt").read_text(encoding="utf-8") == ""
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
    with pytest.raises(ConfigError, match=r"--stage align: .*run\.yaml has no stages"):
        run(home / "run.yaml", tmp_path, "--stage", "align")


# --- mistakes, before anything is trained ---------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ("run.max_epochs=3", ConfigError, r"unknown key 'run\.max_epochs'; did you mean"),
        ("run.init_lr=fast", ConfigError, r"run\.init_lr must be a number, not 'fast'"),
        ("run.min_lr=1", ConfigError, r"run\.min_lr must be at most"),
        (
            "model.connector={name: mlp}",
            WeightsError,
            r"model\.connector\.name: linear \(now mlp\)",
        ),
        ("model.language.path=none", WeightsError, r"model\.language\.path.*none"),
        ("model.train={vision: {parts: [eye]}}", ConfigError, "unknown 'eye'"),
        ("datasets.more.build_info.images.storage=none", LavisError, "none"),
        (
            "datasets.more.build_info.annotations.train.storage=BROKEN",
            DataError,
            r"broken\.json\[0\]",
        ),
        ("run.warmup_steps=6", ConfigError, "warmup_steps"),
        ("run.max_tokens_per_batch=20", LavisError, "max_tokens_per_batch"),
        (
            "run.strategy=single run.fsdp=true",
            ConfigError,
            r"run\.strategy is single, but run\.fsdp",
        ),
        ("run.valid_splits=[none]", LavisError, "none"),
        ("run.feature_cache={enabled: true, dtype: fp32, views: 0}", ConfigError, "views"),
    ],
)
def test_mistakes_in_the_second_stage(
    home: Path, tmp_path: Path, setting: str, kind: type[LavisError], message: str
) -> None:
    (tmp_path / "broken.json").write_text(json.dumps([{"image": "a.png"}]), encoding="utf-8")
    setting = setting.replace("BROKEN", str(tmp_path / "broken.json"))
    options = tuple(f"stages.instruct.{item}" for item in setting.split(" run."))
    options = (options[0], *(item.replace("instruct.", "instruct.run.") for item in options[1:]))
    with pytest.raises(kind, match=f"^stages\\.instruct: (?s:.*){message}"):
        run(home, tmp_path / "out", options=options)
    assert not list((tmp_path / "out").rglob("checkpoint_*"))


@pytest.mark.parametrize(
    ("align", "instruct", "message"),
    [
        (
            "{language: {lora: {r: 4}}}", "{connector: 1e-3}",
            "what stage align ends with are adapters, too, without which",
        ),
        (
            "{language: {lora: {r: 4}}}", "{language: {lora: {r: 2}}}",
            r".*other settings; set model\.train\.language\.lora\.r: 4 \(now 2\)",
        ),
        (
            "{language: {lora: {r: 4, targets: all}}}", "{language: {lora: {r: 4}}}",
            r"what stage align ends with holds \d+ tensors that are not part of this model: llm_mo",
        ),
        (
            "{language: {lora: {r: 4}}}", "{language: {lora: {r: 4, targets: all}}}",
            r"what stage align ends with lacks llm_model\..*lora_A.*, which is trained",
        ),
        ("{vision: {parts: [qformer]}}", "{connector: 1e-3}", r"run\.feature_cache: an earlier"),
        (
            "{language: {lora: {r: 4}}}", "{connector: 1e-3, language: {lora: {r: 4}}}",
            r"what stage align ends with lacks llm_proj\.weight, which is trained",
        ),
    ],
)  # fmt: skip
def test_stages_that_do_not_follow_each_other(
    home: Path, tmp_path: Path, align: str, instruct: str, message: str
) -> None:
    options = [f"stages.align.model.train={align}", f"stages.instruct.model.train={instruct}"]
    options += [f"stages.instruct.run.feature_cache={{enabled: true, dir: {tmp_path / 'f'}}}"]
    stages = yaml.safe_load((home / "stages.yaml").read_text(encoding="utf-8"))
    for stage in stages["stages"].values():
        del stage["model"]
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
    with pytest.raises(LavisError, match=rf"^stages\.instruct: {message}"):
        run(path, tmp_path / "out", options=tuple(options))
    assert not list((tmp_path / "out").rglob("checkpoint_*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[align]", r"stages must map each stage's name to what it sets, not \['align'\]"),
        ("{}", "stages must map"),
        ("{align: 3}", r"stages\.align must be a mapping, not 3"),
        ("{a/b: {}}", "'a/b' cannot name a folder"),
        ("{1: {}}", "1 cannot name a folder"),
        ("{align: {modell: {}}}", r"stages\.align: unknown section 'modell'; did you mean 'model'"),
        (
            "{align: {run: {device: cuda}}}",
            r"stages\.align\.run\.device: all stages have one",
        ),
        ("{align: {model: {finetuned: a}}}", r"stages\.align\.model\.finetuned: all stages have"),
        ("{align: {run: fast}}", r"^stages\.align: .*run must be a mapping"),
    ],
)
def test_what_stages_may_be(home: Path, tmp_path: Path, given: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    text = (home / "run.yaml").read_text(encoding="utf-8")
    path.write_text(f"{text}\nstages: {given}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_stages(path)
    with pytest.raises(ConfigError, match=r"stages\.instuct: .* has no such stage; did you mean"):
        load_stages(home / "stages.yaml", ["stages.instuct.run.max_epoch=1"])


def test_an_empty_stage_is_the_rest_of_the_file(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = (home / "run.yaml").read_text(encoding="utf-8")
    path.write_text(
        f"{text}\nstages: {{once: null, again: {{run: {{seed: 7}}}}}}\n", encoding="utf-8"
    )
    once, again = load_stages(path).values()
    assert once.tree == load_config(home / "run.yaml").tree
    assert (once.run.seed, again.run.seed) == (42, 7)


# --- what reads the YAML of a run in stages -------------------------------------------------


def test_the_last_checkpoint_alone_answers(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    last = tmp_path / "last.pth"
    last.write_bytes((whole / "instruct" / "checkpoint_latest.pth").read_bytes())
    own = tmp_path / "config.yaml"
    own.write_bytes((whole / "instruct" / "config.yaml").read_bytes())
    answers = set()
    for path in (home / "stages.yaml", own):
        model, processors, _ = load_model_and_preprocess(
            "", is_eval=True, cfg_path=path, checkpoint=last
        )
        aligned = content(whole / "align" / "checkpoint_latest.pth")["model"]
        assert torch.equal(model.connector.weight, aligned["llm_proj.weight"])
        talk = Conversation(ChatEngine(model, processors["eval"]))
        talk.show(min((home / "image").rglob("*.png")))
        answers.add(talk.ask("What is it?").read())
        argv = [
            "evaluate.py",
            "--cfg-path",
            path,
            "--checkpoint",
            last,
            "--out",
            tmp_path / "scores",
        ]
        monkeypatch.setattr(sys, "argv", [*map(str, argv), "--limit", "1"])
        assert evaluate.main() == 0
        answers.add((tmp_path / "scores" / "test.jsonl").read_text(encoding="utf-8"))
    assert len(answers) == 2
    argv = ["", "--cfg-path", str(home / "stages.yaml"), "--options", "run.evaluate=true"]
    argv += ["run.test_splits=[test]", f"run.resume_ckpt_path={last}", f"run.output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    assert train.main() == 0
    (scored,) = tmp_path.glob("*/evaluation/test.jsonl")
    assert len(scored.read_text(encoding="utf-8").splitlines()) == 3


def test_the_plan_of_each_stage(home: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["", "--cfg-path", str(home / "stages.yaml"), "--plan", "24"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        assert train.main() == 0
    pages = capsys.readouterr().out.split("stage ")
    assert [page.partition("\n")[0] for page in pages] == ["", *STEPS]
    assert "8 samples" in pages[1]
    assert "12 samples" in pages[2]


def test_features_of_each_stage(home: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    cache = f"run.feature_cache={{enabled: true, dtype: fp32, dir: {tmp_path / 'features'}}}"
    command = ["", "--cfg-path", str(home / "stages.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        for more in (["--stage", "align"], [], []):
            patch.setattr(sys, "argv", [*command, *more, "--options", cache])
            assert cache_features.main() == 0
    lines = [line.partition(":")[0::2] for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [f"stage {s}" for s in ("align", *STEPS, *STEPS)]
    encoded = [int(rest.split()[2]) for _, rest in lines]
    assert encoded[0] > 0
    assert encoded[2] > 0
    assert encoded[1] == encoded[3] == encoded[4] == 0
    last = run(home, tmp_path / "out", options=(cache,))
    for step, numbers in losses(tmp_path / "out", "instruct").items():
        assert numbers == pytest.approx(losses(whole.parent, "instruct")[step], rel=1e-4)
    assert set(content(last)["model"]) == set(content(whole / "instruct" / last.name)["model"])


# --- stopped and gone on --------------------------------------------------------------------


def start(home: Path, output: Path, processes: int, *options: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launcher if processes > 1 else []), "train.py", "--cfg-path", home / "stages.yaml"]
    return subprocess.Popen(
        [sys.executable, *command, "--options", f"run.output_dir={output}", *options],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        out, _ = process.communicate(timeout=200)
    finally:
        kill(process)
    assert process.returncode == status, out[-4000:]
    return out


def wait_for(process: subprocess.Popen[str], output: Path, stage: str, steps: int) -> None:
    """Wait until some run has logged so many steps of a stage."""
    deadline = time.monotonic() + 100
    line = f'"step": {steps - 1}, '
    while not any(line in log.read_text() for log in output.glob(f"*/{stage}/log.txt")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 2)])
def test_killed_at_random_moments(home: Path, tmp_path: Path, processes: int, kills: int) -> None:
    """SIGKILL, and the same command again; in the end as if nothing had been."""
    long = ("run.max_epoch=5", "stages.instruct.run.batch_size_train=2")
    finish(start(home, tmp_path / "whole", processes, *long))
    (whole,) = (tmp_path / "whole").iterdir()
    total = {s: len(losses(tmp_path / "whole", s)) for s in STEPS}
    out, rng = tmp_path / "killed", random.Random(processes)
    moments = [total["align"], *rng.sample(range(2, sum(total.values()) - 6), kills - 1)]
    for moment in sorted(moments):  # one of them while a stage ends and the next one begins
        process = start(home, out, processes, *long, *AUTO)
        inside = moment <= total["align"]
        stage, steps = ("align", moment) if inside else ("instruct", moment - total["align"])
        wait_for(process, out, stage, steps)
        time.sleep(rng.random() * 0.2)
        kill(process)
    last = Path(finish(start(home, out, processes, *long, *AUTO)).splitlines()[-1])
    assert last.parent.name == "instruct"
    check_same(last, whole / "instruct" / last.name)
    for stage in STEPS:
        assert losses(out, stage) == losses(tmp_path / "whole", stage)
        assert len(losses(out, stage)) == total[stage]


def test_ctrl_c_names_a_command_that_goes_on(home: Path, whole: Path, tmp_path: Path) -> None:
    process = start(home, tmp_path, 1)
    wait_for(process, tmp_path, "instruct", 1)
    os.killpg(process.pid, signal.SIGINT)
    out = finish(process, 130)
    line = next(line for line in out.splitlines() if "resume with: " in line)
    words = shlex.split(line.partition("python train.py ")[2])
    job = Path(words[1]).parent
    assert words[3:] == [f"run.resume_ckpt_path={job}/instruct/checkpoint_latest.pth"]
    last = run(job / "config.yaml", tmp_path, options=tuple(words[3:]))
    assert last.parent.parent != job
    check_same(last, whole / "instruct" / last.name)


def test_a_stage_whose_answers_were_not_scored(home: Path, whole: Path, tmp_path: Path) -> None:
    """It was killed after its last step."""
    options = ("run.test_splits=[test]",)
    last = run(home, tmp_path, options=options)
    (job,) = tmp_path.iterdir()
    scores = job / "align" / "evaluation" / "scores.json"
    wanted = scores.read_text(encoding="utf-8")
    scores.unlink()
    for path in (job / "instruct").iterdir():
        if path.is_file():
            path.unlink()
    again = run(home, tmp_path, options=(*options, *AUTO))
    assert (again.parents[1] / scores.relative_to(job)).read_text(encoding="utf-8") == wanted
    check_equal(content(again)["model"], content(whole / "instruct" / last.name)["model"])
