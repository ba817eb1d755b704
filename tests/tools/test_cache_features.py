"""The toybox trained and scored through the feature cache, and everything that may happen to it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
from examples.toybox.world.__main__ import write_split
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError, LavisError
from lavis.common.registry import RUNNERS, TASKS
from lavis.common.types import Spans
from lavis.datasets import feature_store
from lavis.datasets.feature_cache import Counts
from lavis.models.build import Assembly
from lavis.models.vision.eva_qformer import EvaQFormer
from lavis.tasks.data import RunData
from lavis.tools import cache_features
from tests.conftest import REPO, TOY
from tests.processes import run
from tests.runners.worker import PROJECT, options
from tests.tools import features_worker

COUNT = 40  # training images
RANDOM = "preprocess.vis_processor.train={name: blip2_image_train, image_size: 84, min_scale: 0.5}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and every fifth conversation without one."""
    out = tmp_path_factory.mktemp("data")
    for split, count in (("train", COUNT * 5 // 4), ("val", 5), ("test", 18)):
        write_split(out, split, count, seed=3)
    records = json.loads((out / "train.json").read_text(encoding="utf-8"))
    for record in records[::5]:
        del record["image"]
        for key, value in list(record.items()):
            text = json.dumps(value, ensure_ascii=False)
            record[key] = json.loads(text.replace("<Img><ImageHere></Img> ", ""))
    assert len({r["image"] for r in records if "image" in r}) == COUNT
    (out / "train.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return out


def cached(folder: Path, **settings: Any) -> str:
    section = {"enabled": True, "dtype": "fp32", "dir": str(folder)} | settings
    return f"run.feature_cache={json.dumps(section)}"


def build_task(data: Path, *more: str) -> Any:
    config = load_config(PROJECT, [*options(data), "run.batch_size_train=8", *more])
    task = TASKS.get(config.run.task)(config)
    task.check_paths()
    return task


def fill(data: Path, *more: str) -> Counts:
    """Cache the training split alone; no language model is loaded."""
    task = build_task(data, *more)
    data_of_run = RunData([task.build_split("train", train=True)], {})
    return task.cache_features(data_of_run, torch.device("cpu"))


def train(data: Path, out: Path, *more: str) -> Any:
    """Like ``train.py``. Returns the runner."""
    task = build_task(data, f"run.output_dir={out}", *more)
    dataset = task.build_datasets()
    torch.manual_seed(task.config.run.seed)
    model = task.build_model(torch.device("cpu"), dataset)
    runner = RUNNERS.get(task.config.run.runner)(task.config, task, model, dataset, "job")
    runner.train()
    return runner


def lines(runner: Any) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (runner.folder / "log.txt").read_text().splitlines()]


def losses(runner: Any) -> list[float]:
    return [r["loss"] for r in lines(runner) if "loss" in r]


def weights(runner: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in runner.model.trainable_parameters().values()])


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the vision side is loaded")

    monkeypatch.setattr(Assembly, "build_vision", refuse)
    monkeypatch.setattr(EvaQFormer, "forward", refuse)


def test_training_and_scores_are_those_of_pixels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, projector, validation and answers; then again, with nothing to encode."""
    scored = ["run.valid_splits=[val]", "run.test_splits=[test]"]
    pixels = train(data, tmp_path / "pixels", *scored)
    runs = [(train(data, tmp_path / "fp32", *scored, cached(tmp_path / "f")), 1e-5)]
    half = cached(tmp_path / "f", dtype="fp16")
    runs.append((train(data, tmp_path / "fp16", *scored, half), 1e-3))
    no_encoding(monkeypatch)
    runs.append((train(data, tmp_path / "again", *scored, cached(tmp_path / "f")), 1e-5))
    for runner, tolerance in runs:
        assert losses(runner) == pytest.approx(losses(pixels), abs=tolerance)
        assert (weights(runner) - weights(pixels)).abs().max() <= tolerance
        valid = [[r["valid_loss"] for r in lines(x) if "valid_loss" in r] for x in (runner, pixels)]
        assert valid[0] == pytest.approx(valid[1], abs=tolerance) and valid[0]
        answers = [
            [json.loads(a)["answer"] for a in (x.folder / "evaluation" / "test.jsonl").open()]
            for x in (runner, pixels)
        ]
        assert tolerance > 1e-5 or answers[0] == answers[1]
        assert runner.model.vision is None
        names = {n.split(".")[0] for n, _ in runner.model.named_parameters()}
        assert names == {"connector", "language"}
        assert [r["images"] for r in lines(runner) if "images" in r] == [
            r["images"] for r in lines(pixels) if "images" in r
        ]
    saved = torch.load(runs[0][0].folder / "checkpoint_latest.pth", weights_only=True)
    pixels.model.load_checkpoint(runs[0][0].folder / "checkpoint_latest.pth")
    assert set(saved["model"]) == {"llm_proj.weight", "llm_proj.bias"}


def test_shipped_scores_through_the_cache(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """evaluate.py's part: answers of the shipped projection, with and without, in fp16."""
    for name, more in (("pixels", []), ("cache", [cached(tmp_path / "f", dtype="fp16")])):
        arguments = ["--cfg-path", str(PROJECT), "--splits", "test", "--limit", "12"]
        arguments += ["--checkpoint", str(REPO / "examples" / "toybox" / "checkpoint.pth")]
        arguments += ["--baselines", "--out", str(tmp_path / name)]
        settings = [*options(data), "run.batch_size_train=8", "run.device=cpu", *more]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--options", *settings])
        assert evaluate.main() == 0
    for file in ("test.jsonl", "scores.json"):
        assert (tmp_path / "cache" / file).read_text() == (tmp_path / "pixels" / file).read_text()


def test_whatever_changes_features_makes_new_ones(data: Path, tmp_path: Path) -> None:
    world = tmp_path / "world"
    shutil.copytree(data, world)
    cache = cached(tmp_path / "f")
    everything, nothing = Counts(0, COUNT, 0), Counts(COUNT, 0, 0)
    assert fill(world, cache) == everything
    assert fill(world, cache) == nothing
    vit = tmp_path / "vit.pth"
    shutil.copyfile(REPO / "examples" / "toybox" / "eva_vit_g.pth", vit)
    moved = f"model.vit_weights={vit}"
    assert fill(world, cache, moved, "run.seed=7", "model.max_txt_len=400") == nothing  # content
    content = torch.load(vit, weights_only=True)
    content["pos_embed"] += 1e-3
    torch.save(content, vit)
    assert fill(world, cache, moved) == everything
    assert fill(world, cache, "run.amp=true", "run.autocast_dtype=bf16") == everything
    assert fill(world, cached(tmp_path / "f", dtype="bf16")) == everything
    assert fill(world, cached(tmp_path / "f", views=3)) == nothing  # deterministic: one is all
    eval_mean = "preprocess.vis_processor.train={name: blip_image_eval, image_size: 84, mean: [0.5, 0.5, 0.5]}"  # noqa: E501
    assert fill(world, cache, eval_mean) == everything
    assert fill(world, cache, RANDOM) == everything
    assert fill(world, cached(tmp_path / "f", views=3), RANDOM) == Counts(COUNT, 2 * COUNT, 0)
    assert fill(world, cache, RANDOM, "run.seed=7") == everything
    records = json.loads((world / "train.json").read_text(encoding="utf-8"))
    image = next(r["image"] for r in records if "image" in r)
    Image.new("RGB", (84, 84), "red").save(world / "image" / image)
    assert fill(world, cache) == Counts(COUNT - 1, 1, 0)
    assert fill(world, cache) == nothing


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_damage_is_found_and_mended_before_training(data: Path, tmp_path: Path) -> None:
    cache = cached(tmp_path / "f")
    whole = train(data, tmp_path / "whole", cache)
    (shard,) = shards(tmp_path / "f")
    content = load_file(shard)
    assert len(content["keys"]) == COUNT
    content["features"].view(torch.uint8)[3, 1, 2] ^= 64
    feature_store._mapped.cache_clear()
    save_file(content, shard)
    again = train(data, tmp_path / "again", cache)
    assert torch.equal(weights(again), weights(whole))  # to the bit, whatever it is encoded with
    assert [len(load_file(s)["keys"]) for s in shards(tmp_path / "f") if s != shard] == [1]
    assert fill(data, cache) == Counts(COUNT, 0, 0)
    feature_store._mapped.cache_clear()
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    assert fill(data, cache) == Counts(1, COUNT - 1, 0)  # the mended one is in its own shard


def tool(data: Path, logs: Path, *more: str, processes: int = 1, kill_after: int = 0) -> Any:
    """Run the command in processes of its own; optionally SIGKILL it after some records."""
    command = ["--cfg-path", PROJECT, "--splits", "train", "--options", *options(data), *more]
    kill = {"TEST_KILL_AFTER": str(kill_after)}
    return run(logs, features_worker.__name__, command, processes, **kill)


def test_killed_and_started_again(data: Path, tmp_path: Path) -> None:
    killed = tool(data, tmp_path, cached(tmp_path / "f"), kill_after=21)
    assert killed.returncode == -signal.SIGKILL
    assert fill(data, cached(tmp_path / "f")) == Counts(21, COUNT - 21, 0)


def test_two_processes_share_the_work(data: Path, tmp_path: Path) -> None:
    done = tool(data, tmp_path, cached(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"0 found, {COUNT} encoded, 0 failed: {tmp_path / 'two'}"]
    one, other = shards(tmp_path / "two")
    assert len(load_file(one)["keys"]) == len(load_file(other)["keys"])
    assert fill(data, cached(tmp_path / "two")) == Counts(COUNT, 0, 0)
    assert fill(data, cached(tmp_path / "one")) == Counts(0, COUNT, 0)
    alone, both = (
        torch.cat([torch.cat([x.flatten(1).view(torch.uint8) for x in load_file(p).values()], 1)
                   for p in shards(tmp_path / name)])
        for name in ("one", "two")
    )  # fmt: skip
    assert set(map(tuple, alone.tolist())) == set(map(tuple, both.tolist()))  # to the bit


def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    """The cache is filled by both; one of them has text-only batches."""
    plan, out = tmp_path / "runs.json", tmp_path / "two"
    two = ["run.batch_size_train=1", "run.accum_grad_iters=4", cached(tmp_path / "f")]
    scored = ["run.valid_splits=[val]", "run.test_splits=[test]"]
    strategies = [["run.strategy=ddp"], ["run.strategy=fsdp2"]]
    if importlib.util.find_spec("deepspeed") is not None:
        section = "{zero_optimization: {stage: 3}}"
        strategies.append(["run.strategy=deepspeed", f"run.deepspeed_config={section}"])
    runs = [[*options(data), *two, *scored, *s, f"run.output_dir={out}"] for s in strategies]
    runs.append([*runs[0][:-1], "run.evaluate=true", f"run.output_dir={tmp_path / 'scores'}"])
    plan.write_text(json.dumps(runs), encoding="utf-8")
    done = run(tmp_path, "tests.runners.worker", [plan], processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(list(tmp_path.glob("scores/*/evaluation/scores.json"))) == 1
    assert len(list(out.iterdir())) == len(strategies)
    alone = train(data, tmp_path / "one")
    for job in out.iterdir():
        logged = [json.loads(x) for x in (job / "log.txt").read_text().splitlines()]
        curve = [r["loss"] for r in logged if "loss" in r]
        assert curve == pytest.approx(losses(alone), abs=1e-5)


def test_text_alone_touches_the_projection_alone() -> None:
    from lavis.models.build import MiniGPT4Qwen

    config = load_config(PROJECT, [f"env.cache_root={REPO}"])
    model: Any = MiniGPT4Qwen.from_config(config.model, cache_root=str(REPO), vision=False)
    assert model.encode_spans(Spans()) is None
    model.uniform_graph = True
    spans = model.encode_spans(Spans())
    assert spans.shape == (0, 9, model.connector.out_features)
    spans.sum().backward()
    assert model.connector.weight.grad.abs().max() == 0
    assert model.training_flops(10, 1) > model.training_flops(10, 0) > 0
    blocks = list(model.shardable_blocks())
    assert len(blocks) == len(model.language.model.model.layers) + 2  # embeddings and head
    with pytest.raises(ConfigError, match="built without its vision side"):
        model.encode_spans(Spans(torch.zeros(1, 3, 84, 84)))


def test_views_take_turns_and_a_resumed_run_sees_the_same(data: Path, tmp_path: Path) -> None:
    more = [cached(tmp_path / "f", views=2), RANDOM, "run.max_epoch=3"]
    whole = train(data, tmp_path / "whole", *more)
    samples = [whole.dataset[epoch, 1].spans.features for epoch in range(4)]
    assert len(samples[0]) == 1
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)
    assert torch.equal(samples[0], samples[2]) and torch.equal(samples[1], samples[3])
    checkpoint = whole.folder / "checkpoint_0.pth"
    rest = train(data, tmp_path / "rest", *more, f"run.resume_ckpt_path={checkpoint}")
    assert torch.equal(weights(rest), weights(whole))


@pytest.fixture()
def broken(data: Path, tmp_path: Path) -> tuple[Path, str]:
    """A world with a picture that is none, and the id of its record."""
    world = tmp_path / "world"
    shutil.copytree(data, world)
    records = json.loads((world / "train.json").read_text(encoding="utf-8"))
    bad = next(r for r in records if "image" in r)
    (world / "image" / bad["image"]).write_bytes(b"hello")
    return world, str(bad["id"])


def test_a_corrupt_image_is_named_before_training(broken: tuple[Path, str], tmp_path: Path) -> None:
    world, name = broken
    with pytest.raises(DataError, match="is not an image that can be read") as caught:
        train(world, tmp_path / "out", cached(tmp_path / "f"))
    assert name in str(caught.value) and not (tmp_path / "out" / "job").exists()


def test_a_corrupt_image_is_left_out(
    broken: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, name = broken
    skip = "run.on_bad_sample=skip"
    runner = train(world, tmp_path / "out", cached(tmp_path / "f"), skip)
    pixels = train(world, tmp_path / "pixels", skip)
    assert losses(runner) == pytest.approx(losses(pixels), abs=1e-5)
    assert name in caplog.text
    assert fill(world, cached(tmp_path / "f"), skip) == Counts(COUNT - 1, 0, 1)


def test_a_copy_of_a_corrupt_image_is_left_out_too(
    broken: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, name = broken
    records = json.loads((world / "train.json").read_text(encoding="utf-8"))
    copy = [r for r in records if "image" in r][7]
    (world / "image" / copy["image"]).write_bytes(b"hello")
    task = build_task(world, cached(tmp_path / "f"), "run.on_bad_sample=skip")
    (part,) = task.build_split("train", train=True)
    assert task.cache_features(RunData([[part]], {}), torch.device("cpu")) == Counts(
        0, COUNT - 2, 2
    )
    assert name in caplog.text and str(copy["id"]) in caplog.text
    bad = [part[0, i] for i, r in enumerate(records) if str(r["id"]) in (name, str(copy["id"]))]
    assert all("is not an image that can be read" in sample.reason for sample in bad)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.freeze_vit=false", r"the vision side is trained \(freeze_vit: false\)"),
        ("model.freeze_qformer=false", r"trained \(freeze_qformer: false\)"),
        ("model.from_scratch=[vit]", "vit would start from random weights"),
        ("model.load_pretrained=false", "qformer would start from random weights"),
    ],
)
def test_features_that_do_not_stay_are_refused(
    data: Path, tmp_path: Path, option: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(data, cached(tmp_path / "f"), option)


def test_a_finetuned_vision_side_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.pth"
    torch.save({"model": {"Qformer.bert.x": torch.zeros(1)}}, path)
    tuned = ["model.load_finetuned=true", f"model.finetuned={path}"]
    with pytest.raises(ConfigError, match=r"holds Qformer\.bert\.x"):
        build_task(data, cached(tmp_path / "f"), *tuned)


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LavisError, match=r"run\.feature_cache\.dir"):
        build_task(data, cached(tmp_path / "file" / "f"))


def test_a_disk_without_room(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused before the encoder is loaded; what it would take is said, and can be asked."""
    caplog.set_level("INFO")
    needed = COUNT * (9 * 128 * 4 + 40)
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, free[0]))
    with monkeypatch.context() as patched:
        no_encoding(patched)
        with pytest.raises(ConfigError, match=rf"{COUNT} views of images take .*fewer views"):
            fill(data, cached(tmp_path / "f"))
        free[0] = needed
        argv = ["cache_features", "--cfg-path", str(PROJECT), "--estimate", "--splits", "train"]
        argv += ["--options", *options(data), cached(tmp_path / "f")]
        patched.setattr("sys.argv", argv)
        assert cache_features.main() == 0
    assert f"0 of {COUNT} views are there; the others take {needed / 1e9:.2f} GB" in caplog.text
    assert not (tmp_path / "f").exists()
    assert fill(data, cached(tmp_path / "f")) == Counts(0, COUNT, 0)


def test_the_folder(tmp_path: Path) -> None:
    def folder(*options: str) -> Path:
        config = load_config(PROJECT, [f"env.cache_root={tmp_path}", *options])
        return config.run.feature_cache.folder(config.env.cache_root)

    assert folder("run.feature_cache.dir=a/b") == tmp_path / "a" / "b"
    assert folder() == Path(os.environ["XDG_CACHE_HOME"]) / "lavis" / "features"
    with pytest.raises(ConfigError, match=r"run\.feature_cache\.views must be at least 1"):
        load_config(PROJECT, ["run.feature_cache.views=0"])


def test_the_cache_serves_other_language_models(data: Path, tmp_path: Path) -> None:
    assert fill(data, cached(tmp_path / "f")) == Counts(0, COUNT, 0)
    vocabulary = TOY / "cache" / "ckpt" / "Qwen7B-chat"
    other = [f"model.llm_model={vocabulary}", "model.llm_precision=fp32"]
    assert fill(data, cached(tmp_path / "f"), *other) == Counts(COUNT, 0, 0)
