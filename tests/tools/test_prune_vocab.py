"""A pruned vocabulary encodes its corpus as the full one does, and still encodes everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavis.processors.tokenizer import QwenTokenizer, read_ranks
from lavis.tools.prune_vocab import prune, read_texts
from tests.conftest import TOY

FULL = TOY / "cache" / "ckpt" / "Qwen7B-chat" / "qwen.tiktoken"
CORPUS = ["Describe the red square in detail.", "图片里有一只猫。", "two cats next to a table\n\n"]


@pytest.fixture()
def pruned(tmp_path: Path) -> QwenTokenizer:
    import base64

    kept = prune(CORPUS, read_ranks(FULL))
    path = tmp_path / "qwen.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(kept)))
    return QwenTokenizer(path)


def test_corpus_and_template_split_into_the_same_pieces(pruned: QwenTokenizer) -> None:
    full = QwenTokenizer(FULL)
    assert pruned.vocab_size < full.vocab_size
    for text in (*CORPUS, "system", "user", "assistant", "You are a helpful assistant."):
        pieces = [[t.decode([i]) for i in t.encode(text)] for t in (full, pruned)]
        assert pieces[0] == pieces[1]


def test_other_text_survives(pruned: QwenTokenizer) -> None:
    text = "Ünlike änything 以前 🐱"
    assert pruned.decode(pruned.encode(text)) == text


def test_reads_every_string_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"q": ["one", {"x": "two"}], "n": 3}]')
    assert list(read_texts(path)) == ["one", "two"]
