"""A model that is built in slices is the one that is built whole; real sizes fit real cards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from examples.toybox.world.__main__ import write_split
from lavis.common import dist
from lavis.common.config import load_config
from lavis.common.errors import ConfigError
from lavis.common.registry import TASKS
from lavis.common.schema import RunConfig
from lavis.models.weights.files import set_final_dtype
from lavis.models.weights.slices import own_rows, take_out
from lavis.runners.strategy import FSDP2Strategy
from tests.conftest import REPO
from tests.processes import run
from tests.runners.worker import PROJECT, options
from tests.test_parts import model_yaml, save_language


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    for split in ("train", "val", "test"):
        write_split(out, split, 4, seed=11)
    return out


def train_twice(output: Path, cfg_path: Path, *chosen: str) -> tuple[int, int]:
    """How many weights there are and how many have moved, the same ones on both ways."""
    done = run(output, "tests.runners.sharded_worker", [output, cfg_path, *chosen], processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    counts = re.search(r"same: (\d+) moved: (\d+)", done.stdout)
    assert counts is not None
    return int(counts[1]), int(counts[2])


SHORT = [
    "run.strategy=fsdp2", "run.max_epoch=1", "run.warmup_steps=0", "run.batch_size_train=1",
    "run.valid_splits=[]", "run.test_splits=[]",
]  # fmt: skip


def test_the_original_in_slices(data: Path, tmp_path: Path) -> None:
    """Also what is stored in another type than it is trained in."""
    settings = {o.partition("=")[0]: o for o in [*options(data), *SHORT]}
    settings["llm"] = "model.llm_precision=bf16"
    total, moved = train_twice(tmp_path, PROJECT, *settings.values())
    assert total > 100
    assert moved == 2  # the projection


def test_a_folder_of_transformers_in_slices(data: Path, tmp_path: Path) -> None:
    """All of it learns: in fp32, stored in bf16, with embeddings that are the head, too."""
    language = save_language(
        tmp_path / "llm", "qwen3", "qwen3", hidden_size=48, tie_word_embeddings=True, stored="bf16"
    )
    info = {
        "annotations": {"train": {"storage": str(data / "train.json")}},
        "images": {"storage": str(data / "image")},
    }
    content: dict[str, Any] = model_yaml(language) | {
        "env": {"cache_root": str(REPO)},
        "datasets": {"toybox": {"builder": "instruction", "build_info": info}},
        "run": {"device": "cpu", "init_lr": 1e-3, "lr_sched": "linear_warmup_cosine_lr"},
    }
    content["model"]["language"]["precision"] = "fp32"
    content["model"]["train"] = {"connector": 1e-3, "language": 1e-4}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    total, moved = train_twice(tmp_path, path, *SHORT, "run.amp=true", "run.autocast_dtype=bf16")
    assert moved > 20  # embeddings and head, by both names, layers, norms, connector
    assert total > moved


@pytest.mark.parametrize(("rows", "processes"), [(1, 3), (4, 2), (5, 2), (5, 4), (0, 2)])
def test_rows_of_each_process(rows: int, processes: int) -> None:
    """As PyTorch's ``Shard(0)`` cuts them: of five rows for four, 2, 2, 1 and none."""
    tensor = torch.arange(2 * rows).view(rows, 2)
    each = -(-rows // processes)
    for rank in range(processes):
        wanted = tensor[rank * each : (rank + 1) * each]
        assert torch.equal(own_rows(tensor, rank, processes), wanted)


def test_what_is_taken_out_stays_tied_and_frozen() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    set_final_dtype([model[2].weight], torch.bfloat16)
    before = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    held = take_out(model)
    assert {n: t.data_ptr() for n, t in held.items()} == {
        n: t.data_ptr() for n, t in before.items()
    }
    assert model[1].weight is model[0].weight
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"2.weight"}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [p.dtype for p in model.parameters()] == [torch.float32, torch.bfloat16, torch.float32]


def test_what_is_tied_is_one_slice() -> None:
    """Else two copies of it would learn apart."""
    model: Any = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    wanted = model[0].weight.detach().clone()
    with dist.process_group("cpu", always=True):
        FSDP2Strategy(RunConfig(), torch.device("cpu")).wrap(model)
        assert model[1].weight is model[0].weight
        assert torch.equal(model[0].weight.full_tensor(), wanted)


def test_memory_that_steps_need_beside_activations() -> None:
    """Of what is gathered: the rest of the model and two blocks; of what learns, three copies."""
    model: Any = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 20), nn.Linear(20, 1))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model.shardable_blocks = lambda: model[:2]
    strategy = FSDP2Strategy(RunConfig(amp=True, autocast_dtype="bf16"), torch.device("cpu"))
    groups = [{"params": list(model[2].parameters())}]
    with dist.process_group("cpu", always=True):
        strategy.setup(model, groups)
        blocks, learns = 2 * (2 * (10 * 20 + 20)), 21
        assert strategy.reserved() == blocks + learns * (2 * 2 + 4) + 3 * 4 * learns
        strategy.run = RunConfig(fsdp_cpu_offload=True)
        assert strategy.reserved() == blocks + learns * (2 * 2 + 4)


def test_a_language_model_spread_for_chat_is_not_trained() -> None:
    config: Any = load_config(PROJECT, ["model.llm_device_map=auto"])
    with pytest.raises(ConfigError, match=r"^model.llm_device_map is auto.*run.strategy: fsdp2"):
        TASKS.get(config.run.task)(config).check_paths()
