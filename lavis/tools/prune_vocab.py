"""Prune a Qwen vocabulary to what a corpus needs.

Every text of the corpus is encoded into the same tokens as before: the kept set holds each token
that a merge makes on the way, and ranks keep their order, so that byte-pair encoding takes the
same steps. All 256 bytes stay, so any other text can still be encoded.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import regex
from tqdm import tqdm

from lavis.common.cli import output_file, run_cli, setup_logging
from lavis.common.errors import DataError, raised_as
from lavis.common.paths import require, user_path
from lavis.processors.conversation import SYSTEM_PROMPT
from lavis.processors.tokenizer import SPLIT_PATTERN, normalize, read_ranks


def main() -> int:
    """Read a corpus and a vocabulary, write the pruned vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", required=True, type=user_path, help="a qwen.tiktoken file")
    parser.add_argument("--out", required=True, type=output_file, help="the file to write")
    parser.add_argument(
        "--corpus", required=True, nargs="+", action="extend", type=user_path,
        help="texts: .json or .jsonl (every string value counts) or plain text",
    )  # fmt: skip
    args = parser.parse_args()
    setup_logging()
    for path in args.corpus:
        require(path, "--corpus", DataError)
    ranks = read_ranks(args.vocab)
    texts = (text for path in args.corpus for text in read_texts(path))
    kept = prune(tqdm(texts, desc="reading", unit=" texts"), ranks)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(kept))
    args.out.write_text("".join(lines), encoding="ascii")
    print(f"{args.out}: {len(kept)} of {len(ranks)} tokens")
    return 0


def prune(texts: Iterable[str], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Tokens to keep, in order of rank.

    Args:
        texts: the corpus; the words of the chat template are added to it.
        ranks: the full vocabulary.
    """
    split = regex.compile(SPLIT_PATTERN)
    words: set[str] = set()
    for text in chain(("system", "user", "assistant", "\n", SYSTEM_PROMPT), texts):
        words.update(split.findall(normalize(text)))
    kept = {bytes([i]) for i in range(256)}
    for word in words:
        kept.update(merges(word.encode(), ranks))
    return sorted(kept, key=lambda token: ranks[token])


def merges(word: bytes, ranks: Mapping[bytes, int]) -> Iterator[bytes]:
    """Every token that byte-pair encoding makes on its way through a word."""
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [
            (ranks[pair], i)
            for i, pair in enumerate(a + b for a, b in pairwise(parts))
            if pair in ranks
        ]
        if not pairs:
            return
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield parts[i]


def read_texts(path: Path) -> Iterator[str]:
    """Every text in a file.

    Raises:
        DataError: the file is not valid JSON.
    """
    text = path.read_text(encoding="utf-8")
    with raised_as(DataError, f"{path} is not valid JSON", ValueError):
        if path.suffix == ".json":
            yield from _strings(json.loads(text))
        elif path.suffix == ".jsonl":
            for line in text.splitlines():
                yield from _strings(json.loads(line))
        else:
            yield from text.splitlines(keepends=True)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


if __name__ == "__main__":
    run_cli(main)
