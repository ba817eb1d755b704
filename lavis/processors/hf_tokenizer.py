"""Any tokenizer that Transformers loads without remote code.

Text is kept apart from markup by names nobody can type: the tokenizer's copy that encodes knows
each special token under a random name, and only what a template wrote is translated into these
names before a conversation is encoded, whole and at once. So the ids are those of
``apply_chat_template(tokenize=True)``, merges across markup and prefix blanks included, while
``<|im_end|>`` in a user's text is characters like any other.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lavis.common.errors import ConfigError, WeightsError
from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.processors.contracts import Ids, Kind, Piece

_Json = dict[str, Any]
"""A part of ``tokenizer.json``."""
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_BY_PRECEDENCE = (Kind.ANSWER, Kind.END, Kind.TEXT, Kind.DELIMITER, Kind.MARKUP)
"""The kind of a token that covers characters of several."""


class FastTokenizer:
    """A tokenizer of Transformers: byte-level BPE, or SentencePiece with bytes to fall back on.

    Attributes:
        path: the folder, or the GGUF file.
        hf: Transformers' own, which also renders the chat template; knows ``<ImageHere>``.
        rows: of the model's embedding.
        vocab_size: ids in use.
        image_id: of ``<ImageHere>``: past the tokenizer's and the model's rows, so that no text
            gives it and no output can pick it.
        pad_id: the tokenizer's padding token if the model has a row for it, or the end token.
        markup: the tokens that only markup gives, and whether each is special.
        markup_ids: their ids.
        eos: ids that end a text, of the tokenizer and of ``generation_config.json``.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, rows: int, path: Path) -> None:
        """Take over a loaded tokenizer.

        Raises:
            WeightsError: the model has too few rows, or the tokenizer is of a kind whose tokens'
                bytes are not known.
        """
        self.hf, self.rows, self.path = hf, rows, path
        words = hf.backend_tokenizer.get_vocab(with_added_tokens=False).values()
        if words and max(words) >= rows:
            raise WeightsError(
                f"{path}: the tokenizer has {max(words) + 1} tokens, the language model {rows} rows"
            )
        added = hf.backend_tokenizer.get_added_tokens_decoder()
        # An added token past the model's rows (gemma-3-1b has one) is never in use.
        self.vocab_size = 1 + max(i for i in {*words, *added} if i < rows)
        self.image_id = max(rows, 1 + max({*words, *added}))
        hf.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)])
        self._theirs = {self.image_id: hf.convert_tokens_to_ids(IMAGE_PLACEHOLDER)}
        self._added = hf.backend_tokenizer.get_added_tokens_decoder()
        self._guard(json.loads(hf.backend_tokenizer.to_str()))
        self.eos = tuple(dict.fromkeys(i for i in _eos(hf, path) if 0 <= i < rows))
        pads = [i for i in (hf.pad_token_id, *self.eos) if i is not None and i < rows]
        self.pad_id = pads[0] if pads else 0

    @classmethod
    def load(cls, path: Path, rows: int) -> FastTokenizer:
        """Read a folder's tokenizer or a GGUF file's, as :func:`read_tokenizer`.

        Args:
            rows: of the model's embedding.
        """
        return cls(read_tokenizer(path), rows, path)

    def split(self, text: str) -> list[str]:
        """Take a text apart at what looks like one of :attr:`markup`."""
        return [part for part in self._tokens.split(text) if part]

    def encode(self, text: str) -> list[int]:
        ids = self._guarded.encode(_well_formed(text), add_special_tokens=False).ids
        return [self._ids.get(i, i) for i in ids]

    def encode_markup(self, text: str) -> list[int]:
        """Ids of markup, special tokens included. Never call it on what a user typed."""
        return self.encode_pieces([Piece(text, Kind.MARKUP)]).ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> Ids:
        """Ids and kinds of pieces, encoded as one string.

        A token that covers characters of several kinds belongs to the answer, if one is among them.

        Raises:
            ConfigError: a normalizer of this tokenizer hides special tokens.
        """
        characters: list[str] = []
        kinds: list[Kind] = []  # one a character
        marks: list[Kind] = []  # one an added token
        for text, kind in pieces:
            names = {} if kind in (Kind.TEXT, Kind.ANSWER) else self._names
            for part in self.split(text) if names else [_well_formed(text)]:
                new = names.get(part, part)
                characters.append(new)
                kinds += [kind] * len(new)
                marks += [kind] * (part in names and part != self._unknown)
        encoding = self._guarded.encode("".join(characters), add_special_tokens=False)
        if sum(token in self._marks for token in encoding.ids) != len(marks):
            raise ConfigError(f"{self.path}: the tokenizer does not find its own special tokens")
        next_mark = iter(marks)
        result = Ids([], [])
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            covered = kinds[start : max(end, start + 1)] or kinds[-1:]
            # An added token may take blanks of its neighbours with it; it stays what it was.
            is_mark = token in self._marks
            kind = next(next_mark) if is_mark else min(covered, key=_BY_PRECEDENCE.index)
            result.ids.append(self._ids.get(token, token))
            result.kinds.append(kind)
        return result

    def settled(self, pieces: Sequence[Piece]) -> Ids:
        """The ids up to the last added token: what follows cannot merge with what stands before."""
        ids, kinds = self.encode_pieces(pieces)
        end = max((n for n, i in enumerate(ids, start=1) if i in self.markup_ids), default=0)
        return Ids(ids[:end], kinds[:end])

    def with_image_id(self, ids: Iterable[int]) -> list[int]:
        """Ids of Transformers' own tokenizer, with ours for an image."""
        ours = {theirs: image for image, theirs in self._theirs.items()}
        return [ours.get(i, i) for i in ids]

    def names(self, ids: Iterable[int]) -> list[str]:
        """How the vocabulary spells ids, for a message."""
        return [str(self.hf.backend_tokenizer.id_to_token(self._theirs.get(i, i))) for i in ids]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        known = [self._theirs.get(i, i) for i in ids if i < self.vocab_size or i in self._theirs]
        return str(self.hf.backend_tokenizer.decode(known, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        if token >= self.vocab_size or (token in self._added and self._added[token].special):
            return b""
        name = self.hf.backend_tokenizer.id_to_token(token)
        return b"" if name is None else self._bytes_of(name)

    def _guard(self, state: _Json) -> None:
        """Build the copy that encodes, with added tokens under names that nobody can type."""
        key = secrets.token_hex(8)
        markup = [t for t in state["added_tokens"] if _is_markup(t)]
        self._names = {t["content"]: f"\ue000{key}-{n}\ue001" for n, t in enumerate(markup)}
        self.markup = {t["content"]: bool(t["special"]) for t in markup}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        for token in markup:
            token |= {"content": self._names[token["content"]], "single_word": False}
        self._unknown = _rename(state["model"], self._names)
        # Not the post-processor: it would add tokens, and trim blanks from the offsets.
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self._guarded = Backend.from_str(json.dumps(state))
        self._bytes_of = _byte_rule(state["decoder"], self.path)
        vocab = self._guarded.get_vocab()
        added = zip(self._added.values(), self.with_image_id(self._added), strict=True)
        self._ids = {vocab[self._names.get(t.content, t.content)]: i for t, i in added}
        """Ids of added tokens in the copy -> the model's."""
        self._marks = frozenset(vocab[n] for t, n in self._names.items() if t != self._unknown)
        self.markup_ids = frozenset(self._ids[i] for i in self._marks)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Transformers' tokenizer of a folder or a GGUF file. Code that lies in a folder is never run.

    Raises:
        WeightsError: there is none, it is damaged, or it needs code of its own.
    """
    if not path.exists():
        raise WeightsError(f"no tokenizer: {path} does not exist")
    kinds = [AutoTokenizer]
    folder, options = path, {}
    if path.is_file():  # needs no model's class: the file says all
        kinds = [PreTrainedTokenizerFast]
        folder, options = path.parent, {"gguf_file": path.name}
    elif (path / "tokenizer.json").is_file():  # serves where the folder's code would be run
        kinds.append(PreTrainedTokenizerFast)
    failure: Exception | None = None
    for kind in kinds:
        try:
            hf = kind.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # noqa: BLE001  (a parser of Rust raises plain Exception)
            failure = failure or error
            continue
        if isinstance(hf, PreTrainedTokenizerFast):
            hf.chat_template = hf.chat_template or _template_of_processor(folder)
            return hf
        failure = failure or TypeError(f"{type(hf).__name__} is no fast tokenizer")
    raise WeightsError(
        f"{path}: no tokenizer that can be used without running code from the folder "
        f"({type(failure).__name__}: {str(failure).strip().splitlines()[0]}); it needs "
        "tokenizer.json: load it where you trust its code and save_pretrained() it here"
    ) from failure


def _template_of_processor(folder: Path) -> str | None:
    """The chat template where older processors keep it; Transformers reads the newer places.

    Raises:
        WeightsError: the file is damaged.
    """
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file}: no JSON object with a chat_template") from error


def _is_markup(token: _Json) -> bool:
    """Whether an added token is markup: not blanks, and not an ordinary word or character."""
    text = str(token["content"]).replace("▁", " ")
    return not text.isspace() and (token["special"] or not (text.isalnum() or len(text) == 1))


def _rename(model: _Json, names: dict[str, str]) -> str | None:
    """Rename tokens of a vocabulary, unlearn merges to and from them; give the unknown token."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(word, word): i for word, i in vocab.items()}
    else:  # a unigram model's pairs of token and score
        model["vocab"] = [[names.get(word, word), score] for word, score in vocab]
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = vocab[model["unk_id"]][0]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(str(unknown), unknown)
    return unknown


def _byte_rule(decoder: _Json | None, path: Path) -> Callable[[str], bytes]:
    """How a token's name spells its bytes."""
    types = set(re.findall(r'"type": "(\w+)"', json.dumps(decoder)))
    if "ByteLevel" in types:
        return _byte_level
    if types & {"Metaspace", "ByteFallback"}:
        return _sentencepiece
    raise WeightsError(f"{path}: neither a byte-level nor a SentencePiece tokenizer")


def _byte_level(name: str) -> bytes:
    return bytes(_BYTES[c] for c in name) if _BYTES.keys() >= set(name) else name.encode()


def _sentencepiece(name: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    return name.replace("▁", " ").encode()


def _well_formed(text: str) -> str:
    """The text with half surrogate pairs, which JSON can hold, replaced as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _eos(hf: PreTrainedTokenizerFast, path: Path) -> list[int]:
    """End tokens, the tokenizer's first."""
    file = path / "generation_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        more = settings.get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{file}: not a JSON object") from error
    ids = [hf.eos_token_id, *(more if isinstance(more, list) else [more])]
    return [i for i in ids if isinstance(i, int)]
