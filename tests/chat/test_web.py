"""The web page's server over HTTP: what it does, and what it refuses."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import webui_demo
from lavis.common.errors import ConfigError
from tests.chat.conftest import PICTURES, Tab, chosen, wait_until, warnings
from tests.conftest import REPO

pytest.importorskip("gradio", reason="needs the extra `web`")


@pytest.fixture()
def tab(web: Any) -> Tab:
    return Tab(web)


def test_a_conversation(tab: Tab) -> None:
    tab.show(PICTURES / "scene.png")
    tab.ask("What colour is the star?")
    tab.ask("图里有几个物体？")
    answers = [(e.answer, e.finish) for e in tab.conversation.exchanges]
    assert answers == [("Blue.", "stop"), ("三个。", "stop")]
    assert [i.name for i in tab.conversation.images] == ["scene.png"]


def test_two_sessions_do_not_mix(web: Any) -> None:
    one, two = Tab(web), Tab(web)
    one.show(PICTURES / "scene.png")
    two.call("pick")
    two.show(PICTURES / "pair.png")
    one.ask("What colour is the star?")
    assert [e.text for e in one.conversation.exchanges] == ["What colour is the star?"]
    assert two.conversation.exchanges == []
    assert [i.name for i in two.conversation.waiting] == ["scene.png", "pair.png"]


def test_undo_retry_clear_and_record(tab: Tab) -> None:
    tab.show(PICTURES / "scene.png")
    tab.ask("How many objects are there?")
    tab.call("retry", *chosen())
    assert len(tab.conversation.exchanges) == 1
    record = json.loads(tab.call("record")[-2]["output"]["data"][0])
    assert record["exchanges"][0]["question"] == "How many objects are there?"
    undone = tab.call("undo")[-2]["output"]["data"]
    assert undone[0] == "How many objects are there?"
    assert len(tab.conversation.waiting) == 1
    tab.call("discard", str(tab.conversation.waiting[0].number))
    assert tab.conversation.waiting == []
    tab.call("clear")
    assert "nothing was asked yet" in warnings(tab.call("undo"))


def test_stop_ends_generation_and_the_conversation_goes_on(
    tab: Tab, gate: threading.Semaphore
) -> None:
    tab.show(PICTURES / "scene.png")
    gate.release(5)

    def stop_at_text(message: Any) -> None:
        if message["msg"] == "process_generating" and "big" in json.dumps(message):
            threading.Thread(target=tab.stop).start()
            answer = tab.web.sessions.find(tab.session).answer
            wait_until(answer._cancelled.is_set)
            gate.release(1000)

    messages = tab.ask("Describe this image in detail.", each=stop_at_text)
    exchange = tab.conversation.exchanges[0]
    assert exchange.finish == "cancelled"
    assert exchange.answer.startswith("A big")
    assert "bottom right" not in exchange.answer
    assert "Stopped: the answer is not complete." in json.dumps(messages)
    tab.ask("What colour is the star?")
    assert tab.conversation.exchanges[1].finish == "stop"


def test_an_answer_that_is_cut_says_so(tab: Tab) -> None:
    messages = tab.ask("Describe this image in detail.", max_new_tokens=2)
    assert tab.conversation.exchanges[0].finish == "length"
    assert "The answer was cut" in json.dumps(messages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0}, "temperature must be"),
        ({"top_p": 2}, "top_p must be"),
        ({"max_new_tokens": None}, "max_new_tokens has no value"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"num_beams": 2, "do_sample": True}, "beam search does not draw tokens"),
        ({"num_beams": 9}, "num_beams is at most 8"),
        ({"max_new_tokens": 10**9}, "0 fit"),
    ],
)
def test_a_wrong_setting_is_explained(tab: Tab, settings: dict[str, Any], message: str) -> None:
    assert message in warnings(tab.ask("What?", **settings))
    assert tab.conversation.exchanges == []


def test_a_setting_without_effect_is_named(tab: Tab) -> None:
    said = warnings(tab.ask("What?", temperature=2.0, max_new_tokens=1))
    assert said == "Without drawing at random these have no effect: temperature"


def test_beams_and_an_empty_question(tab: Tab) -> None:
    assert "the question is empty" in warnings(tab.ask("  "))
    tab.show(PICTURES / "scene.png")
    tab.ask("What colour is the star?", num_beams=2)
    assert tab.conversation.exchanges[0].answer == "Blue."


def test_text_is_shown_as_text(tab: Tab) -> None:
    messages = tab.ask("<img src=http://x.example/a.png> <b>", max_new_tokens=1)
    shown = json.dumps(messages[-2])
    assert "&lt;img src=http://x.example/a.png&gt; &lt;b&gt;" in shown
    assert "<img" not in shown
    tab.show(('"><script>.png', (PICTURES / "pair.png").read_bytes()))
    assert "<script>" not in json.dumps(tab.call("refresh"))


def test_no_file_can_be_fetched(tab: Tab) -> None:
    name = tab.upload(PICTURES / "scene.png").json()[0]
    folder = tab.web.uploads.folder
    assert (folder / name).is_file()
    assert folder.stat().st_mode & 0o077 == 0
    for path in (name, f"{folder}/{name}", "/etc/passwd", f"{REPO}/README.md", "http://127.0.0.1"):
        assert tab.http.get(f"gradio_api/file={path}").status_code == 404
        assert tab.http.get(f"gradio_api/file/{path}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/info", "gradio_api/openapi.json", "gradio_api/deep_link?session_hash=a",
        "gradio_api/proxy=http://127.0.0.1", "monitoring", "monitoring/summary", "docs",
        "gradio_api/runs", "gradio_api/token", "openapi.json", "assets/../config",
        "gradio_api/stream/a/b/1/playlist.m3u8",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_closed(tab: Tab, path: str) -> None:
    assert tab.http.get(path).status_code in (403, 404) or path == "assets/../config"
    assert tab.http.post("gradio_api/call/ask", json={"data": []}).status_code == 404
    assert tab.http.post("gradio_api/process_recording").status_code == 404


def test_only_own_uploads_are_used(web: Any, tab: Tab) -> None:
    other = Tab(web)
    foreign = other.upload(PICTURES / "scene.png").json()[0]
    full = str(web.uploads.folder / foreign)
    for name in (foreign, full, "/etc/passwd", str(PICTURES / "four.png"), f"../{foreign}", ""):
        messages = tab.call("show", json.dumps([name]))
        assert warnings(messages) == "This file was not uploaded from this page."
        assert tab.conversation.waiting == []
    other.call("show", json.dumps([foreign]))
    assert len(other.conversation.waiting) == 1
    assert not (web.uploads.folder / foreign).exists()
    again = other.call("show", json.dumps([foreign]))
    assert "not uploaded" in warnings(again)


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:1/a.png"])
def test_a_file_reference_is_refused(tab: Tab, path: str) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert tab.post("show", file).status_code == 400
    assert tab.post("show", [file]).status_code == 400
    assert tab.post("show", file, "", path="gradio_api/run/predict").status_code == 400


def test_a_session_belongs_to_its_browser(web: Any, tab: Tab) -> None:
    tab.ask("What colour is the star?", max_new_tokens=1)
    thief = Tab(web)
    thief.session = tab.session
    assert thief.post("record").status_code == 403
    url = f"gradio_api/queue/data?session_hash={tab.session}"
    assert thief.http.get(url).status_code == 403
    assert thief.http.get(f"gradio_api/heartbeat/{tab.session}").status_code == 403
    thief.http.cookies.clear()
    assert thief.post("record").status_code == 403
    assert thief.upload(PICTURES / "pair.png").status_code == 403


def test_a_file_that_is_no_image(tab: Tab) -> None:
    before = set(tab.web.uploads.folder.iterdir())
    whole = (PICTURES / "scene.png").read_bytes()
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    for content in (b"no image", b"", whole[: len(whole) // 2], tiff.getvalue()):
        said = warnings(tab.show(("a.png", content), PICTURES / "pair.png"))
        assert said.startswith("a.png: not a PNG, JPEG, WEBP, GIF or BMP image")
        assert str(tab.web.uploads.folder) not in said
    assert {i.name for i in tab.conversation.waiting} == {"pair.png"}
    assert set(tab.web.uploads.folder.iterdir()) == before


def test_a_bomb_is_refused(tab: Tab, huge_png: Path) -> None:
    assert huge_png.stat().st_size < 1_000_000
    assert (
        warnings(tab.show(huge_png)) == "huge.png: too many pixels, at most 50 million are allowed."
    )
    assert tab.conversation.waiting == []


def test_large_requests_are_refused(tab: Tab) -> None:
    assert tab.upload(("a.png", bytes(20_000_001))).status_code == 413
    assert tab.upload(*[(f"{i}.png", bytes(17_000_000)) for i in range(5)]).status_code == 413
    assert tab.upload(*[(f"{i}.png", b"") for i in range(17)]).status_code == 400
    assert tab.post("ask", "a" * 300_000, *chosen()).status_code == 413
    tab.show(*[PICTURES / "pair.png"] * 16)
    assert "At most 16 images" in warnings(tab.show(PICTURES / "pair.png"))


def test_the_page_names_no_path_and_no_other_host(tab: Tab) -> None:
    page, config = tab.http.get("/"), tab.http.get("config").text
    for text in (page.text, config):
        assert str(REPO) not in text
        assert str(tab.web.uploads.folder) not in text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert tab.web.demo.analytics_enabled is False
    assert tab.http.post("gradio_api/queue/join", content=b"[").status_code == 400


def test_a_tab_that_goes_away_is_forgotten(tab: Tab) -> None:
    tab.call("pick")
    conversation = tab.conversation
    with tab.http.stream("GET", f"gradio_api/heartbeat/{tab.session}") as stream:
        next(stream.iter_lines())
    wait_until(lambda: tab.web.sessions.find(tab.session) is None)
    wait_until(lambda: conversation.images == [])
    assert "no longer has the earlier conversation" in warnings(tab.call("pick"))
    assert warnings(tab.call("pick")) == ""


def test_the_session_idle_longest_goes(toybox: Any) -> None:
    from lavis.chat import ChatSettings
    from lavis.chat.web_sessions import Sessions

    sessions = Sessions(toybox, ChatSettings(), limit=2)
    first = sessions.get("a")[0]
    first.conversation.show(PICTURES / "pair.png")
    first.answer = first.conversation.ask("What?")  # being made: not idle
    sessions.get("b")
    sessions.get("c")
    assert sessions.find("b") is None
    assert sessions.find("a") is first
    assert sessions.get("b")[1] is True
    assert len(sessions) == 2


def test_uploads_are_bounded_and_removed() -> None:
    from lavis.chat.web_guard import Uploads

    uploads = Uploads()
    names = [uploads.add("client", "../../a\n.png", b"x") for _ in range(70)]
    assert len(list(uploads.folder.iterdir())) == 32
    assert uploads.take("client", names[0]) is None
    taken = uploads.take("client", names[-1])
    assert taken is not None
    assert taken[1] == "a.png"
    uploads.close()
    assert not uploads.folder.exists()


def test_languages(web: Any) -> None:
    from lavis.chat.web_texts import TEXTS, accepted_language

    assert TEXTS["zh"].keys() == TEXTS["en"].keys()
    assert accepted_language("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert accepted_language("fr, en;q=0.5, zh;q=0.9") == "zh"
    assert accepted_language("de;q=a.b") == "en"
    tab = Tab(web)
    tab.http.headers["accept-language"] = "zh-CN"
    words = tab.call("load")[-2]["output"]["data"]
    assert words[0] == "zh"
    assert "发送" in json.dumps(words, ensure_ascii=False)
    assert tab.call("ask", "xx", "What?", *chosen())[-2]["success"] is False


def test_mistakes_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["webui_demo.py", "--port", "0"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lavis-minigpt4qwen\[web\]'"):
        webui_demo.main()
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["webui_demo.py", "--port", port])
        with pytest.raises(ConfigError, match=f"--port {port} cannot be used"):
            webui_demo.main()


def test_mistakes_are_found_before_anything_large_is_imported() -> None:
    code = "import sys, webui_demo; sys.exit(bool({'torch', 'gradio'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
