"""The chat template of first-generation Qwen."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.processors.contracts import Kind, Piece, Turn
from lavis.processors.tokenizer import QwenTokenizer

SYSTEM_PROMPT = "You are a helpful assistant."
_TYPED = f"\ue000{secrets.token_hex(8)}\ue001"  # a name nobody can type


def as_typed(text: str) -> str:
    """A user's text in which ``<ImageHere>`` is characters like any other: :func:`text_pieces`
    makes no image's place of it."""
    return text.replace(IMAGE_PLACEHOLDER, _TYPED)


def text_pieces(text: str, kind: Kind, *, images: bool) -> list[Piece]:
    """A text's pieces, with those of its images if it may hold some."""
    parts = re.split(f"({IMAGE_PLACEHOLDER})", text) if images else [text]
    kinds = (Kind.IMAGE if i % 2 else kind for i in range(len(parts)))
    typed = (part.replace(_TYPED, IMAGE_PLACEHOLDER) for part in parts)
    return [Piece(part, kind) for part, kind in zip(typed, kinds, strict=True) if part]


class ChatML:
    """The template of first-generation Qwen, which always has a system prompt::

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>\\n
    """

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        self.stops = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)

    def pieces(self, turns: Sequence[Turn], *, system: str | None, ask: bool) -> list[Piece]:
        def opening(role: str) -> list[Piece]:
            start = Piece("<|im_start|>", Kind.DELIMITER)
            return [start, Piece(role, Kind.MARKUP), Piece("\n", Kind.MARKUP)]

        pieces: list[Piece] = []
        for role, text in [("system", SYSTEM_PROMPT if system is None else system), *turns]:
            answer = role == "assistant"
            said, end = (Kind.ANSWER, Kind.END) if answer else (Kind.TEXT, Kind.DELIMITER)
            pieces += [*opening(role), *text_pieces(text, said, images=role == "user")]
            pieces += [Piece("<|im_end|>", end), Piece("\n", end)]
        return [*pieces, *opening("assistant")] if ask else pieces
