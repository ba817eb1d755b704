"""What cards and versions of PyTorch differ in, as far as it shows without a card."""

from __future__ import annotations

import inspect
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import modeling
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from lavis.common import device
from lavis.models import build
from lavis.models.compute import attention
from lavis.models.compute.cpu import FrozenLinear
from lavis.models.compute.masks import Asked, Documents, Softmax
from lavis.models.language.causal import CausalLM
from tests.models.conftest import Load

GIB = 2**30


@pytest.mark.parametrize(
    ("called", "names"),
    [
        (varlen_attn, {"scale", "window_size", "enable_gqa"}),
        (nn.parallel.DistributedDataParallel, {"init_sync", "forward_sync_buffers"}),
    ],
)
def test_pytorch_takes_what_only_cards_or_several_processes_use(
    called: Any, names: set[str]
) -> None:
    """Newer versions brought these; ``requirements.txt`` has the one that was tried."""
    assert names <= set(inspect.signature(called).parameters)


@pytest.mark.parametrize(
    ("capability", "kernel"), [((7, 5), attention._each), ((8, 6), attention._varlen)]
)
def test_flash_attention_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device.is_ampere.cache_clear()
    with FakeTensorMode():
        query = torch.empty(1, 2, 5, 8, device="cuda", dtype=torch.bfloat16)
    documents = Documents((2, 3))
    asked = Asked(nn.Identity(), query, query, query, None, Softmax(None))
    chosen = attention._choose(asked, documents, documents.causal)
    device.is_ampere.cache_clear()
    assert chosen is kernel


def test_nothing_on_a_card_is_widened(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    """On a host without bf16 instructions, only what stays on the CPU is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    def widened(*options: str) -> list[FrozenLinear]:
        model = load("model.llm_precision=bf16", *options)
        return [m for m in model.language.modules() if isinstance(m, FrozenLinear)]

    assert len(widened()) > 10
    monkeypatch.setattr(build, "_dispatch", lambda language: language.model.to("meta"))
    assert widened("model.llm_device_map=auto") == []


def test_two_cards_carry_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 14B model, 2 GiB of the first card being the vision side's."""
    sizes: dict[str, Any] = {"vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 40}
    sizes |= {"intermediate_size": 13696, "num_attention_heads": 40, "num_key_value_heads": 40}
    config = Qwen2Config(**sizes)
    with torch.device("meta"):
        llm = Qwen2ForCausalLM(config).to(torch.bfloat16)
    room = {0: int(20.8 * GIB), 1: int(22.8 * GIB), "cpu": 100 * GIB}
    monkeypatch.setattr(modeling, "get_max_memory", lambda given=None: given or dict(room))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    maps: list[dict[str, Any]] = []
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, where: maps.append(where))
    language = CausalLM(llm)
    build._dispatch(language)
    (where,) = maps
    used = {0: 2 * GIB, 1: 0}
    for name, parameter in llm.named_parameters():
        (card,) = {c for part, c in where.items() if f"{name}.".startswith(f"{part}.")}
        used[card] += parameter.nbytes
    assert sum(used.values()) / GIB == pytest.approx(28.4, abs=0.05)
    assert abs(used[0] - used[1]) < 1.5 * GIB


def test_generation_runs_compiled_layers_as_they_are(load: Load) -> None:
    """Compiled code for each layer's state of the cache would pass PyTorch's limit of versions."""
    model = load()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layer = next(model.language.blocks())
    layer.compile(backend=backend, dynamic=True)
    embeds, positions = model.language.embed(torch.tensor([[3, 4, 5]])), torch.arange(3)[None]
    with torch.no_grad():
        model.language.hidden(embeds, positions, cache=DynamicCache())
    model.generate_ids([[3, 4, 5]], None, max_new_tokens=3)
    assert graphs == []
