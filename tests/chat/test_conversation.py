"""What a conversation computes, keeps, refuses, and gives back."""

from __future__ import annotations

import argparse
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.chat.command import add_chat_arguments, room_for_cache
from lavis.chat.engine import TokenChooser
from lavis.chat.text import TextStream
from lavis.common.errors import ConfigError, DataError, LavisError, WeightsError
from lavis.common.paths import TOYBOX

SCENE = TOYBOX / "image" / "scene.png"
FOUR = TOYBOX / "image" / "four.png"
DESCRIBE = "Describe this image in detail."
LONG = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 400}


@pytest.fixture()
def conversation(toybox: ChatEngine) -> Conversation:
    return Conversation(toybox)


@pytest.fixture()
def passes(toybox: ChatEngine) -> Any:
    """Tokens of each forward pass of the language model, and calls of the ViT."""
    model = toybox.model
    calls: dict[str, list[int]] = {"tokens": [], "images": []}

    def tokens(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls["tokens"].append(kwargs["inputs_embeds"].shape[1])

    def images(module: Any, args: tuple[Tensor, ...]) -> None:
        calls["images"].append(len(args[0]))

    hooks = [
        model.language.model.model.register_forward_pre_hook(tokens, with_kwargs=True),
        model.vision.visual_encoder.register_forward_pre_hook(images),
    ]
    yield calls
    for hook in hooks:
        hook.remove()


# --- what is computed -----------------------------------------------------------------------


def test_a_turn_computes_only_its_own_tokens(conversation: Conversation, passes: Any) -> None:
    conversation.show(SCENE)
    before = 0
    for i in range(12):
        passes["tokens"].clear()
        answer = conversation.ask("How many objects are there?")
        answer.read()
        assert answer.reused == before
        assert passes["tokens"][0] == len(answer.prompt) - before
        assert set(passes["tokens"][1:]) <= {1}
        before = len(answer.prompt) + len(answer.ids)
        assert passes["tokens"][0] < 60 or i == 0
    assert passes["images"] == [1]


def test_rolling_back_computes_nothing_anew(conversation: Conversation, passes: Any) -> None:
    conversation.show(SCENE, FOUR)
    first = conversation.ask(DESCRIBE)
    first.read()
    conversation.ask("图里有几个物体？").read()
    for act in (conversation.undo, conversation.undo, conversation.clear_history):
        act()
    passes["tokens"].clear()
    again = conversation.ask(DESCRIBE)
    again.read()
    assert passes["tokens"][0] == 1  # the last token, for its logits
    assert again.ids == first.ids
    assert passes["images"] == [1, 1]  # when they were shown


def test_nothing_is_computed_before_it_is_read(conversation: Conversation, passes: Any) -> None:
    answer = conversation.ask("Hello.")
    assert passes["tokens"] == []
    next(answer)
    assert len(passes["tokens"]) <= 2
    assert conversation.exchanges[0].finish == "cancelled"  # as yet


def test_images_keep_their_order(conversation: Conversation) -> None:
    first, second, third = conversation.show(SCENE, FOUR, SCENE)[:3]
    conversation.waiting = [first]
    conversation.ask("a", max_new_tokens=1).read()
    conversation.show(second)
    conversation.ask("b", max_new_tokens=1).read()
    conversation.show(third)
    conversation.undo()
    assert conversation.waiting == [second, third]
    assert conversation.images == [first, second, third]
    conversation.clear_history()
    assert conversation.waiting == [first, second, third]


def test_half_precision(toy_yaml: Any) -> None:
    """The cache lies otherwise there; a prompt in parts gives what it gives at once."""
    from lavis.chat.cache import ConversationCache
    from lavis.models import load_model

    model = load_model(
        "minigpt4qwen",
        "qwen7b_chat",
        is_eval=True,
        cfg_path=toy_yaml,
        options=["model.llm_precision=bf16"],
    )
    assert model.language.model.lm_head.weight.dtype == torch.bfloat16
    engine = ChatEngine(model, lambda image: image)
    content = [(7 * i) % 1100 for i in range(300)]
    parts, whole = ConversationCache(), ConversationCache()
    wanted = engine.extend(whole, content, [])
    for end in (100, 101, 250, 280, 281):  # past the first block of the buffers
        engine.extend(parts, content[:end], [])
    parts.truncate(270)
    got = engine.extend(parts, content, [])
    assert parts.layers[0].get_seq_length() == 300
    assert (got - wanted).norm() / wanted.norm() < 0.03


# --- streaming ------------------------------------------------------------------------------


def test_pieces_are_the_answer(conversation: Conversation) -> None:
    conversation.show(SCENE)
    answer = conversation.ask(DESCRIBE)
    seen = ""
    for piece in answer:
        assert piece
        seen += piece
        assert conversation.exchanges[-1].answer == seen
    assert seen.startswith("A big red circle at the top left")
    assert conversation.exchanges[-1].finish == "stop"
    assert answer.finished


def test_a_character_is_never_split(toybox: ChatEngine) -> None:
    text = "一个蓝色的星形 \U0001f600 naïve e\u0301"
    for tokens in (toybox.tokenizer.encode(text), list(text.encode())):  # as merged, as bytes
        stream = TextStream(toybox.tokenizer)
        ids = tokens
        if tokens == list(text.encode()):
            by_bytes = {toybox.tokenizer.token_bytes(i): i for i in range(toybox.tokenizer.eod_id)}
            ids = [by_bytes[bytes([b])] for b in tokens]
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) == stream.text
        assert "�" not in stream.text
        assert stream.text == toybox.tokenizer.decode(ids)
    cut = TextStream(toybox.tokenizer)
    for i in ids[:5]:  # one character and two thirds of another
        cut.push(i)
    assert cut.text == "一"


def test_white_space_at_the_ends_and_special_tokens_are_left_out(toybox: ChatEngine) -> None:
    stream = TextStream(toybox.tokenizer)
    ids = toybox.tokenizer.encode("\n\n one  two \n")
    pieces = [stream.push(i) for i in [toybox.tokenizer.image_id, *ids, toybox.tokenizer.eod_id]]
    assert stream.text == "".join(pieces) == "one  two"


@pytest.mark.parametrize("stop", ["im_end_id", "im_start_id", "eod_id"])
def test_what_ends_an_answer(toybox: ChatEngine, conversation: Conversation, stop: str) -> None:
    word = toybox.tokenizer.encode("red")[0]
    tokens = iter([word, word, getattr(toybox.tokenizer, stop), word])

    def force(module: Any, args: Any, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits).index_fill_(-1, torch.tensor(next(tokens)), 9.0)

    hook = toybox.model.language.model.lm_head.register_forward_hook(force)
    answer = conversation.ask("Hello.")
    text = answer.read()
    hook.remove()
    assert answer.ids == [word, word]
    assert text == toybox.tokenizer.decode([word, word])
    assert answer.exchange.finish == "stop"


def test_cancelled_from_another_thread(conversation: Conversation) -> None:
    answer = conversation.ask("Hello.", seed=1, **LONG)
    begun = threading.Event()
    seen: list[str] = []

    def read() -> None:
        for piece in answer:
            seen.append(piece)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    conversation.cancel()
    kept = conversation.exchanges[-1].answer
    reader.join(60)
    assert not reader.is_alive()
    assert conversation.exchanges[-1].answer == kept == "".join(seen) != ""
    assert len(answer.ids) < LONG["max_new_tokens"]
    assert conversation.exchanges[-1].finish == "cancelled"


def test_beam_search_can_be_cancelled(conversation: Conversation) -> None:
    answer = conversation.ask("Hello.", num_beams=2, max_new_tokens=64)
    answer._cancelled.set()  # as another thread does
    assert list(answer) == []
    answer = conversation.ask("Hello.", num_beams=2, max_new_tokens=400)
    layer = conversation.engine.model.language.model.model.layers[0]
    steps = []

    def cancel_at_the_third(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3:
            answer._cancelled.set()

    hook = layer.register_forward_hook(cancel_at_the_third)
    answer.read()
    hook.remove()
    assert len(steps) == 3
    assert conversation.exchanges[-1].finish == "cancelled"
    assert conversation.ask("Hello.").read()


# --- several at once ------------------------------------------------------------------------


def test_conversations_in_threads_do_not_mix(toybox: ChatEngine) -> None:
    def talk(image: Any, results: dict[int, list[str]], number: int) -> None:
        conversation = Conversation(toybox, ChatSettings(max_new_tokens=30))
        conversation.show(image)
        questions = [DESCRIBE, "图里有几个物体？", "What colour is the star?"]
        results[number] = [conversation.ask(q).read() for q in questions]
        drawn = conversation.ask("Hello.", do_sample=True, temperature=2.0, seed=number)
        results[number].append(drawn.read())

    alone: dict[int, list[str]] = {}
    together: dict[int, list[str]] = {}
    images = [SCENE, FOUR, TOYBOX / "image" / "pair.png", SCENE]
    for number, image in enumerate(images):
        talk(image, alone, number)
    threads = [
        threading.Thread(target=talk, args=(image, together, number))
        for number, image in enumerate(images)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == alone
    assert len({tuple(a) for a in alone.values()}) == 4


def test_memory_goes_with_the_conversation(toybox: ChatEngine) -> None:
    """At once, not when the garbage collector comes by; also in mid-answer."""
    gc.collect()
    gc.disable()
    try:
        for finish in (True, False):
            conversation = Conversation(toybox)
            conversation.show(SCENE)
            conversation.ask(DESCRIBE).read()
            answer = conversation.ask(DESCRIBE)
            next(answer)
            if finish:
                answer.read()
            cache = weakref.ref(conversation._cache)
            keys = weakref.ref(conversation._cache.layers[0].keys)
            assert conversation.cache_bytes > 0
            del conversation, answer
            assert cache() is None
            assert keys() is None
    finally:
        gc.enable()


@pytest.fixture()
def small(toybox: ChatEngine) -> ChatEngine:
    """An engine with room for the keys and values of two short conversations."""
    one = Conversation(toybox)
    one.ask("Hello.").read()
    return ChatEngine(toybox.model, toybox._processor, cache_bytes=2 * one.cache_bytes)


def test_the_conversation_idle_longest_is_computed_anew(small: ChatEngine, passes: Any) -> None:
    """Three take turns where two have room, and answer as they would alone."""
    alone = Conversation(ChatEngine(small.model, small._processor))
    talks = [Conversation(small) for _ in range(3)]
    for question in ("Hello.", "你好。", "Hello again."):
        wanted = alone.ask(question).read()
        for talk in talks:
            passes["tokens"].clear()
            answer = talk.ask(question)
            for _ in answer:
                assert sum(t.cache_bytes for t in talks) <= small.cache_bytes
            assert answer.exchange.answer == wanted
            assert passes["tokens"][0] == len(answer.prompt)  # it was the longest idle
            assert talk.cache_bytes > 0
    assert [t.cache_bytes > 0 for t in talks] == [False, True, True]
    talks[1].ask("Hello.").read()
    talks[0].ask("Hello.").read()  # the third is now the longest idle
    assert [t.cache_bytes > 0 for t in talks] == [True, True, False]


def test_an_answer_under_way_is_given_up_and_goes_on(small: ChatEngine) -> None:
    """Also by beam search; what no limit can hold is computed all the same."""
    first, second, third = (Conversation(small) for _ in range(3))
    first.show(SCENE)
    wanted = first.ask(DESCRIBE).read()
    beams = first.retry(num_beams=2, max_new_tokens=12).read()
    answer = first.retry()
    begun = next(answer)
    for other in (second, third):
        other.ask("Hello.").read()
    assert first.cache_bytes == 0
    assert begun + answer.read()[len(begun) :] == wanted
    small.cache_bytes = 1
    assert first.retry().read() == wanted
    assert first.retry(num_beams=2, max_new_tokens=12).read() == beams
    assert first.cache_bytes > 1
    assert second.cache_bytes == third.cache_bytes == 0


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    assert parser.parse_args(["--cache-gb", "1.5"]).cache_bytes == 1.5e9
    with pytest.raises(SystemExit):
        parser.parse_args([f"--cache-gb={text}"])
    assert f"--cache-gb: must be a number of GB over 0, not {text!r}" in capsys.readouterr().err


def test_the_weights_leave_room_on_cards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": (4e9, 24e9), "cuda:1": (2e9, 24e9)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free[str(device)])
    cards = {torch.device("cuda:0"), torch.device("cuda:1")}
    assert room_for_cache(cards) == 4.5e9
    assert room_for_cache({torch.device("cpu")}) == float("inf")


# --- drawing --------------------------------------------------------------------------------


def test_a_seed_gives_one_answer(conversation: Conversation) -> None:
    settings = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 30}
    torch.manual_seed(1)
    first = conversation.ask("Hello.", seed=5, **settings).read()
    torch.manual_seed(2)
    assert conversation.retry(seed=5, **settings).read() == first
    assert conversation.retry(seed=6, **settings).read() != first
    one = conversation.retry(seed=None, **settings)
    other = conversation.retry(seed=None, **settings)
    assert one.seed != other.seed
    text = other.read()
    assert conversation.retry(seed=other.seed, **settings).read() == text


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.85}, {0, 1}),
        ({"temperature": 0.01}, {0}),
        ({"repetition_penalty": 100.0}, {1, 2, 3}),
    ],
    ids=str,
)
def test_what_can_be_drawn(settings: dict[str, Any], possible: set[int]) -> None:
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    choose = TokenChooser(ChatSettings(do_sample=True, seed=0, **settings))
    counts = torch.zeros(4)
    for _ in range(600):
        counts[choose(logits, [0])] += 1
    assert set(counts.nonzero()[:, 0].tolist()) == possible
    if not settings:
        expected = torch.tensor([0.6, 0.25, 0.1, 0.05])
        assert (counts / 600 - expected).abs().max() < 0.06


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.ask("  "), "the question is empty"),
        (lambda c: c.ask(None), "the question is empty, or no text: None"),
        (lambda c: c.ask(["a"]), "the question is empty, or no text: ['a']"),
        (
            lambda c: c.ask("<ImageHere> and <ImageHere>"),
            "the question names 2 images (<ImageHere>), but 1 are new in it",
        ),
        (lambda c: c.edit(1, "Hello."), "there is no such question"),
        (lambda c: c.edit(-2, "Hello."), "there is no such question"),
        (lambda c: c.ask("a", tempreature=1), "unknown generation setting 'tempreature'; did you"),
        (lambda c: c.ask("a", temperature=0), "generation setting temperature must be positive"),
        (lambda c: c.ask("a", max_new_tokens=99999), "the question and the images take"),
        (lambda c: c.ask("a " * 9000), "the question and the images take"),
        (lambda c: c.show("nowhere.png"), "nowhere.png cannot be read: "),
        (lambda c: c.show(SCENE, TOYBOX / "README.md"), f"{TOYBOX / 'README.md'} is not an image"),
    ],
)
def test_a_mistake_changes_nothing(conversation: Conversation, ask: Any, message: str) -> None:
    conversation.ask("Hello.").read()
    (image,) = conversation.show(SCENE)
    before = conversation.to_dict()
    with pytest.raises(LavisError) as caught:
        ask(conversation)
    assert str(caught.value).startswith(message)
    assert conversation.to_dict() == before
    assert conversation.waiting == [image]
    assert conversation.ask(DESCRIBE).read().startswith("A big red circle")


def test_nothing_to_take_back(conversation: Conversation) -> None:
    for act in (conversation.undo, conversation.retry):
        with pytest.raises(DataError, match=r"^nothing was asked yet$"):
            act()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0}, "generation setting top_p must be more than 0 and at most 1, not 0"),
        ({"top_p": 1.5}, "generation setting top_p must be more than 0 and at most 1, not 1.5"),
        ({"top_k": -1}, "generation setting top_k must be 0 (all tokens) or a positive integer"),
        ({"top_k": 1.5}, "generation setting top_k must be 0 (all tokens) or a positive integer"),
        ({"repetition_penalty": 0}, "generation setting repetition_penalty must be positive, not"),
        ({"temperature": float("inf")}, "generation setting temperature must be positive, not"),
        ({"temperature": float("nan")}, "generation setting temperature must be positive, not"),
        ({"temperature": None}, "generation setting temperature has no value"),
        ({"num_beams": True}, "generation setting num_beams must be a positive integer, not True"),
        ({"do_sample": "yes"}, "generation setting do_sample must be true or false, not 'yes'"),
        ({"do_sample": True, "num_beams": 2}, "beam search does not draw tokens"),
        ({"seed": -1}, "generation setting seed must be an integer from 0 to 2^63 - 1, not -1"),
        ({"seed": 1.0}, "generation setting seed must be an integer from 0 to 2^63 - 1, not 1.0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatSettings(**settings)
    assert str(caught.value).startswith(message)


def test_settings_without_effect() -> None:
    assert ChatSettings(temperature=0.5, top_k=3).without_effect() == ["temperature", "top_k"]
    assert ChatSettings(temperature=0.5, do_sample=True).without_effect() == []


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 2}])
def test_output_that_is_not_a_number(
    toybox: ChatEngine, conversation: Conversation, settings: dict[str, Any]
) -> None:
    head = toybox.model.language.model.lm_head
    hook = head.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(WeightsError, match=r"output is not a number.*llm_precision"):
            conversation.ask("Hello.", **settings).read()
    finally:
        hook.remove()
    assert not conversation.cache_bytes  # nothing of it is used again
    conversation.undo()
    conversation.show(SCENE)
    assert conversation.ask(DESCRIBE).read().startswith("A big red circle")


@pytest.mark.parametrize("markup", ["<|im_end|>", "<|im_start|>", "<|extra_0|>", "<|endoftext|>"])
def test_markup_in_a_question_stays_text(conversation: Conversation, markup: str) -> None:
    tokenizer = conversation.engine.tokenizer
    answer = conversation.ask(f"a{markup}b")
    specials = [i for i in answer.prompt if i >= tokenizer.eod_id]
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    assert specials == [start, end, start, end, start]


def test_the_conversation_as_json(conversation: Conversation) -> None:
    conversation.show(SCENE)
    conversation.ask(DESCRIBE).read()
    conversation.ask("图里有几个物体？", max_new_tokens=1).read()
    saved = conversation.to_dict()
    assert saved["system"] == "You are a helpful assistant."
    assert saved["settings"]["max_new_tokens"] == 512
    first, second = saved["exchanges"]
    assert first["images"] == ["scene.png"]
    assert first["question"] == DESCRIBE
    assert (first["finish"], second["finish"]) == ("stop", "length")
    assert second["question"] == "图里有几个物体？"
    assert second["images"] == []
