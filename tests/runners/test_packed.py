"""Packed weights where all else is sharded: whole in every process, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.models.compute.quantized_linear import QuantizedLinear
from tests.processes import run
from tests.test_parts import make_home, prepare

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
LORA = "model.train={connector: 1e-2, language: {lora: {r: 4, dropout: 0, targets: all}, lr: 1e-2}}"
WAYS = [
    ["model.language.quantize=nf4", LORA],
    ["model.language.quantize=int8", "model.language.precision=bf16", "run.fsdp_cpu_offload=true"],
]


def test_two_processes_that_shard_are_one(tmp_path: Path) -> None:
    """Of 4-bit weights with adapters, and of 8-bit ones in a model of half precision."""
    home = make_home(tmp_path, "qwen3")
    common = ["model.language.path=" + str(home / "qwen3"), "run.max_epoch=1", "run.num_workers=0"]
    sharded = ["run.strategy=fsdp2", "run.batch_size_train=2"]
    runs = [
        [*common, *way, *sharded, f"run.output_dir={tmp_path / str(i)}"]
        for i, way in enumerate(WAYS)
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    worker = [tmp_path / "runs.json", home / "run.yaml"]
    done = run(tmp_path, "tests.runners.worker", worker, processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    for path, way in zip(done.stdout.splitlines(), WAYS, strict=True):
        alone = prepare(home, *common, *[o for o in way if "fsdp" not in o], job=way[0])
        assert any(isinstance(m, QuantizedLinear) for m in alone.model.language.modules())
        before = {n: p.clone() for n, p in alone.model.trainable_parameters().items()}
        wanted = trained(alone.train())
        got = trained(Path(path))
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
        after = alone.model.trainable_parameters()
        assert all(float((after[n] - p).abs().max()) > 1e-3 for n, p in before.items())


def test_zero_3_refuses_them(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    home = make_home(tmp_path, "qwen3")
    stage = "run.deepspeed_config={zero_optimization: {stage: 3}}"
    chosen = [f"model.language.path={home / 'qwen3'}", "model.language.quantize=int8", stage]
    command = ["--use-deepspeed", "--cfg-path", home / "run.yaml", "--options", *chosen]
    done = run(tmp_path, "train", command)
    told = "model.language.quantize: ZeRO stage 3 takes no packed weights; train with run.strategy"
    assert done.returncode == 2
    assert told in done.stderr


def trained(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)["model"]
    return state
