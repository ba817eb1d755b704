"""Token ids -> text, piece by piece."""

from __future__ import annotations

import codecs

from lavis.processors.contracts import Tokenizer


class TextStream:
    """Text of an answer that grows.

    Pieces end between characters, never inside one. Together they are :attr:`text`, which has no
    white space at its ends; special tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._space = ""

    def push(self, token: int) -> str:
        """Add a token; return what can be shown by now."""
        found = self._space + self._decoder.decode(self._tokenizer.token_bytes(token))
        if not self.text:
            found = found.lstrip()
        piece = found.rstrip()
        self._space = found[len(piece) :]  # shown when something follows
        self.text += piece
        return piece
