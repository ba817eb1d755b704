"""Every saving alone, and all together, gives the reference schedule's loss and gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.toybox.world.__main__ import write_split
from lavis.common.config import load_config
from lavis.common.errors import ConfigError
from lavis.common.registry import TASKS
from lavis.common.types import Batch, Sample
from lavis.datasets.collate import collate
from lavis.models.compute.memory import activation_bytes
from lavis.models.compute.schedule import StepSchedule
from lavis.processors.conversation import Turn
from tests.conftest import TOY
from tests.runners.worker import PROJECT, options
from tests.test_parity import _samples as parity_samples

REFERENCE = StepSchedule(reference=True)
PLAIN = StepSchedule(packed_attention=False, prefix_cache=False, supervised_head=False)
SWITCHES = {
    "none": PLAIN,
    "recompute": replace(PLAIN, recompute="all"),
    "recompute every third": replace(PLAIN, recompute=3),
    "packed attention": replace(PLAIN, packed_attention=True),
    "prefix": replace(PLAIN, prefix_cache=True),
    "head": replace(PLAIN, supervised_head=True),
    "prefix and packed attention": replace(PLAIN, prefix_cache=True, packed_attention=True),
    "all": StepSchedule(),
    "all, recomputed": StepSchedule(recompute=2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    for split in ("train", "val", "test"):
        write_split(out, split, 6, seed=3)
    return out


def model_and_batch(data: Path, *more: str) -> tuple[Any, Batch]:
    """The toybox and six conversations."""
    config = load_config(PROJECT, [*options(data), *more])
    task = TASKS.get(config.run.task)(config)
    dataset = task.build_datasets()
    torch.manual_seed(0)
    model = task.build_model(torch.device("cpu"))
    return model.train(), collate([dataset[0, i] for i in range(6)])


def step(model: Any, batch: Batch) -> tuple[float, int, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(batch)
    (output.loss_sum / output.num_tokens).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss_sum.item() / output.num_tokens, output.num_tokens, grads


def check(model: Any, batch: Batch, schedules: dict[str, StepSchedule]) -> None:
    model.set_schedule(REFERENCE)
    loss, count, grads = step(model, batch)
    assert count == batch.num_supervised
    for name, schedule in schedules.items():
        model.set_schedule(schedule)
        got_loss, got_count, got = step(model, batch)
        assert got_count == count, name
        assert got_loss == pytest.approx(loss, abs=1e-5), name
        assert got.keys() == grads.keys()
        for key, grad in grads.items():
            assert float((got[key] - grad).norm() / grad.norm()) <= 1e-5, (name, key)


@pytest.mark.parametrize("mask", ["assistant_only", "chatml_delimiters"])
def test_each_switch_on_the_toybox(data: Path, mask: str) -> None:
    check(*model_and_batch(data, f"model.label_mask={mask}"), SWITCHES)


def test_each_switch_on_the_originals_numbers(toy_model: Any, expected: dict[str, Any]) -> None:
    """The batch of the fixture; the reference itself equals the original."""
    batch = collate(parity_samples(toy_model, expected))
    toy_model.train()
    check(toy_model, batch, SWITCHES)
    toy_model.set_schedule(StepSchedule())
    loss, _, grads = step(toy_model, batch)
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    for name in ("weight", "bias"):
        wanted = expected[f"grad_llm_proj_{name}"]
        assert float((grads[f"connector.{name}"] - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.parametrize("options_", [("model.freeze_llm=false",), ("model.get_lora=true",)])
def test_a_language_model_that_learns(data: Path, options_: tuple[str, ...]) -> None:
    """Its head gets a gradient where it learns; its prefix is never taken for constant."""
    if "lora" in options_[0]:
        pytest.importorskip("peft")
    model, batch = model_and_batch(data, *options_, "model.lora_dropout=0")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where half of the gradients are, too
            torch.nn.init.normal_(parameter, std=0.02)
    check(model, batch, {k: SWITCHES[k] for k in ("head", "all", "all, recomputed")})


def test_text_only_and_an_empty_question(toy_model: Any) -> None:
    """Where a document does not begin as the others do, nothing is taken as constant."""
    encoder = toy_model.encoder
    ids, _ = encoder.constant_prefix()
    whole = encoder.encode([Turn("user", "Why?"), Turn("assistant", "So.")]).input_ids
    assert whole[: len(ids)] == ids
    empty = encoder.encode([Turn("user", ""), Turn("assistant", "So.")])
    plain = encoder.encode([Turn("user", "Why?"), Turn("assistant", "So.")])
    samples = [
        Sample(str(i), torch.tensor(e.input_ids), torch.tensor(e.labels))
        for i, e in enumerate((empty, plain))
    ]
    toy_model.train()
    for some in (
        [samples[1]],
        samples,
        [Sample("", *(torch.zeros(2).long(),) * 2)],
    ):
        losses = []
        for schedule in (REFERENCE, StepSchedule()):
            toy_model.set_schedule(schedule)
            losses.append(toy_model(collate(some)).loss_sum.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_takes_its_schedule_from_the_configuration(data: Path) -> None:
    model, _ = model_and_batch(data, "run.prefix_cache=false", "run.recompute=2")
    assert model.schedule == StepSchedule(prefix_cache=False, recompute=2)
    flags = [layer.gradient_checkpointing for layer in model.language.model.model.layers]
    assert flags == [True, False, True, False]
    model, _ = model_and_batch(data, "run.fast_path=false")
    assert model.schedule.reference


def test_as_little_is_recomputed_as_memory_allows(data: Path) -> None:
    asked = ("model.llm_grad_ckpt=true", "run.batch_size_train=8")
    budgets = {"1000": "none", "0.000001": "all"}
    for gigabytes, choice in budgets.items():
        model, _ = model_and_batch(data, *asked, f"run.memory_budget_gb={gigabytes}")
        assert model.schedule.recompute == choice
    kept, entry = activation_bytes(model.language.model)
    tokens = 8 * model.config.max_txt_len
    budget = (3.5 * kept + entry) * tokens / 1e9  # of four layers, one is computed again
    model, _ = model_and_batch(data, *asked, f"run.memory_budget_gb={budget}")
    assert model.schedule.recompute == 4
    model, _ = model_and_batch(data, "run.memory_budget_gb=0.000001")
    assert model.schedule.recompute == "none"  # nobody asked


def test_gradients_and_moments_have_their_room(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AdamW takes after the first step is no room for activations."""
    asked = ("model.llm_grad_ckpt=true", "run.batch_size_train=8")
    model, _ = model_and_batch(data, *asked)
    kept, _ = activation_bytes(model.language.model)
    free = 1.2 * 4 * kept * 8 * model.config.max_txt_len  # of four layers
    monkeypatch.setattr("lavis.models.compute.memory.free_memory", lambda _: free)
    for frozen in (True, False):
        model, _ = model_and_batch(data, *asked, f"model.freeze_llm={str(frozen).lower()}")
        assert (model.schedule.recompute == "none") == frozen


def test_saved_bytes_are_those_of_a_real_layer(data: Path) -> None:
    model, _ = model_and_batch(data)
    layer, tokens = model.language.model.model.layers[0], 200
    saved: dict[int, int] = {}
    kept_alive = []
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        kept_alive.append(tensor)
        return tensor

    x = torch.randn(1, tokens, 192, requires_grad=True)
    cos = torch.randn(1, tokens, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, position_embeddings=(cos, cos), attention_mask=None)
    kept, entry = activation_bytes(model.language.model)
    assert entry == 4 * 192
    assert kept == pytest.approx(sum(saved.values()) / tokens, rel=0.25)


def test_other_weights_make_another_prefix(toy_model: Any, expected: dict[str, Any]) -> None:
    """What was computed of the old language model is forgotten with it."""
    batch = collate(parity_samples(toy_model, expected))
    toy_model(batch)
    assert toy_model._prefixes
    toy_model.load_checkpoint(TOY / "checkpoint_9.pth")
    assert not toy_model._prefixes


@pytest.mark.parametrize("value", ["0", "-2", "sometimes"])
def test_a_wrong_recomputation(data: Path, value: str) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.recompute must be auto, none, all, or n for every"
    ):
        load_config(PROJECT, [*options(data), f"run.recompute={value}"])
