"""The encoder with tokenizers and templates of other families; test_conversation.py has Qwen's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavis.common.errors import DataError
from lavis.common.types import IGNORE_INDEX
from lavis.processors.contracts import Kind, Piece
from lavis.processors.conversation import ConversationEncoder, Turn
from lavis.processors.hf_tokenizer import FastTokenizer
from lavis.processors.templates import TokenizerTemplate
from tests.processors.families import FAMILIES


def said(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DataError as error:
        return str(error)


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


class Deaf:
    """A template of one's own that leaves the system prompt out."""

    stops = (0,)

    def pieces(self, turns: Any, *, system: str | None, ask: bool) -> list[Piece]:
        return [Piece(text, Kind.TEXT) for _, text in turns]


@pytest.mark.parametrize(
    ("name", "own", "system", "kept"),
    [
        ("qwen2.5", None, "You are a helpful assistant.", True),  # its template's own
        ("qwen2.5", None, "Be brief.", False),
        ("qwen2.5", "Be brief.", "Be brief.", True),
        ("qwen2.5", "Be brief.", "You are a helpful assistant.", False),
        ("qwen2.5", "Be brief. Please.", "Be brief.", False),
        ("chatml", None, "You are a helpful assistant.", False),  # it begins with the question
        ("llama2-first", "Be brief.", "Be brief.", True),
        ("gemma2", None, "You are a helpful assistant.", False),  # takes none
        ("deaf", None, "You are a helpful assistant.", False),
    ],
)
def test_a_records_system_prompt(
    tmp_path: Path, name: str, own: str | None, system: str, kept: bool
) -> None:
    folder = FAMILIES["chatml" if name == "deaf" else name].save(tmp_path)
    tokenizer = FastTokenizer.load(folder, 700)
    template = Deaf() if name == "deaf" else TokenizerTemplate(tokenizer)
    encoder = ConversationEncoder(tokenizer, template, 3, system=own)
    if kept:
        encoder.check_system(system)
        return
    with pytest.raises(DataError) as caught:
        encoder.check_system(system)
    begin = tokenizer.decode(encoder.constant_prefix()[0])
    assert str(caught.value) == (
        "has a `system` prompt of its own, but every conversation begins with "
        f"{begin!r}; write it into the question"
    )
