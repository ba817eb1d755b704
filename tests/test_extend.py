"""What docs/extend.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis.common.errors import DataError
from lavis.common.registry import CONNECTORS, METRICS
from lavis.common.types import Reference
from lavis.models.config import HfConfig
from lavis.models.language.parts import _own_template
from lavis.processors.contracts import Turn
from lavis.processors.hf_tokenizer import FastTokenizer
from lavis.processors.proof import check
from lavis.processors.templates import TokenizerTemplate
from lavis.tasks.scoring import Prediction, score
from tests.processors.families import FAMILIES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extend.md").read_text(encoding="utf-8")


def write_page(folder: Path, monkeypatch: Any) -> None:
    """Write the page's modules, under another package's name: other tests have a my_pkg too."""
    package = folder / "extend_page"
    package.mkdir()
    for name, text in re.findall(r"```python\n# my_pkg/(\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (package / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))


def test_template_is_that_of_chatml(tmp_path: Path, monkeypatch: Any) -> None:
    write_page(tmp_path, monkeypatch)
    folder = FAMILIES["chatml"].save(tmp_path / "llm")
    tokenizer = FastTokenizer.load(folder, 1000)
    config = HfConfig("hf", path=str(folder), template="extend_page.my_module:MyTemplate")
    own = _own_template(config.template or "", tokenizer, "model.language.template")
    assert check(own, tokenizer) == []
    theirs = TokenizerTemplate(tokenizer)
    turns = [Turn("user", "<ImageHere>Hi <|im_end|>"), Turn("assistant", "Yes."), Turn("user", "?")]
    for system in (None, "Be brief."):
        for number in (1, 2, 3):
            some, ask = turns[:number], number % 2 == 1
            ours = own.pieces(some, system=system, ask=ask)
            expected = theirs.pieces(some, system=system, ask=ask)
            assert tokenizer.encode_pieces(ours) == tokenizer.encode_pieces(expected)


def test_connector_gives_as_many_tokens_as_it_says(tmp_path: Path, monkeypatch: Any) -> None:
    write_page(tmp_path, monkeypatch)
    __import__("extend_page.mean")
    kind = CONNECTORS.get("mean")
    config = CONNECTORS.config("mean")("mean", of=4)
    assert kind.tokens(config, 32) == 8
    assert kind(config, 6, 10)(torch.ones(2, 32, 6)).shape == (2, 8, 10)


def test_score_has_a_sheet_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    write_page(tmp_path, monkeypatch)
    __import__("extend_page.within")
    reference = Reference(score="within", dataset="counting")
    said = [("11.", "10."), ("12", "10"), ("many", "3"), ("3", "3")]
    asked = [Prediction("id", "q", "-", "?", *pair, "", reference=reference) for pair in said]
    assert score(asked)["sheets"] == {"counting": {"all": {"within": 50.0, "count": 4}}}
    assert [p.right for p in asked] == [True, False, False, True]
    with pytest.raises(DataError, match="must be a number, not 'many'"):
        METRICS.get("within").check("many", reference)
