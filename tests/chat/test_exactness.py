"""Every answer is the one that a cold start gives: the whole prompt computed anew."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lavis.chat import Answer, ChatEngine, ChatSettings, Conversation, Exchange
from lavis.processors.conversation import ChatML, ConversationEncoder, Turn
from tests.chat.conftest import Pictures

QUESTIONS = [
    "Describe this image in detail.",
    "图里有几个物体？",
    "What colour is the star?",
    "红色的物体在哪里？",
    "How many objects are there?",
    "Is there a blue circle? Answer yes or no.",
    "描述这张图片。",
]


def question(i: int) -> str:
    return QUESTIONS[i % len(QUESTIONS)]


@pytest.fixture()
def conversation(engine: ChatEngine) -> Conversation:
    return Conversation(engine, ChatSettings(max_new_tokens=24))


@pytest.fixture()
def check(engine: ChatEngine, conversation: Conversation, pictures: Pictures) -> Check:
    return Check(engine, conversation, pictures)


class Check:
    """Asserts that an answer is that of a cold start on the conversation's text."""

    def __init__(self, engine: ChatEngine, conversation: Conversation, pictures: Pictures) -> None:
        self.engine, self.conversation, self.pictures = engine, conversation, pictures

    def __call__(self, answer: Answer) -> None:
        text = answer.read()
        settings = answer._settings
        prompt = self.prompt()
        assert answer.prompt == prompt
        assert answer.ids == self.pictures.cold(answer, prompt, **settings.generation())
        assert text == answer.exchange.answer
        whole = self.engine.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        assert whole.rstrip("�").strip() == text.rstrip("�").strip()

    def prompt(self) -> list[int]:
        """What the conversation's last question should show the model."""
        model = self.engine.model
        *before, last = self.conversation.exchanges
        gone = self.conversation.forgotten
        moved = "<Img><ImageHere></Img>" * sum(len(e.images) for e in before[:gone])
        turns = []
        for e in before[gone:]:
            turns += [Turn("user", e.question), Turn("assistant", e.answer)]
        turns.append(Turn("user", last.question))
        if moved:
            turns[0] = Turn("user", f"{moved} {turns[0].text}")
        return ConversationEncoder(
            model.tokenizer, ChatML(model.tokenizer), model.encoder.num_query_token
        ).prompt(turns)


def test_twenty_turns(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    """With a second image in a later turn, and two at once in yet another."""
    conversation.show(pictures("scene"))
    for i in range(20):
        if i == 5:
            conversation.show(pictures("four"))
        if i == 11:
            conversation.show(pictures("pair"), pictures("scene"))
        check(conversation.ask(question(i)))
    assert len(conversation.exchanges) == 20
    assert [len(e.images) for e in conversation.exchanges if e.images] == [1, 1, 2]


def test_without_an_image(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    check(conversation.ask("Hello."))
    check(conversation.ask("你好。"))
    conversation.show(pictures("scene"))
    check(conversation.ask(QUESTIONS[0]))


def test_undo(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    conversation.show(pictures("scene"))
    for i in range(3):
        check(conversation.ask(question(i)))
    second = pictures("four")
    conversation.show(second)
    check(conversation.ask(question(3)))
    assert conversation.undo().text == question(3)
    assert conversation.waiting == [second]  # shown again with the next question
    check(conversation.ask(question(4)))
    for _ in range(4):
        conversation.undo()
    assert len(conversation.waiting) == 2
    check(conversation.ask(question(5)))


def test_edit(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    conversation.show(pictures("scene"))
    for i in range(5):
        check(conversation.ask(question(i)))
    check(conversation.edit(2, "What is there?"))
    assert [e.text for e in conversation.exchanges] == [question(0), question(1), "What is there?"]
    check(conversation.ask(question(5)))
    check(conversation.edit(0, "这是什么？"))
    assert [len(e.images) for e in conversation.exchanges] == [1]
    check(conversation.edit(-1, QUESTIONS[0]))


def test_retry(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    conversation.show(pictures("scene"))
    first = conversation.ask(QUESTIONS[0]).read()
    check(conversation.retry())
    assert [e.answer for e in conversation.exchanges] == [first]


def test_cancel(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    conversation.show(pictures("scene"))
    check(conversation.ask(question(1)))
    answer = conversation.ask(QUESTIONS[0])
    begun = next(answer) + next(answer)
    answer.cancel()
    assert list(answer) == []
    assert conversation.exchanges[-1].answer == begun.strip()
    assert conversation.exchanges[-1].finish == "cancelled"
    check(conversation.ask(question(2)))
    conversation.ask(QUESTIONS[0])  # never read
    check(conversation.ask(question(3)))
    unfinished = conversation.ask(QUESTIONS[0])
    next(unfinished)
    check(conversation.ask(question(4)))  # cancels it
    assert list(unfinished) == []


def test_interrupted_in_the_middle_of_a_pass(
    conversation: Conversation, check: Check, pictures: Pictures
) -> None:
    """Ctrl-C when some layers have taken a token in and others have not."""
    conversation.show(pictures("scene"))
    check(conversation.ask(question(1)))
    layer = conversation.engine.model.language.model.model.layers[1]
    for passes in (0, 1, 2):
        answer = conversation.ask(QUESTIONS[0])
        for _ in range(passes):
            next(answer)
        interrupt = layer.register_forward_pre_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(answer)
        interrupt.remove()
        assert list(answer) == []
        check(conversation.ask(question(passes)))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_clear_history(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    conversation.show(pictures("scene"))
    check(conversation.ask(question(0)))
    conversation.show(pictures("four"))
    check(conversation.ask(question(1)))
    conversation.clear_history()
    assert conversation.exchanges == []
    check(conversation.ask(question(0)))
    assert len(conversation.exchanges[0].images) == 2
    conversation.clear()
    assert conversation.images == []
    assert conversation.cache_bytes == 0
    check(conversation.ask(question(1)))


def test_overflow(conversation: Conversation, check: Check, pictures: Pictures) -> None:
    """The oldest turns go, the images stay, and most turns drop nothing."""
    conversation.show(pictures("scene"))
    window = 220
    conversation.settings = conversation.settings.changed(max_window_size=window)
    dropped = []
    for i in range(24):
        if i == 3:
            conversation.show(pictures("four"))
        answer = conversation.ask(question(i))
        check(answer)
        dropped.append(answer.dropped)
        assert len(answer.prompt) <= window
        assert len(answer.images) == 1 + (i >= 3)
    assert sum(dropped) == conversation.forgotten >= 12
    assert sum(d > 0 for d in dropped) < 12
    assert len(conversation.exchanges) == 24
    while conversation.exchanges:  # also past what was dropped
        conversation.undo()
        if len(conversation.exchanges) % 6 == 2:
            check(conversation.ask(question(1)))
            conversation.undo()


def test_any_sequence_of_actions(
    conversation: Conversation, check: Check, pictures: Pictures
) -> None:
    rng = random.Random(7)
    images = [pictures(name) for name in ("scene", "four", "pair")]

    def ask() -> None:
        check(conversation.ask(question(rng.randrange(7))))

    def stop() -> None:
        answer = conversation.ask(question(rng.randrange(7)))
        for _ in range(rng.randrange(4)):
            next(answer, None)
        answer.cancel()

    def undo() -> None:
        if conversation.exchanges:
            conversation.undo()

    def edit() -> None:
        if conversation.exchanges:
            index = rng.randrange(len(conversation.exchanges))
            check(conversation.edit(index, question(rng.randrange(7))))

    def show() -> None:
        if len(conversation.images) < 5:
            conversation.show(rng.choice(images))

    actions: list[Callable[[], None]] = [ask, ask, ask, stop, undo, edit, show]
    for _ in range(60):
        rng.choice(actions)()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"num_beams": 3},
        {"num_beams": 2, "repetition_penalty": 1.2, "max_new_tokens": 7},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_settings_that_do_not_draw(
    conversation: Conversation, check: Check, pictures: Pictures, settings: dict[str, Any]
) -> None:
    conversation.show(pictures("scene"))
    conversation.settings = conversation.settings.changed(**settings)
    for i in range(4):
        check(conversation.ask(question(i)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 3.0, "top_k": 7},
        {"temperature": 0.7, "top_p": 0.6, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_drawn_answers_are_those_of_transformers(
    conversation: Conversation, pictures: Pictures, settings: dict[str, Any]
) -> None:
    conversation.show(pictures("scene"))
    settings = {"do_sample": True, "max_new_tokens": 24, **settings}
    for seed in range(4):
        answer = conversation.ask(question(seed), seed=seed, **settings)
        answer.read()
        torch.manual_seed(seed)
        cold = pictures.cold(answer, answer.prompt, top_k=settings.get("top_k", 0), **{
            k: v for k, v in settings.items() if k != "top_k"
        })  # fmt: skip
        assert answer.ids == cold


@pytest.mark.parametrize("case", ["one", "other", "two images", "several turns"])
def test_the_originals_answers(fixture: ChatEngine, expected: dict[str, Any], case: str) -> None:
    images = [fixture.encode_image(image) for image in expected["image"]]
    conversation = Conversation(fixture, ChatSettings(max_new_tokens=24))
    text = "Describe this image in detail."
    wanted = expected["greedy_ids"][case == "other"]
    shown = {"one": images[:1], "other": images[1:2], "two images": images[:2]}.get(case, [])
    if case == "two images":
        text, wanted = "Compare the two images.", expected["two_image_greedy_ids"]
    if case == "several turns":
        before = Exchange("What is it?", (images[0],), "It is a cat.", "stop")
        conversation.exchanges.append(before)
        text, wanted = "再说一遍。", expected["multi_turn_greedy_ids"]
    conversation.show(*shown)
    answer = conversation.ask(text)
    answer.read()
    assert answer.ids == wanted
