"""The chat template of first-generation Qwen."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.processors.contracts import Kind, Piece, Turn
from lavis.processors.tokenizer import QwenTokenizer

SYSTEM_PROMPT = "You are a helpful assistant."


def text_pieces(text: str, kind: Kind, *, images: bool) -> list[Piece]:
    """A text's pieces, with those of its images if it may hold some."""
    parts = re.split(f"({IMAGE_PLACEHOLDER})", text) if images else [text]
    return [Piece(part, Kind.IMAGE if i % 2 else kind) for i, part in enumerate(parts) if part]


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
