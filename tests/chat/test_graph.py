"""A recorded pass gives what a pass gives, though nothing of the host is asked again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cli_demo
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.chat.cache import ConversationCache
from lavis.chat.graph import TokenGraph, record_cuda
from lavis.common.errors import ConfigError
from tests.chat.conftest import PICTURES
from tests.models.test_families import FAMILIES, close, proved, stock


class Recorder(TorchDispatchMode):
    """As a CUDA graph: the same operations again, on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                if not func.is_view:
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old is not new:
                            old.copy_(new)


RECORDED: list[Recorder] = []


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    with Recorder() as recorder:
        result = run()
    RECORDED.append(recorder)
    return recorder.replay, result


@pytest.fixture(autouse=True)
def recorded() -> list[Recorder]:
    RECORDED.clear()
    return RECORDED


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family(name: str) -> None:
    """Past windows and chunks, and after a rollback."""
    llm, cache = proved(name), ConversationCache()
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (1, 20))
    wanted = stock(name)(input_ids=ids, use_cache=False).logits[0].float()
    llm.hidden(llm.embed(ids[:, :2]), torch.arange(2)[None], cache=cache)
    cache.content = ids[0, :2].tolist()
    for length in [*range(2, 16), 3, 4]:
        cache.truncate(length)
        graph = TokenGraph.of(llm, cache, record, torch.device("cpu"))
        assert graph is not None
        close(graph(cache, int(ids[0, length])), wanted[length])
    assert len(RECORDED) == 1


def conversation(engine: ChatEngine) -> Conversation:
    talk = Conversation(engine, ChatSettings(max_new_tokens=40))
    talk.show(PICTURES / "scene.png")
    return talk


def test_a_conversation(toybox: ChatEngine, recorded: list[Recorder]) -> None:
    """Recorded once for a block of the buffers, which grow in the sixth turn or so."""
    graphs = ChatEngine(toybox.model, toybox._processor, record=record)
    told, plain = conversation(graphs), conversation(toybox)
    for turn in range(12):
        question = "Describe this image in detail."
        assert told.ask(question).read() == plain.ask(question).read()
        if turn == 2:
            told.undo(), plain.undo()
    assert told.cache_bytes == plain.cache_bytes
    blocks = told._cache.layers[0].keys.shape[2] // 256
    assert len(recorded) == blocks > 1
    told.clear()
    assert told._cache.graph is None
    told.show(PICTURES / "four.png")
    plain.clear()
    plain.show(PICTURES / "four.png")
    assert told.ask("Why?").read() == plain.ask("Why?").read()


def test_two_conversations_have_a_graph_each(toybox: ChatEngine) -> None:
    graphs = ChatEngine(toybox.model, toybox._processor, record=record)
    talks = [conversation(graphs), Conversation(graphs)]
    questions = ["Describe this image.", "Hello."]
    wanted = [conversation(toybox).ask(questions[0]).read()]
    wanted.append(Conversation(toybox).ask(questions[1]).read())
    answers = [talk.ask(q) for talk, q in zip(talks, questions, strict=True)]
    while not all(answer.finished for answer in answers):
        for answer in answers:
            next(answer, None)
    assert [answer.exchange.answer for answer in answers] == wanted


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cli_demo.py", "--cuda-graphs", "--cpu-only"])
    with pytest.raises(ConfigError, match="--cuda-graphs needs a model on one GPU"):
        cli_demo.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card(toybox: ChatEngine) -> None:
    model = toybox.model.to("cuda")
    try:
        engines = [ChatEngine(model, toybox._processor, record=r) for r in (None, record_cuda)]
        plain, told = (
            conversation(engine).ask("Describe this image.").read() for engine in engines
        )
        assert told == plain
    finally:
        model.to("cpu")
