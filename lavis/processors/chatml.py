"""The chat template of first-generation Qwen."""

from __future__ import annotations

from collections.abc import Sequence

from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.processors.contracts import Kind, Piece, Turn
from lavis.processors.tokenizer import QwenTokenizer

SYSTEM_PROMPT = "You are a helpful assistant."


def text_pieces(text: str, kind: Kind, *, images: bool) -> list[Piece]:
    """A text's pieces, with those of its images if it may hold some."""
    pieces: list[Piece] = []
    for i, part in enumerate(text.split(IMAGE_PLACEHOLDER) if images else [text]):
        if i > 0:
            pieces.append(Piece(IMAGE_PLACEHOLDER, Kind.IMAGE))
        if part:
            pieces.append(Piece(part, kind))
    return pieces


class ChatML:
    """The template of first-generation Qwen::

        <|im_start|>system\\n{system}<|im_end|>\\n
        <|im_start|>user\\n{question}<|im_end|>\\n
        <|im_start|>assistant\\n{answer}<|im_end|>\\n

    Attributes:
        stops: ids at which generation stops.
    """

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        self.stops = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)

    def pieces(self, turns: Sequence[Turn], *, system: str | None, ask: bool) -> list[Piece]:
        """The pieces of a conversation. It always has a system prompt."""
        pieces: list[Piece] = []
        for role, text in [("system", SYSTEM_PROMPT if system is None else system), *turns]:
            answer = role == "assistant"
            end = Kind.END if answer else Kind.DELIMITER
            pieces += [
                *self._opening(role),
                *text_pieces(text, Kind.ANSWER if answer else Kind.TEXT, images=role == "user"),
                Piece("<|im_end|>", end),
                Piece("\n", end),
            ]
        return [*pieces, *self._opening("assistant")] if ask else pieces

    def _opening(self, role: str) -> list[Piece]:
        start = Piece("<|im_start|>", Kind.DELIMITER)
        return [start, Piece(role, Kind.MARKUP), Piece("\n", Kind.MARKUP)]
