"""What a tokenizer and a chat template promise.

A template says which characters a conversation becomes and who each of them belongs to; a tokenizer
makes ids of them. Only markup may become special tokens: a text of a user, of a system prompt or of
an answer never does, whatever it looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Literal, NamedTuple, Protocol


class Turn(NamedTuple):
    """What one side says. Only a user's text can hold image placeholders."""

    role: Literal["user", "assistant"]
    text: str


class Kind(Enum):
    """Whose characters a piece holds, and so whether they are supervised."""

    MARKUP = auto()
    """Of the template; never supervised."""
    DELIMITER = auto()
    """A special token of the template outside the answers; supervised under the mask
    ``chatml_delimiters`` alone, as the first-generation Qwen recipe does."""
    TEXT = auto()
    """A user's or the system prompt's words; never supervised."""
    ANSWER = auto()
    """An answer's words; supervised."""
    END = auto()
    """What the model writes around an answer's words, above all the token at which generation
    stops; supervised."""
    IMAGE = auto()
    """The place of one image; never supervised."""


class Piece(NamedTuple):
    """Characters of one kind. An image's are ``<ImageHere>``."""

    text: str
    kind: Kind


class Ids(NamedTuple):
    """Token ids and, in a list as long, their kinds."""

    ids: list[int]
    kinds: list[Kind]


class ChatTemplate(Protocol):
    """Conversation -> pieces.

    Attributes:
        stops: ids at which generation stops; the token that ends an answer is one of them.
    """

    @property
    def stops(self) -> tuple[int, ...]: ...

    def pieces(self, turns: Sequence[Turn], *, system: str | None, ask: bool) -> list[Piece]:
        """The pieces of a conversation.

        Args:
            system: the system prompt; with None the template's own, if it has one.
            ask: end where the next answer begins.

        Raises:
            ConfigError: the template takes no system prompt.
            DataError: the template refuses the conversation.
        """
        ...


class Tokenizer(Protocol):
    """Pieces -> ids.

    Attributes:
        image_id: stands where an image's features go. No text gives it.
        pad_id: fills up; always masked.
    """

    @property
    def image_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; what looks like a special token is ordinary characters."""
        ...

    def encode_pieces(self, pieces: Sequence[Piece]) -> Ids:
        """Ids of a conversation and whose they are; an image is one ``image_id``."""
        ...

    def settled(self, pieces: Sequence[Piece]) -> Ids:
        """The first ids of ``pieces`` that stay whatever pieces follow."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, maybe a part of a character; none for a special token."""
        ...
