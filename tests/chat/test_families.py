"""The programs with a model of parts, whose tokenizer is another family's."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cli_demo
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.chat.command import add_chat_arguments, load_chat
from lavis.common.cli import printable
from tests.chat.conftest import PICTURES, Tab, chosen
from tests.conftest import REPO
from tests.test_parts import LANGUAGES, model_yaml, save_language

QUESTION = "图里有几个物体？ 🙂 <|im_end|>"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def arguments(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """What a user types to have such a model answer; its weights are random."""
    from lavis.models import load_model_and_preprocess

    folder = tmp_path_factory.mktemp(request.param)
    template, options = LANGUAGES[request.param]
    content = model_yaml(save_language(folder / "language", request.param, template, **options))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content | {"env": {"cache_root": str(REPO)}}), "utf-8")
    model, _, _ = load_model_and_preprocess("vlm", is_eval=True, cfg_path=path)
    torch.manual_seed(3)
    connector = {
        f"llm_proj.{n}": torch.randn_like(p) for n, p in model.connector.named_parameters()
    }
    torch.save({"model": connector}, folder / "checkpoint.pth")
    return [
        "--cfg-path", str(path), "--checkpoint", str(folder / "checkpoint.pth"),
        "--cpu-only", "--max-new-tokens", "12",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(arguments: list[str]) -> tuple[ChatEngine, ChatSettings]:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    engine, settings, toybox = load_chat(parser.parse_args(arguments))
    assert not toybox
    return engine, settings


def answers(engine: ChatEngine, settings: ChatSettings, picture: Path) -> list[str]:
    conversation = Conversation(engine, settings)
    conversation.show(picture)
    return [conversation.ask(question).read() for question in (QUESTION, "Why?")]


def test_the_terminal(
    arguments: list[str],
    loaded: tuple[ChatEngine, ChatSettings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = PICTURES / "scene.png"
    monkeypatch.setattr(sys, "argv", ["cli_demo.py", *arguments, "--image", str(picture)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nWhy?\n:undo\n:history\n"))
    assert cli_demo.main() == 0
    first, second = answers(*loaded, picture)
    expected = f"Assistant: {first}\nAssistant: {second}\n"
    expected += f"User: [scene.png] {QUESTION}\nAssistant: {first}\n"
    assert capsys.readouterr().out == printable(expected)


def test_the_web_page(loaded: tuple[ChatEngine, ChatSettings]) -> None:
    pytest.importorskip("gradio", reason="needs the extra `web`")
    from lavis.chat.web.app import WebChat

    page: Any = WebChat(*loaded)
    page.address = page.launch("127.0.0.1", 0)
    try:
        tab = Tab(page)
        tab.show(PICTURES / "scene.png")
        for question in (QUESTION, "Why?"):
            tab.ask(question, max_new_tokens=12)
        said = [exchange.answer for exchange in tab.conversation.exchanges]
        assert said == answers(*loaded, PICTURES / "scene.png")
        tab.call("retry", *chosen(num_beams=2, max_new_tokens=12))
        assert tab.conversation.exchanges[-1].finish in ("stop", "length")
    finally:
        page.close()
