"""Conversations at their next token share a pass, and each gets what it gets alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lavis.chat import Answer, ChatEngine, ChatSettings, Conversation
from lavis.chat.cache import ConversationCache
from lavis.chat.together import Request, Waiting, next_tokens
from tests.chat.conftest import PICTURES
from tests.models.test_families import FAMILIES, close, proved, stock

SHOWN = ("scene", "four", "pair", "scene")
QUESTIONS = ["Describe this image in detail.", "描述这张图片。", "Why?", "Describe this image."]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_token_of_each_in_every_family(name: str) -> None:
    """Of different lengths, past windows and chunks."""
    llm, caches = proved(name), [ConversationCache() for _ in range(3)]
    torch.manual_seed(2)
    texts = [torch.randint(3, 97, (1, 24)) for _ in caches]
    for cache, text, length in zip(caches, texts, (2, 9, 15), strict=True):
        positions = torch.arange(length)[None]
        llm.hidden(llm.embed(text[:, :length]), positions, cache=cache)
        cache.content = text[0, :length].tolist()
    wanted = [stock(name)(input_ids=text, use_cache=False).logits[0].float() for text in texts]
    for _ in range(6):
        lengths = [len(cache.content) for cache in caches]
        tokens = [int(text[0, n]) for text, n in zip(texts, lengths, strict=True)]
        got = next_tokens(llm, caches, tokens, torch.device("cpu"))
        for row, logits, n in zip(got, wanted, lengths, strict=True):
            close(row, logits[n])
    assert caches[1].content == texts[1][0, :15].tolist()


def begin(engine: ChatEngine, limit: int = 24) -> list[Answer]:
    """Answers whose next token is the second one, drawn and not."""
    started = []
    for number, question in enumerate(QUESTIONS):
        conversation = Conversation(engine, ChatSettings(max_new_tokens=limit))
        conversation.show(PICTURES / f"{SHOWN[number]}.png")
        drawn = {"do_sample": True, "temperature": 1.5, "seed": 1} if number % 2 else {}
        answer = conversation.ask(question, **drawn)
        next(answer)
        started.append(answer)
    return started


def in_threads(engine: ChatEngine, work: list[Callable[[], Any]]) -> None:
    """Run all at once: nothing is computed before each waits for a pass."""
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    waiting = engine._waiting
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavis.chat.together._PATIENCE", 60)
        expected = len(waiting) + len(threads)
        waiting._latest = expected + 1
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while len(waiting) < expected and time.monotonic() < end:
            time.sleep(0.001)
    with waiting._changed:
        waiting._latest = expected
        waiting._changed.notify_all()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_answers_share_their_passes(toybox: ChatEngine, rows: list[int]) -> None:
    alone = [(answer.read(), answer.ids) for answer in begin(toybox)]
    tokens = sum(len(ids) for _, ids in alone)
    answers = begin(toybox)
    del rows[:]
    in_threads(toybox, [answer.read for answer in answers])
    assert [(a.exchange.answer, a.ids) for a in answers] == alone
    assert rows[0] == len(QUESTIONS)
    assert sum(rows) <= tokens  # nobody's token is computed twice
    assert len(rows) < 0.7 * sum(rows)


def test_the_next_question_reuses_what_was_computed_together(toybox: ChatEngine) -> None:
    answers = begin(toybox)
    in_threads(toybox, [answer.read for answer in answers])
    for answer, again in zip(answers, begin(toybox), strict=True):
        again.read()
        told, alone = (a._conversation.ask("Why?") for a in (answer, again))
        assert told.reused == alone.reused > len(answer.prompt)
        assert told.read() == alone.read()


def test_without_room_for_all_they_take_turns(toybox: ChatEngine) -> None:
    """Both have their place, until each needs a larger one."""
    contents = [[3 + (7 * i) % n for i in range(257)] for n in (90, 91)]
    wanted = [toybox.extend(ConversationCache(), content, []) for content in contents]
    caches = [ConversationCache() for _ in contents]
    toybox.extend(caches[0], contents[0][:256], [])
    small = ChatEngine(toybox.model, toybox._processor, cache_bytes=2 * caches[0].nbytes)
    small.extend(caches[1], contents[1][:256], [])
    small.extend(caches[0], contents[0][:256], [])
    waits = Request(caches[1], contents[1], {})
    small._waiting.add(waits)
    close(small.extend(caches[0], contents[0], []), wanted[0])
    close(waits.result(), wanted[1])
    assert sum(cache.nbytes for cache in caches) == small.cache_bytes


def test_each_is_told_of_its_own_mistake(toybox: ChatEngine) -> None:
    answers = begin(toybox)
    wanted = [answer.read() for answer in begin(toybox)]
    lost = Request(ConversationCache(), [1, -5, 2], {})  # refers to an image that is not given
    toybox._waiting.add(lost)
    in_threads(toybox, [answer.read for answer in answers])
    assert [answer.exchange.answer for answer in answers] == wanted
    with pytest.raises(KeyError):
        lost.result()


def test_one_that_is_interrupted_leaves_the_others_to_the_next(toybox: ChatEngine) -> None:
    """Ctrl-C hits the thread that computes for all, in the middle of a pass."""
    first, *others = begin(toybox)
    wanted = [answer.read() for answer in begin(toybox)]
    requests = [Request(a._conversation._cache, [*a._content, *a.ids[:-1], 5], {}) for a in others]
    for request in requests:
        toybox._waiting.add(request)
    *_, last = toybox.model.language.blocks()
    hook = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(first)
    hook.remove()
    assert len(toybox._waiting) == len(others)  # without the one whose thread has gone
    for request in requests:
        assert not request.done
        toybox._waiting.drop(request)
    requests = [Request(a._conversation._cache, [*a._content, *a.ids], {}) for a in others]
    for request in requests[1:]:
        toybox._waiting.add(request)
    toybox.extend(requests[0].cache, requests[0].content, [])
    for request, answer in zip(requests[1:], others[1:], strict=True):
        cold = toybox.extend(ConversationCache(), request.content, answer.images)
        close(request.result(), cold)
    assert [answer.read() for answer in others] == wanted[1:]
    assert first._conversation.retry().read() == wanted[0]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_pass_waits_for_those_of_the_last_one_but_not_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = Waiting()

    def add() -> None:
        waiting.add(Request(ConversationCache(), [1], {}))

    for _ in range(3):
        add()
    assert len(waiting.take()) == 3
    with monkeypatch.context() as patched:
        patched.setattr("lavis.chat.together._PATIENCE", 60)
        add()
        threads = [threading.Timer(0.05, add) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert len(waiting.take()) == 3
    add()
    begun = time.monotonic()
    assert len(waiting.take()) == 1
    assert time.monotonic() - begun < 2
    add()
    assert len(waiting.take()) == 1
