"""Conversation -> ids and labels, exactly, on the toy vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from lavis.common.errors import DataError
from lavis.common.types import IGNORE_INDEX, Encoded
from lavis.processors.conversation import ChatML, ConversationEncoder, LabelMask, Turn

START, END, IMAGE, NL = 1201, 1202, 1203, 198
SYSTEM_ROLE, USER_ROLE, ASSISTANT_ROLE = [82, 612], [872], [395, 380, 517]
HELPFUL = [56, 283, 525, 264, 305, 301, 79, 69, 360, 1071, 380, 517, 13]
A, B, AB, CAT = [64], [65], [370], [66, 266]
IGNORED = IGNORE_INDEX

SYSTEM = [START, *SYSTEM_ROLE, NL, *HELPFUL, END, NL]
"""19 ids."""
SYSTEM_LABELS = [START, *[IGNORED] * 16, END, NL]


def encoder(
    tokenizer: Any, num_query_token: int = 3, max_txt_len: int = 99, mask: LabelMask | None = None
) -> ConversationEncoder:
    return ConversationEncoder(
        tokenizer, ChatML(tokenizer), num_query_token, max_txt_len, mask or "chatml_delimiters"
    )


def dialog(*texts: str) -> list[Turn]:
    return [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def test_delimiters_mask(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(dialog("<ImageHere>a", "b", "cat", "ab"))
    assert encoded == Encoded(
        input_ids=[
            *SYSTEM,
            *[START, *USER_ROLE, NL, IMAGE, IMAGE, IMAGE, *A, END, NL],
            *[START, *ASSISTANT_ROLE, NL, *B, END, NL],
            *[START, *USER_ROLE, NL, *CAT, END, NL],
            *[START, *ASSISTANT_ROLE, NL, *AB, END, NL],
        ],
        labels=[
            *SYSTEM_LABELS,
            *[START, *[IGNORED] * 6, END, NL],
            *[START, *[IGNORED] * 4, *B, END, NL],
            *[START, *[IGNORED] * 4, END, NL],
            *[START, *[IGNORED] * 4, *AB, END, NL],
        ],
    )


def test_assistant_only_mask(tokenizer: Any) -> None:
    encoded = encoder(tokenizer, mask="assistant_only").encode(dialog("<ImageHere>a", "b"))
    assert encoded.labels == [*[IGNORED] * (19 + 9 + 5), *B, END, NL]
    assert encoded.input_ids == [
        *SYSTEM,
        *[START, *USER_ROLE, NL, IMAGE, IMAGE, IMAGE, *A, END, NL],
        *[START, *ASSISTANT_ROLE, NL, *B, END, NL],
    ]


def test_text_only(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(dialog("a", "b"))
    assert IMAGE not in encoded.input_ids
    assert encoded.input_ids[19:] == [
        *[START, *USER_ROLE, NL, *A, END, NL],
        *[START, *ASSISTANT_ROLE, NL, *B, END, NL],
    ]


def test_several_images_in_several_turns(tokenizer: Any) -> None:
    turns = dialog("<ImageHere>a<ImageHere>", "b", "<ImageHere>", "b")
    encoded = encoder(tokenizer, num_query_token=2).encode(turns)
    assert encoded.input_ids[19:] == [
        *[START, *USER_ROLE, NL, IMAGE, IMAGE, *A, IMAGE, IMAGE, END, NL],
        *[START, *ASSISTANT_ROLE, NL, *B, END, NL],
        *[START, *USER_ROLE, NL, IMAGE, IMAGE, END, NL],
        *[START, *ASSISTANT_ROLE, NL, *B, END, NL],
    ]


@pytest.mark.parametrize("side", [0, 1], ids=["user", "assistant"])
@pytest.mark.parametrize(
    ("typed", "ids"),
    [
        ("<|im_start|>", [27, 91, 318, 62, 267, 471, 91, 29]),
        ("<|im_end|>", [27, 91, 318, 62, 408, 91, 29]),
        ("<|extra_0|>", [27, 91, 327, 376, 64, 62, 15, 91, 29]),
        ("<|endoftext|>", [27, 91, 408, 78, 723, 427, 91, 29]),
    ],
)
def test_typed_special_tokens_stay_characters(
    tokenizer: Any, side: int, typed: str, ids: list[int]
) -> None:
    texts, spans = ["a", "b"], [A, B]
    texts[side], spans[side] = typed, ids
    encoded = encoder(tokenizer).encode(dialog(*texts))
    assert encoded.input_ids[19:] == [
        *[START, *USER_ROLE, NL, *spans[0], END, NL],
        *[START, *ASSISTANT_ROLE, NL, *spans[1], END, NL],
    ]


def test_a_system_prompt_is_text_too(tokenizer: Any) -> None:
    custom = ConversationEncoder(tokenizer, ChatML(tokenizer), 3, system="<|im_end|>")
    assert custom.prompt([])[: 4 + 7 + 2] == [
        *[START, *SYSTEM_ROLE, NL, 27, 91, 318, 62, 408, 91, 29, END, NL]
    ]


def test_a_placeholder_in_an_answer_is_text(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(dialog("a", "<ImageHere>"))
    assert IMAGE not in encoded.input_ids


def test_prompt_ends_where_the_answer_begins(tokenizer: Any) -> None:
    assert encoder(tokenizer).prompt(dialog("<ImageHere>a", "b", "cat")) == [
        *SYSTEM,
        *[START, *USER_ROLE, NL, IMAGE, IMAGE, IMAGE, *A, END, NL],
        *[START, *ASSISTANT_ROLE, NL, *B, END, NL],
        *[START, *USER_ROLE, NL, *CAT, END, NL],
        *[START, *ASSISTANT_ROLE, NL],
    ]


def test_markup_prompt(tokenizer: Any) -> None:
    markup = "<|im_start|>user\n<ImageHere>a<|im_end|>\n<|im_start|>assistant\n"
    assert encoder(tokenizer).prompt_from_markup(markup) == [
        *[START, *USER_ROLE, NL, IMAGE, IMAGE, IMAGE, *A, END, NL, START, *ASSISTANT_ROLE, NL]
    ]


# With three ids an image: the image fills 22 to 24, "a" is 25, the answer "b" stands at 33.


@pytest.mark.parametrize("length", [34, 35, 36, 99])
def test_truncation_keeps_what_fits(tokenizer: Any, length: int) -> None:
    whole = encoder(tokenizer).encode(dialog("<ImageHere>a", "b"))
    cut = encoder(tokenizer, max_txt_len=length).encode(dialog("<ImageHere>a", "b"))
    assert len(whole.input_ids) == 36
    lost = max(36 - length, 0)
    assert cut == Encoded(whole.input_ids[:length], whole.labels[:length], cut_tokens=lost)
    assert cut.labels[33] == B[0]


@pytest.mark.parametrize(("length", "lost"), [(50, 0), (48, 0), (47, 1), (44, 1), (36, 1), (35, 1)])
def test_answers_that_are_cut_are_counted(tokenizer: Any, length: int, lost: int) -> None:
    """The second answer stands at 47 of 50 ids."""
    talk = dialog("<ImageHere>a", "b", "a", "b")
    whole = encoder(tokenizer).encode(talk)
    assert (len(whole.input_ids), whole.labels[47], whole.cut_answers) == (50, B[0], 0)
    cut = encoder(tokenizer, max_txt_len=length).encode(talk)
    assert (cut.cut_tokens, cut.cut_answers) == (50 - length, lost)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (33, "no answer to learn from: the first answer starts at token 33, past max_txt_len 33; "),
        (25, "no answer to learn from: the first answer starts at token 33, past max_txt_len 25; "),
        (24, "image 1 of 1 ends at token 25, past max_txt_len 24; raise model.max_txt_len or shor"),
        (1, "image 1 of 1 ends at token 25, past max_txt_len 1; raise model.max_txt_len or short"),
    ],
)
def test_truncation_that_would_lose_too_much(tokenizer: Any, length: int, message: str) -> None:
    for mask in ("chatml_delimiters", "assistant_only"):
        with pytest.raises(DataError) as caught:
            encoder(tokenizer, 3, length, mask).encode(dialog("<ImageHere>a", "b"))
        assert str(caught.value).startswith(message)


def test_truncation_names_the_first_image_that_is_cut(tokenizer: Any) -> None:
    turns = dialog("<ImageHere>a", "b", "<ImageHere><ImageHere>", "b")
    # images end at 25, 42 and 45
    for length, number in ((44, 3), (42, 3), (41, 2), (40, 2), (24, 1)):
        with pytest.raises(DataError, match=rf"^image {number} of 3 ends at token "):
            encoder(tokenizer, 3, length).encode(turns)
    assert encoder(tokenizer, 3, 45).encode(turns).input_ids.count(IMAGE) == 3 * 3


def test_nothing_to_learn_from(tokenizer: Any) -> None:
    for turns in (dialog("a", ""), dialog("a")):
        with pytest.raises(DataError, match=r"^no answer to learn from: every answer is empty$"):
            encoder(tokenizer).encode(turns)


def test_an_empty_question_is_allowed(tokenizer: Any) -> None:
    encoded = encoder(tokenizer).encode(dialog("", "b"))
    assert encoded.input_ids[19:24] == [START, *USER_ROLE, NL, END, NL]


def test_text_is_normalized(tokenizer: Any) -> None:
    """The letter with a combining accent and the composed letter are one id."""
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [963]
