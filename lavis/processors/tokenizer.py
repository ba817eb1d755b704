"""The first-generation Qwen tokenizer on tiktoken."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from lavis.common.errors import WeightsError
from lavis.processors.contracts import Ids, Kind, Piece

# Split pattern and special tokens of the Qwen tokenizer; the ranks come from the user's file.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXTRA = (f"<|extra_{i}|>" for i in range(205))
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_EXTRA)


class QwenTokenizer:
    """Byte-pair encoding of NFC-normalized text with 208 special tokens after the merges.

    Attributes:
        path: the vocabulary file.
        vocab_size: ids in use.
        eod_id: ``<|endoftext|>``.
        pad_id: the same.
        im_start_id: ``<|im_start|>``, opens a ChatML turn.
        im_end_id: ``<|im_end|>``, closes it.
        image_id: ``<|extra_0|>``, holds the place of image features; never comes out of text.
    """

    def __init__(self, vocab_file: Path) -> None:
        """Read a ``qwen.tiktoken`` file.

        Raises:
            WeightsError: if the file is missing or not a list of tokens and ranks.
        """
        ranks = read_ranks(vocab_file)
        self.path = vocab_file
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(_SPECIAL)}
        self._encoding = tiktoken.Encoding(
            vocab_file.name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.vocab_size = self._encoding.n_vocab
        self.eod_id = self.pad_id = self.special_tokens["<|endoftext|>"]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self.image_id = self.special_tokens["<|extra_0|>"]

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(normalize(text))

    def encode_markup(self, text: str) -> list[int]:
        """Encode text whose special tokens are markup. Never call it on what a user typed."""
        return self._encoding.encode(normalize(text), allowed_special="all")

    def encode_pieces(self, pieces: Sequence[Piece]) -> Ids:
        result = Ids([], [])
        for text, kind in pieces:
            if kind is Kind.IMAGE:
                new = [self.image_id]
            elif kind in (Kind.TEXT, Kind.ANSWER):
                new = self.encode(text)
            else:
                new = self.encode_markup(text)
            result.ids.extend(new)
            result.kinds.extend([kind] * len(new))
        return result

    def settled(self, pieces: Sequence[Piece]) -> Ids:
        """All of them: each piece is encoded on its own."""
        return self.encode_pieces(pieces)

    def token_bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token) if token < self.eod_id else b""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            ids = (i for i in ids if i < self.eod_id)
        return self._encoding.decode(list(ids), errors="replace")


def normalize(text: str) -> str:
    """The text as the vocabulary knows it: NFC."""
    return unicodedata.normalize("NFC", text)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a ``qwen.tiktoken`` file: a base64 token and its rank a line.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    if not path.is_file():
        raise WeightsError(f"no vocabulary {path}; it comes with the language model's weights")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise WeightsError(f"{path}:{number}: not a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise WeightsError(f"{path}: the ranks are not 0 to {len(ranks) - 1} without gaps")
    if absent := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise WeightsError(
            f"{path} lacks {absent} of the 256 single bytes: cut short, or no vocabulary of Qwen"
        )
    return ranks
