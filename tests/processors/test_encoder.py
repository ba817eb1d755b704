"""The encoder on contracts: first-generation Qwen as before, and any template."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lavis.common.errors import DataError
from lavis.common.types import IGNORE_INDEX
from lavis.processors.chatml import ChatML, PieceTokenizer
from lavis.processors.conversation import ConversationEncoder as OldEncoder
from lavis.processors.conversation import LabelMask, Turn
from lavis.processors.encoder import ConversationEncoder
from lavis.processors.hf_tokenizer import FastTokenizer
from lavis.processors.templates import TokenizerTemplate
from tests.conftest import TOY
from tests.processors import test_conversation as before
from tests.processors.families import FAMILIES

TEXTS = [
    "cat", "", " a\n", "\n\nb", "图里有什么？", "e\u0301", "<|im_end|>\n<|im_start|>user",
    "<|extra_0|>", "<ImageHere>a", "a<ImageHere><ImageHere>\n", "<Img><ImageHere></Img> What?",
    "3.14 \t🙂",
]  # fmt: skip
MASKS: list[LabelMask] = ["chatml_delimiters", "assistant_only"]


@pytest.fixture(scope="module")
def qwen() -> PieceTokenizer:
    return PieceTokenizer(TOY / "cache" / "ckpt" / "Qwen7B-chat" / "qwen.tiktoken")


def new(tokenizer: PieceTokenizer, *settings: Any, **more: Any) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, ChatML(tokenizer), *settings, **more)


def conversations() -> Iterator[list[Turn]]:
    draw = random.Random(0)
    for first, second in itertools.product(TEXTS, TEXTS):
        yield [Turn("user", first), Turn("assistant", second)]
    for length in range(8):
        for _ in range(10):
            roles = itertools.cycle(("user", "assistant"))
            yield [Turn(next(roles), draw.choice(TEXTS)) for _ in range(length)]  # type: ignore[arg-type]


def said(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("system", [None, " <|im_end|>\n"])
def test_first_generation_qwen_is_as_before(
    qwen: PieceTokenizer, mask: LabelMask, system: str | None
) -> None:
    """Ids, labels, refusals, prefix and prompts, of 224 conversations at three lengths."""
    more = {} if system is None else {"system": system}
    for turns in conversations():
        for length in (30, 60, 999):
            old = OldEncoder(qwen, 3, length, mask, **more)
            ours = new(qwen, 3, length, mask, system)
            assert said(lambda: ours.encode(turns)) == said(lambda: old.encode(turns))  # noqa: B023
        assert ours.prompt(turns) == old.prompt(turns)
    assert ours.constant_prefix() == old.constant_prefix()
    history = [("<ImageHere>a", "b"), ("cat", "ab"), ("b<ImageHere>", "a")]
    for room, start in itertools.product((1, 45, 60, 80, 999), (0, 1, 3)):
        assert ours.latest(history, "cat", room, start) == old.latest(history, "cat", room, start)
    markup = "<|im_start|>user\n<ImageHere>a <Img><ImageHere></Img><|im_end|>\n"
    assert ours.prompt_from_markup(markup) == old.prompt_from_markup(markup)


class TestAsBefore:
    """Every test of the encoder before, asked of this one."""

    @pytest.fixture(autouse=True)
    def _swap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(before, "ConversationEncoder", new)

    @pytest.fixture()
    def tokenizer(self, qwen: PieceTokenizer) -> PieceTokenizer:
        return qwen


for _name, _test in vars(before).items():
    if _name.startswith("test_"):
        setattr(TestAsBefore, _name, staticmethod(_test))


@pytest.fixture(scope="module", params=["qwen2.5", "llama2-first", "gemma3"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FastTokenizer, TokenizerTemplate]:
    folder: Path = FAMILIES[request.param].save(tmp_path_factory.mktemp(request.param))
    tokenizer = FastTokenizer.load(folder, 700)
    return tokenizer, TokenizerTemplate(tokenizer)


def test_a_cut_keeps_images_and_an_answer(family: tuple[FastTokenizer, TokenizerTemplate]) -> None:
    turns = [Turn("user", "<ImageHere>What is it?"), Turn("assistant", "A red ball.")]
    whole = ConversationEncoder(*family, 3, 999).encode(turns)
    image = max(n for n, i in enumerate(whole.input_ids) if i == family[0].image_id)
    spelt = [family[0].token_bytes(i) if i != IGNORE_INDEX else b"" for i in whole.labels]
    answer = next(n for n, text in enumerate(spelt) if text.strip().startswith(b"A"))
    for length in range(1, len(whole.input_ids) + 1):
        cut = said(lambda: ConversationEncoder(*family, 3, length).encode(turns))  # noqa: B023
        if length <= image:
            assert cut.startswith(
                f"image 1 of 1 ends at token {image + 1}, past max_txt_len {length}"
            )
        elif length <= answer:
            assert f"the first answer starts at token {answer}, past max_txt_len {length}" in cut
        else:
            assert cut.input_ids == whole.input_ids[:length]
            assert cut.labels == whole.labels[:length]


def test_what_ends_an_empty_answer_is_nothing_to_learn_from(
    family: tuple[FastTokenizer, TokenizerTemplate],
) -> None:
    encoder = ConversationEncoder(*family, 3)
    with pytest.raises(DataError, match="every answer is empty"):
        encoder.encode([Turn("user", "a"), Turn("assistant", "")])


def test_left_out_exchanges_leave_their_images(
    family: tuple[FastTokenizer, TokenizerTemplate],
) -> None:
    encoder = ConversationEncoder(*family, 3)
    history = [("<ImageHere>What is it?", "A red ball."), ("Two?", "A box.")]
    turns = [t for q, a in history for t in (Turn("user", q), Turn("assistant", a))]
    whole = encoder.prompt([*turns, Turn("user", "And?")])
    assert encoder.latest(history, "And?", len(whole)) == (whole, 0)
    prompt, dropped = encoder.latest(history, "And?", len(whole) - 1)
    assert dropped == 1
    first = Turn("user", "<Img><ImageHere></Img> Two?")
    assert prompt == encoder.prompt([first, turns[3], Turn("user", "And?")])


def test_markup_of_a_prompt(family: tuple[FastTokenizer, TokenizerTemplate]) -> None:
    tokenizer, template = family
    turns = [Turn("user", "<ImageHere>a"), Turn("assistant", "b"), Turn("user", "c")]
    encoder = ConversationEncoder(tokenizer, template, 3)
    markup = "".join(p.text for p in template.pieces(turns, ask=True))
    assert encoder.prompt_from_markup(markup) == encoder.prompt(turns)
