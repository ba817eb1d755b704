"""What a run is said to need is what it takes, by the record of a CPU's allocator."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from lavis.common.config import load_config
from lavis.common.errors import ConfigError, WeightsError
from lavis.common.registry import MODELS
from lavis.common.schema import Config
from lavis.common.types import Batch
from lavis.models.compute import head
from lavis.models.compute.schedule import StepSchedule
from lavis.models.vlm import VLM
from lavis.runners.estimate import Estimator
from lavis.runners.plan_page import card, plan_chat, plan_run
from lavis.runners.sharing import Sharing
from lavis.runners.strategy import FSDP2Strategy
from tests.conftest import REPO

PROJECT = REPO / "lavis" / "projects" / "toybox" / "train.yaml"
BENCH = [
    f"env.cache_root={REPO}", "model.from_scratch=[vit,qformer,llm]", "model.llm_precision=fp32",
    "model.llm_config={hidden_size: 256, intermediate_size: 1408, num_hidden_layers: 2, "
    "num_attention_heads: 4}", "run.amp=false", "model.vit_config.depth=2",
    "model.qformer_config.num_hidden_layers=2",
]  # fmt: skip
SETTINGS = {
    "connector": [],
    "every layer again": ["run.recompute=all"],
    "every second layer again": ["run.recompute=2"],
    "logits at once": ["run.supervised_head=false"],
    "adapters": ["model.get_lora=true", "model.lora_r=16"],
    "everything": ["model.freeze_llm=false"],
    "vision": ["model.freeze_vit=false", "model.vit_precision=fp32", "model.freeze_qformer=false"],
    "autocast": ["model.freeze_llm=false", "run.amp=true", "run.autocast_dtype=bf16"],
    "features": ["run.feature_cache.enabled=true"],
}


def config_of(*options: str) -> Config:
    return load_config(PROJECT, [*BENCH, *options])


def measured(config: Config, batch: Batch, schedule: StepSchedule) -> int:
    """The most bytes that a second micro-batch takes at once, by the allocator's own record."""
    model: VLM = MODELS.get(config.model.arch).from_config(
        config.model, cache_root=str(REPO), vision=not config.run.feature_cache.enabled
    )
    model.train().set_schedule(schedule)
    for parameter in model.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.run.amp)
    with autocast, contextlib.ExitStack() as stack:
        model.constant_prefix()
        recorder = stack.enter_context(
            profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        )
        model(batch).loss_sum.backward()
    return recorded_peak(recorder)


def recorded_peak(recorder: profile) -> int:
    events: Any = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.fixture()
def four_cards() -> Iterator[None]:
    """A group whose other three processes are not there: what they would send has no numbers."""
    torch.distributed.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("four_cards")
@pytest.mark.parametrize("learns", ["connector", "everything"])
def test_one_of_four_never_holds_more_than_its_slices(learns: str) -> None:
    """Nor gathers a block more than twice a micro-batch, or adds up a gradient that none needs."""
    config = config_of("run.strategy=fsdp2", *SETTINGS[learns])
    model: VLM = MODELS.get(config.model.arch).from_config(config.model, cache_root=str(REPO))
    made = Estimator(config, Sharing.fsdp2(4))
    batch, blocks = made.batch(3), list(model.shardable_blocks())
    learning = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    strategy = FSDP2Strategy(config.run, torch.device("cpu"))
    groups = [{"params": list(model.trainable_parameters().values())}]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        strategy.setup(model, groups)
    slices = made.held.frozen + made.held.trained
    assert slices <= recorded_peak(recorder) <= 1.02 * slices
    model.train()
    counts = []
    for _ in range(2):
        with CommDebugMode() as sent, strategy.micro_batch(last=False):
            strategy.backward(strategy.module(batch).loss_sum)
        counts.append(Counter({op.__name__: n for op, n in sent.get_comm_counts().items()}))
    assert counts[1]["_allgather_base_"] <= 2 * (len(blocks) + 1)  # the rest of the model is one
    assert counts[1]["_reduce_scatter_base_"] == sum(learning) + 1
    assert counts[1].total() == sum(
        counts[1][k] for k in ("_allgather_base_", "_reduce_scatter_base_")
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_row_takes_what_is_said(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows that were tried, a third follows."""
    monkeypatch.setattr(head, "_CACHED_ROWS", 2**20)  # a card takes all rows of a piece at once
    config = config_of(*SETTINGS[setting])
    made = Estimator(config, Sharing("single", 1))
    schedule, documents = made.schedule(float("inf")), 20
    batch = made.batch(documents)
    said = made.micro_batch(documents * made.length, schedule).peak
    taken = measured(config, batch, schedule)
    assert said == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_packed_weights_take_what_is_said(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CACHED_ROWS", 2**20)
    content = yaml.safe_load(PROJECT.with_name("smollm2.yaml").read_text())
    content["model"]["language"] = {
        "name": "qwen1", "path": "examples/toybox/llm", "precision": "fp32", "quantize": kind,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    config = load_config(path, [f"env.cache_root={REPO}", "run.feature_cache.enabled=false"])
    made = Estimator(config, Sharing("single", 1))
    model = MODELS.get(config.model.arch).from_config(config.model, cache_root=str(REPO))
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert made.weights == pytest.approx(weights, rel=0.01)
    schedule, documents = made.schedule(float("inf")), 20
    said = made.micro_batch(documents * made.length, schedule).peak
    assert said == pytest.approx(measured(config, made.batch(documents), schedule), rel=0.1)


def test_slices_are_shared_and_blocks_are_whole() -> None:
    config = config_of("model.freeze_llm=false", "run.amp=true", "run.autocast_dtype=bf16")
    alone = Estimator(config, Sharing("single", 1)).held
    made = Estimator(config, Sharing.fsdp2(4))
    assert made.held[:4] == tuple(x / 4 for x in alone[:4])
    assert alone.gradients == alone.trained == alone.moments / 2
    assert alone.gathered == 0
    blocks = [sum(p.numel() for p in b.parameters()) for b in made.model.shardable_blocks()]
    rest = sum(p.numel() for p in made.model.parameters()) - sum(blocks)
    assert made.held.gathered == 2 * (rest + 2 * max(blocks))  # bytes of bf16
    offloaded = Sharing.fsdp2(4, offload=True)
    assert (offloaded.share(True), offloaded.share(False)) == (0, 1)
    assert {b.weight.dtype for b in made.model.language.modules() if hasattr(b, "weight")} == {
        torch.bfloat16,
        torch.float32,  # the last norm, which is in no block
    }


@pytest.mark.parametrize(
    ("stage", "shared"), [(0, (0, 0, 0)), (1, (0, 0, 1)), (2, (0, 1, 1)), (3, (1, 1, 1))]
)
def test_what_zero_shares(stage: int, shared: tuple[int, ...]) -> None:
    pytest.importorskip("deepspeed")
    section = f"{{zero_optimization: {{stage: {stage}}}, bf16: {{enabled: true}}}}"
    config = config_of("run.strategy=deepspeed", f"run.deepspeed_config={section}")
    found = Sharing.of(config, 2)
    assert (found.weights, found.gradients, found.moments) == tuple(map(bool, shared))
    assert found.master


def test_the_longest_row_is_the_last_that_fits() -> None:
    made = Estimator(config_of(), Sharing("single", 1))
    plain = StepSchedule()
    memory = made.needed(6400, plain)
    assert made.longest(plain, memory) == 6400
    assert made.longest(plain, memory - 1) == 6400 - 64
    assert made.longest(plain, made.held.total) == 0


ADAPTED = {
    "frozen": [],
    "adapters": ["lora_r=16", "lora_dropout=0.0"],
    "dropout": ["lora_r=16", "lora_dropout=0.1"],
}


@pytest.mark.parametrize("adapters", ADAPTED)
def test_what_is_recomputed_fits(adapters: str) -> None:
    """Between what a row takes with all layers recomputed and what it takes with none."""
    chosen = [f"model.{option}" for option in ADAPTED[adapters]]
    chosen += ["model.get_lora=true"] if chosen else []
    chosen += ["model.llm_grad_ckpt=true", "run.max_tokens_per_batch=4000"]
    deep = BENCH[3].replace("num_hidden_layers: 2", "num_hidden_layers: 8")
    made = Estimator(config_of(*chosen, deep), Sharing("single", 1))
    least, most = (made.needed(4000, StepSchedule(recompute=how)) for how in ("all", "none"))
    found = set()
    for share in (0.3, 0.5, 0.7, 0.9, 1.3):
        memory = least + share * (most - least)
        schedule = made.schedule(memory)
        found.add(schedule.recompute)
        assert made.needed(4000, schedule) <= memory
    assert "none" in found and len(found) > 2


class _NoData:
    def build_datasets(self) -> None:
        raise ConfigError("no such file")


def test_the_page() -> None:
    config = config_of("run.max_tokens_per_batch=4000")
    page = plan_run(config, _NoData(), card("RTX 3090"))
    assert "rtx3090: 22.8 of 24 GiB may be used; single on 1 of them" in page
    assert "activations of 4,000 tokens, kept" in page
    assert "recompute: none (run.recompute: auto)" in page
    assert "together: fits" in page
    assert "not known: no such file" in page
    small = plan_run(config, _NoData(), card("0.05"))
    assert "together: DOES NOT FIT" in small
    assert "run.strategy: fsdp2" in small


def test_a_conversation() -> None:
    config = config_of()
    page = plan_chat(config, card("24"))
    width, layers, bytes_each = 256, 2, 4
    assert f"{2 * width * layers * bytes_each / 1024:.0f} KiB a token" in page
    assert "one conversation" in page


def test_what_is_no_card() -> None:
    assert card("a100-40").gib == 40
    assert card("16").gib == 16
    for wrong in ("rtx3080", "0", "-1"):
        with pytest.raises(ConfigError, match=r"^--plan: .* is no card that is known.*h100"):
            card(wrong)


def test_the_small_files_are_needed(tmp_path: Path) -> None:
    config = config_of("model.from_scratch=[vit,qformer]", f"model.llm_model={tmp_path}")
    with pytest.raises(WeightsError, match=r"no vocabulary .*config.json, and its vocabulary"):
        Estimator(config, Sharing("single", 1))
