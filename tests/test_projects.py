"""The YAML files that ship: all load, and the original's recipes train."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.toybox.world.__main__ import write_split
from lavis.common.config import load_config
from lavis.common.registry import RUNNERS, TASKS
from tests.conftest import REPO
from tests.processes import run
from tests.test_parts import model_yaml

PROJECTS = REPO / "lavis" / "projects"
FILES = [str(p.relative_to(PROJECTS)) for p in sorted(PROJECTS.rglob("*.yaml"))]
RECIPES = ["instruction_tuning/train.yaml", "instruction_tuning/train_3090x4.yaml"]
NF4 = "instruction_tuning/train_14b_nf4.yaml"
QLORA = "model.train={connector: 1e-4, language: {lr: 1e-4, lora: {r: 16, targets: all}}}"
ZERO = [f"deepspeed/train_zero{stage}_3090x4.yaml" for stage in range(3)]
SAMPLES = 24  # of each of two data sets: two or three steps


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_split(folder, "test", SAMPLES, seed=0)  # short conversations
    return folder


ORIGINAL = [
    "model.model_type=toybox", "model.pretrained=examples/toybox/blip2.pth",
    "model.llm_model=examples/toybox/llm", "model.image_size=84", "model.num_query_token=9",
]  # fmt: skip
PARTS = [f"model.vision.{k}={v}" for k, v in model_yaml(Path())["model"]["vision"].items()]
PARTS += ["model.language.path=examples/toybox/llm", "model.language.precision=fp32"]


def in_small(pictures: Path, output: Path, model: list[str] = ORIGINAL) -> list[str]:
    """What makes a recipe of the real model one of the toybox: paths, sizes, device, length."""
    options = [
        f"env.cache_root={REPO}",
        *model,
        f"run.output_dir={output}",
        "run.device=cpu",
        "run.max_epoch=1",
        "run.log_freq=1",
    ]
    for name in ("minigpt4_instruction", "llava_instruction"):
        block = f"datasets.{name}"
        options += [
            f"{block}.build_info.annotations.train.storage={pictures / 'test.json'}",
            f"{block}.build_info.images.storage={pictures / 'image'}",
            f"{block}.vis_processor.train.image_size=84",
        ]
    return options


def check(checkpoint: Path, samples_per_step: int) -> None:
    """It has trained the projection alone, as the recipe says: its step, its warm-up."""
    content = torch.load(checkpoint, weights_only=True)
    lines = map(json.loads, (checkpoint.parent / "log.txt").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert content["progress"]["samples_per_step"] == samples_per_step
    assert content["progress"]["step"] == len(steps) == math.ceil(2 * SAMPLES / samples_per_step)
    assert [s["lr"] for s in steps] == pytest.approx([i * 1e-4 / 500 for i in range(len(steps))])
    assert all(0 < s["loss"] < 10 and s["grad_norm"] > 0 for s in steps)
    assert set(content["model"]) == {"llm_proj.weight", "llm_proj.bias"}
    assert all(s["exp_avg"].any() for s in content["optimizer"]["state"].values())


@pytest.mark.parametrize("name", FILES)
def test_every_project_loads(name: str) -> None:
    config = load_config(PROJECTS / name)
    assert config.datasets
    for registry, chosen in ((TASKS, config.run.task), (RUNNERS, config.run.runner)):
        registry.check(chosen)
    # A row of one short sample leaves a card idle; the toybox's models are small enough for any.
    assert config.run.max_tokens_per_batch or name.startswith("toybox/")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, pictures: Path, tmp_path: Path) -> None:
    config: Any = load_config(PROJECTS / name, in_small(pictures, tmp_path))
    check(train(config), config.run.batch_size_train * config.run.accum_grad_iters)


def test_packed_weights_train_as_their_recipe_says(pictures: Path, tmp_path: Path) -> None:
    """Its line for adapters, too, of which the file holds nothing but what learns."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    small = in_small(pictures, tmp_path, PARTS)
    config: Any = load_config(PROJECTS / NF4, small)
    assert config.model.language.quantize == "nf4"
    check(train(config), config.run.batch_size_train * config.run.accum_grad_iters)
    line = QLORA.removeprefix("model.").replace("=", ": ", 1)
    assert f"#   {line}\n" in (PROJECTS / NF4).read_text(encoding="utf-8")
    adapted = load_config(PROJECTS / NF4, [*small, QLORA])
    state = torch.load(train(adapted), weights_only=True)["model"]
    assert {n.rpartition(".lora_")[0].rpartition(".")[2] for n in state if "lora_" in n} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {n for n in state if "lora_" not in n} == {"llm_proj.weight", "llm_proj.bias"}


def train(config: Any) -> Path:
    task = TASKS.get(config.run.task)(config)
    task.check_paths()
    dataset = task.build_datasets()
    torch.manual_seed(config.run.seed)
    model = task.build_model(torch.device("cpu"), dataset)
    checkpoint: Path = RUNNERS.get(config.run.runner)(config, task, model, dataset, "job").train()
    return checkpoint


@pytest.mark.parametrize("name", ZERO)
def test_a_zero_recipe_trains(name: str, pictures: Path, tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed changes much of the one that imports it."""
    pytest.importorskip("deepspeed")
    command = ["--cfg-path", PROJECTS / name, "--options", *in_small(pictures, tmp_path)]
    done = run(tmp_path, "train", command)
    assert done.returncode == 0, done.stderr[-4000:]
    checkpoint = Path(done.stdout.splitlines()[-1])
    assert checkpoint.name == "checkpoint_latest.pth"
    check(checkpoint, 32)
