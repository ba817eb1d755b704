"""Conversation -> token ids and labels, in one function so that they cannot drift apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Literal

from lavis.common.errors import DataError, LavisError
from lavis.common.tiles import Grid
from lavis.common.types import IGNORE_INDEX, IMAGE_PLACEHOLDER, Encoded
from lavis.processors.chatml import SYSTEM_PROMPT, ChatML, text_pieces
from lavis.processors.contracts import ChatTemplate, Ids, Kind, Piece, Tokenizer, Turn

__all__ = [
    "DEFAULT_PROMPT", "IMAGE", "SYSTEM_PROMPT", "ChatML", "ConversationEncoder", "LabelMask",
    "Turn", "place_images", "show_all", "show_in_turns", "tiles_text",
]  # fmt: skip

IMAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
"""An image in a question, as the instruction data write it."""
_PLACE = re.compile(f"<Img>(?:{IMAGE_PLACEHOLDER}|\n)+</Img>|{IMAGE_PLACEHOLDER}")
DEFAULT_PROMPT = f"{IMAGE} Describe this image in detail."

LabelMask = Literal["chatml_delimiters", "assistant_only"]
_SUPERVISED: dict[LabelMask, frozenset[Kind]] = {
    "chatml_delimiters": frozenset({Kind.ANSWER, Kind.END, Kind.DELIMITER}),
    "assistant_only": frozenset({Kind.ANSWER, Kind.END}),
}


def place_images(text: str, pictures: Sequence[str]) -> str:
    """A question with places for its images: in front, unless it names them itself.

    Args:
        pictures: the placeholders of each.

    Raises:
        DataError: it names more or fewer.
    """
    named = text.count(IMAGE_PLACEHOLDER)
    if named not in (0, len(pictures)):
        raise DataError(
            f"the question names {named} images ({IMAGE_PLACEHOLDER}), but {len(pictures)} are new "
            "in it"
        )
    return show_all(text if named or not pictures else f"{IMAGE * len(pictures)} {text}", pictures)


def show_all(text: str, pictures: Sequence[str]) -> str:
    """A text each of whose placeholders becomes those that a video or a picture in tiles needs."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    return first + "".join(shown + part for shown, part in zip(pictures, rest, strict=True))


def show_in_turns(turns: Iterable[Turn], pictures: Iterable[str]) -> tuple[Turn, ...]:
    """Turns each of whose user's placeholders becomes those of the next picture."""
    left = iter(pictures)
    return tuple(
        Turn(role, show_all(text, list(islice(left, text.count(IMAGE_PLACEHOLDER)))))
        if role == "user"
        else Turn(role, text)
        for role, text in turns
    )


def tiles_text(grid: Grid) -> str:
    """The placeholders of a picture: the whole, then each row of its tiles on a new line."""
    rows = grid.rows if grid.tiles else 0
    return IMAGE_PLACEHOLDER + ("\n" + IMAGE_PLACEHOLDER * grid.columns) * rows


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations for training and prompts for generation.

    Attributes:
        tokenizer: gives ids.
        template: gives the characters, and whose they are.
        num_query_token: ids that stand for one image.
        max_txt_len: longest training example, in ids.
        label_mask: ``chatml_delimiters`` supervises the answers and the template's special tokens,
            as the original does; ``assistant_only`` supervises the answers and what ends them.
        system: the system prompt; with None the template's own.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    num_query_token: int
    max_txt_len: int = 512
    label_mask: LabelMask = "chatml_delimiters"
    system: str | None = None

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Encode a training example, cut at ``max_txt_len``.

        Raises:
            DataError: if the cut would lose an image or leave no answer token to learn from.
        """
        ids, kinds = encoded = self._encode(turns)
        limit, width = self.max_txt_len, self.num_query_token
        images = [n for n, kind in enumerate(kinds, start=1) if kind is Kind.IMAGE]
        ends = images[width - 1 :: width]
        if late := [(n, end) for n, end in enumerate(ends, start=1) if end > limit]:
            raise DataError(
                f"image {late[0][0]} of {len(ends)} ends at token {late[0][1]}, past max_txt_len "
                f"{limit}; raise model.max_txt_len or shorten the text before it"
            )
        said = [kind is Kind.ANSWER for kind in kinds]
        starts = [n for n, one in enumerate(said) if one and not (n and said[n - 1])]
        if not starts:
            raise DataError("no answer to learn from: every answer is empty")
        if starts[0] >= limit:
            raise DataError(
                f"no answer to learn from: the first answer starts at token {starts[0]}, past "
                f"max_txt_len {limit}; raise model.max_txt_len or shorten the question"
            )
        return Encoded(
            ids[:limit],
            self._labels(encoded)[:limit],
            cut_tokens=max(len(ids) - limit, 0),
            cut_answers=sum(start >= limit for start in starts),
        )

    def constant_prefix(self) -> tuple[list[int], list[int]]:
        """Ids and labels that every conversation begins with, at most up to the first question."""
        probes: list[list[Piece]] = []
        for question in ("a", "b", IMAGE_PLACEHOLDER, ""):
            turns = [Turn("user", question), Turn("assistant", "c")]
            for some, ask in ((turns, False), ([*turns, *turns], False), (turns[:1], True)):
                probes.append(self.template.pieces(some, system=self.system, ask=ask))
        same = takewhile(lambda column: len(set(column)) == 1, zip(*probes, strict=False))
        prefix = self.tokenizer.settled([column[0] for column in same])
        return prefix.ids, self._labels(prefix)

    def check_system(self, system: str) -> None:
        """Refuse a record's system prompt unless every conversation begins with it anyway.

        The template decides: its own prompt may be part of its markup.

        Raises:
            DataError: it would be lost.
        """
        own = self.prompt([Turn("user", "?")])
        with suppress(LavisError):  # the template takes none
            same = replace(self, system=system).prompt([Turn("user", "?")]) == own
            if same and system.strip() in self.tokenizer.decode(own):
                return
        begin = self.tokenizer.decode(self.constant_prefix()[0])
        raise DataError(
            "has a `system` prompt of its own, but every conversation begins with "
            f"{begin!r:.300}; write it into the question"
        )

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation that ends with a question, up to where the answer begins."""
        return self._encode(turns, ask=True).ids

    def latest(
        self, history: Sequence[tuple[str, str]], query: str, room: int, start: int = 0
    ) -> tuple[list[int], int]:
        """The prompt of a question with as many of the latest exchanges as ``room`` tokens hold.

        Images of those left out stay: they move to the beginning of the oldest text that is left.

        Args:
            start: how many of the oldest are left out in any case.

        Returns:
            The prompt's ids, more than ``room`` if the images and the question alone are, and how
            many of the oldest exchanges are left out.
        """
        for dropped in range(start, len(history) + 1):
            kept = [
                t for q, a in history[dropped:] for t in (Turn("user", q), Turn("assistant", a))
            ]
            first, *rest = [*kept, Turn("user", query)]
            images = [place for q, _ in history[:dropped] for place in _PLACE.findall(q)]
            if images:
                moved = "".join(IMAGE if i == IMAGE_PLACEHOLDER else i for i in images)
                first = Turn("user", f"{moved} {first.text}")
            prompt = self.prompt([first, *rest])
            if len(prompt) <= room:
                break
        return prompt, dropped

    def prompt_from_markup(self, text: str) -> list[int]:
        """Ids of a prompt in the template's markup, as the original's ``generate`` takes it.

        Special tokens in ``text`` are markup: never call it on what a user typed.
        """
        return self._expand(text_pieces(text, Kind.MARKUP, images=True)).ids

    def _encode(self, turns: Sequence[Turn], *, ask: bool = False) -> Ids:
        return self._expand(self.template.pieces(turns, system=self.system, ask=ask))

    def _expand(self, pieces: Sequence[Piece]) -> Ids:
        """Ids and kinds of pieces; an image has ``num_query_token``."""
        result = Ids([], [])
        for i, kind in zip(*self.tokenizer.encode_pieces(pieces), strict=True):
            number = self.num_query_token if kind is Kind.IMAGE else 1
            result.ids.extend([i] * number)
            result.kinds.extend([kind] * number)
        return result

    def _labels(self, encoded: Ids) -> list[int]:
        learn = _SUPERVISED[self.label_mask]
        return [i if kind in learn else IGNORE_INDEX for i, kind in zip(*encoded, strict=True)]
