"""The web page's server over HTTP: what it does, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import webui_demo
from lavis.common.errors import ConfigError, WeightsError
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
    tab.call("retry", *chosen(do_sample=True, temperature=0.5, seed=7))
    record = json.loads(tab.call("record")[-2]["output"]["data"][0])
    made = record["exchanges"][0]["settings"]
    assert (made["do_sample"], made["temperature"], made["seed"]) == (True, 0.5, 7)
    assert "settings" not in record
    assert record["exchanges"][0]["question"] == "How many objects are there?"
    undone = tab.call("undo")[-2]["output"]["data"]
    assert undone[0] == "How many objects are there?"
    assert len(tab.conversation.waiting) == 1
    tab.call("discard", str(tab.conversation.waiting[0].number))
    assert tab.conversation.waiting == []
    tab.call("clear")
    assert "nothing was asked" in warnings(tab.call("undo"))


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
        ({"num_beams": 2, "do_sample": True}, "A beam search does not draw tokens"),
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
    assert "The question is empty" in warnings(tab.ask("  "))
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
    icon = io.BytesIO()
    Image.new("RGB", (8, 8)).save(icon, "ICO")
    for content in (b"no image", b"", whole[: len(whole) // 2], icon.getvalue()):
        said = warnings(tab.show(("a.png", content), PICTURES / "pair.png"))
        assert said.startswith("a.png: not a PNG, JPEG, WEBP, GIF, BMP, TIFF")
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
    many = tab.upload(*[(f"{i}.png", b"") for i in range(17)])
    assert many.status_code == 400
    assert many.json()["detail"] == "At most 16 images go with one question."
    assert tab.post("ask", "a" * 300_000, *chosen()).status_code == 413
    for path in ("upload", "queue/join"):  # of a length that is not said
        assert tab.http.post(f"gradio_api/{path}", content=iter([b"{}"])).status_code == 413
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
    from lavis.chat.web.sessions import Sessions

    sessions = Sessions(toybox, ChatSettings(), limit=2)
    first = sessions.get("a")
    first.conversation.show(PICTURES / "pair.png")
    first.answer = first.conversation.ask("What?")  # being made: not idle
    sessions.get("b")
    sessions.get("c")
    assert sessions.find("b") is None
    assert sessions.find("a") is first
    assert len(sessions) == 2


def test_uploads_are_bounded_and_removed() -> None:
    from lavis.chat.web.guard import Uploads

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
    from lavis.chat.web.texts import TEXTS, accepted_language

    assert TEXTS["zh"].keys() == TEXTS["en"].keys()
    assert accepted_language("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert accepted_language("fr, en;q=0.5, zh;q=0.9") == "zh"
    assert accepted_language("de;q=a.b") == accepted_language("") == "en"
    assert accepted_language("ZH-Hant-TW;q=0.5,zhx,en-GB ; q=0.4") == "zh"
    tab = Tab(web)
    tab.http.headers["accept-language"] = "zh-CN"
    words = tab.call("load", "", "")[-2]["output"]["data"]
    assert words[0] == "zh"
    assert "发送" in json.dumps(words, ensure_ascii=False)
    tab.language = "xx"
    assert tab.call("discard", "1")[-2]["success"] is False


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "WEBP"])
def test_what_the_terminal_reads_the_page_reads(tab: Tab, kind: str) -> None:
    if kind not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow has no {kind}")
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, kind)
    assert warnings(tab.show(("photo", content.getvalue()))) == ""
    assert [i.name for i in tab.conversation.waiting] == ["photo"]
    assert "data:image/png;base64," in json.dumps(tab.call("refresh"))


def test_one_waiting_image_is_taken_off(tab: Tab) -> None:
    tab.show(PICTURES / "pair.png", PICTURES / "scene.png", PICTURES / "pair.png")
    tab.call("discard", str(tab.conversation.waiting[0].number))
    assert [i.name for i in tab.conversation.waiting] == ["scene.png", "pair.png"]
    for wrong in ("0", "[]", "{}", "x", '"1"', "null", "1e999"):
        tab.call("discard", wrong)
    assert len(tab.conversation.waiting) == 2


def test_answers_are_markdown_whose_html_is_shown_as_text(toybox: Any) -> None:
    from lavis.chat import ChatSettings, Exchange
    from lavis.chat.web.sessions import Sessions, history
    from lavis.chat.web.texts import TEXTS

    session = Sessions(toybox, ChatSettings()).get("a")
    answer = (
        "**b** <img src=x onerror=alert(1)>\n- one\n\n`<i> &amp;`\n\n|h|\n|-|\n|c|\n\n"
        "![p](http://outside.example/a.png) [l](javascript:alert(1)) [k](data:text/html,x)\n\n"
        "```\n</div><script>\n```"
    )
    question = "**q** <b>\n  y"
    session.conversation.exchanges = [Exchange(question, answer=answer, finish="stop")]
    (asked,), (said,) = (m["content"] for m in history(session, TEXTS["en"], str)[:2])
    assert asked == '<div class="said plain">**q** &lt;b&gt;\n  y</div>'
    for shown in (
        "<strong>b</strong> &lt;img src=x onerror=alert(1)&gt;",
        "<li>one</li>", "<code>&lt;i&gt; &amp;amp;</code>", "<th>h</th>", "<td>c</td>",
        "&lt;/div&gt;&lt;script&gt;",
        'data-copy="**b** &lt;img src=x onerror=alert(1)&gt;\n- one',
    ):  # fmt: skip
        assert shown in said
    for tag in ("<img", "<script", "<i>", 'href="javascript', 'href="data'):
        assert tag not in said


CHINESE = re.compile("[\u4e00-\u9fff]")
ENGLISH = re.compile(r"[A-Za-z]{2,} [A-Za-z]{2,} [A-Za-z]{2,}")


@pytest.mark.parametrize(
    ("question", "settings"),
    [
        ("What?", {"do_sample": True, "temperature": 0}),
        ("What?", {"repetition_penalty": -1}), ("What?", {"top_p": 2}), ("What?", {"top_k": -1}),
        ("What?", {"max_new_tokens": None}), ("What?", {"max_new_tokens": 0}),
        ("What?", {"max_new_tokens": 10**9}), ("What?", {"seed": 1.5}), ("What?", {"seed": -1}),
        ("What?", {"num_beams": 2, "do_sample": True}), ("What?", {"num_beams": 9}),
        ("What?", {"num_beams": 0}), ("What?", {"do_sample": "yes"}), ("What?", {"top_p": "x"}),
        ("What?", {"temperature": 10**400}), ("What?", {"temperature": True}),
        (" ", {}), ("<ImageHere> and <ImageHere>", {}), ("long " * 5000, {}),
    ],
)  # fmt: skip
def test_every_refusal_is_in_chinese_on_a_chinese_page(
    tab: Tab, question: str, settings: dict[str, Any]
) -> None:
    tab.language = "zh"
    (said,) = (m for m in tab.ask(question, **settings) if m["msg"] == "log")
    assert CHINESE.search(said["log"]) and not ENGLISH.search(said["log"])
    assert said["title"] == "无法完成"
    assert tab.web.sessions.find(tab.session).conversation.exchanges == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WeightsError("the output is secret"), "模型的输出不是数字"),
        (ConfigError("the setting is secret"), "服务器出错了"),
        (torch.OutOfMemoryError("CUDA is secret"), "内存或显存不足"),
        (MemoryError("secret"), "内存或显存不足"),
        (RuntimeError("the path is secret"), "服务器出错了"),
    ],
)
def test_no_raised_text_reaches_a_page(
    tab: Tab, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    tab.language = "zh"
    monkeypatch.setattr(tab.web._engine, "extend", fail)
    messages = tab.ask("What?")
    assert said in warnings(messages) and "secret" not in json.dumps(messages)
    monkeypatch.setattr(tab.web._engine, "encode_image", fail)
    messages = tab.show(PICTURES / "pair.png")
    assert said in warnings(messages) and "secret" not in json.dumps(messages)


def test_every_text_that_is_told_exists_in_both_languages() -> None:
    from lavis.chat.web.texts import TEXTS

    source = "".join(p.read_text("utf-8") for p in (REPO / "lavis/chat/web").glob("*.[pj]*"))
    told = re.findall(r'(?:VisitorError|_RefusedError|_session)\((?:[\w, ]+, )?"(\w+)"', source)
    told += re.findall(r'lavis\.press\("show", "(\w+)"', source)
    assert len(set(told)) > 15
    for key in {*told, *(f"bad_{name}" for name in web_page().SETTINGS)}:
        assert key in TEXTS["zh"], key
    for key, words in TEXTS["zh"].items():
        fields = [sorted(re.findall(r"{\w+}", t)) for t in (words, TEXTS["en"][key])]
        assert fields[0] == fields[1], key
        assert CHINESE.search(words) or key in ("top_p", "top_k", "num_beams"), key
        assert not CHINESE.search(TEXTS["en"][key]), key


def web_page() -> Any:
    import lavis.chat.web.app  # imports Gradio past any proxy
    from lavis.chat.web import page as web_page

    assert lavis.chat.web.app
    return web_page


def test_a_refusal_is_json_in_the_visitors_language(tab: Tab) -> None:
    tab.http.headers["accept-language"] = "zh-CN"
    for answer, status in (
        (tab.upload(("a.png", bytes(20_000_001))), 413),
        (tab.post("ask", "a" * 300_000, *chosen()), 413),
        (tab.upload(*[(f"{i}.png", b"") for i in range(17)]), 400),
        (tab.upload(*[(f"{i}.png", b"") for i in range(1001)]), 400),
        (tab.post("show", ["a"]), 400),
        (tab.http.get("gradio_api/info"), 404),
        (Tab(tab.web).http.get("gradio_api/info", headers={"accept-language": "zh"}), 404),
    ):
        assert answer.status_code == status
        assert CHINESE.search(answer.json()["detail"])
        assert answer.json()["error"] == answer.json()["detail"]
    tab.http.cookies.set("lavis_language", "en")
    assert tab.http.get("gradio_api/info").json()["detail"] == "This request is not allowed."
    tab.http.cookies.clear()
    assert "cookie" in tab.post("ask", "a", *chosen()).json()["detail"]


def test_an_event_under_way_does_not_bring_the_language_back(tab: Tab) -> None:
    tab.ask("Describe this image in detail.", max_new_tokens=2)
    tab.language = "zh"
    tab.call("translate")
    tab.language = "en"
    assert "回答被截断" in json.dumps(tab.call("refresh")[-2], ensure_ascii=False)


def test_views_are_made_one_after_another(web: Any) -> None:
    """An older view of a conversation must not come after a newer one."""
    own = {"ask", "retry", "stop", "unload", None}
    views = [fn for fn in web.demo.fns.values() if fn.name not in own]
    assert {"refresh", "undo", "show", "pick", "load"} <= {fn.name for fn in views}
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in views if fn.fn} == {("view", 1)}


def test_a_full_queue_is_explained() -> None:
    import httpx
    from starlette.responses import Response

    from lavis.chat.web.guard import Guard, Uploads

    async def ask() -> Any:
        guard = Guard(Response("busy", 503), Uploads(), "zh")
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            return await client.get("/config")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["detail"]) == (
        429, "等待回答的人太多，请稍后再试。"
    )  # fmt: skip


def test_a_restarted_server_does_not_answer_about_nothing(toybox: Any) -> None:
    from lavis.chat.web.app import WebChat

    first = WebChat(toybox)
    first.address = first.launch("127.0.0.1", 0)
    tab = Tab(first)
    app_id = tab.http.get("gradio_api/app_id").json()
    tab.show(PICTURES / "scene.png")
    tab.ask("What colour is the star?", max_new_tokens=1)
    assert tab.held == tab.session
    first.close()

    second = WebChat(toybox)
    tab.web = second
    try:
        assert second.launch("127.0.0.1", tab.http.base_url.port) == first.address
        assert tab.http.get("gradio_api/app_id").json() != app_id
        messages = tab.ask("What is left of it?")
        assert "no longer has the earlier conversation" in warnings(messages)
        assert "Your question was not sent" in warnings(messages)
        (done,) = (m for m in messages if m["msg"] == "process_completed")
        assert tab.conversation.exchanges == [] and done["success"]
        first = next(m for m in messages if m["msg"] == "process_generating")
        assert first["output"]["data"][0] == {"__type__": "update"}  # the question stays
        assert warnings(tab.ask("How many?", max_new_tokens=1)) == ""
        assert len(tab.conversation.exchanges) == 1
    finally:
        second.close()


@pytest.mark.parametrize(
    "name", ["retry", "undo", "record", "refresh", "translate", "clear", "pick"]
)
def test_a_forgotten_conversation_is_told_at_any_button(tab: Tab, name: str) -> None:
    tab.held = tab.session
    messages = tab.call(name, *(chosen() if name == "retry" else ()))
    assert warnings(messages) == (
        "The server no longer has the earlier conversation (it may have been restarted); this "
        "starts a new one."
    )


def test_a_reloaded_page_has_its_conversation(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tab.web, "_grace", 60)
    tab.show(PICTURES / "scene.png")
    tab.ask("What colour is the star?", temperature=0.5)
    kept = (tab.session, "What about")
    conversation = tab.conversation
    for wrong in ("other", 1, True):
        assert "no longer has" in warnings(tab.call("load", wrong, ""))
    assert tab.conversation is conversation
    thief = Tab(tab.web)
    assert "no longer has" in warnings(thief.call("load", *kept))

    with tab.http.stream("GET", f"gradio_api/heartbeat/{tab.session}") as stream:
        next(stream.iter_lines())
    tab.session = secrets.token_hex(6)
    messages = tab.call("load", *kept)
    shown = messages[-2]["output"]["data"]
    assert warnings(messages) == ""
    assert "Blue." in json.dumps(shown[-5]) and shown[-1] == tab.session
    assert 0.5 in shown and "What about" in shown
    assert tab.conversation is conversation


def test_a_session_is_dropped_only_if_it_stays_unused(toybox: Any) -> None:
    from lavis.chat import ChatSettings
    from lavis.chat.web.sessions import Sessions

    sessions = Sessions(toybox, ChatSettings())
    session = sessions.get("a", "client")
    left = session.used
    sessions.find("a")
    sessions.drop("a", left)
    assert sessions.find("a") is session
    assert sessions.rename("a", "b", "other") is None and sessions.rename("a", "b", "") is None
    assert sessions.rename("a", "b", "client") is session and session.name == "b"
    sessions.drop("a")
    assert sessions.find("b") is session
    sessions.drop("b", session.used)
    assert len(sessions) == 0


SERVED = """
from lavis.chat.web.server import direct, serve
before = dict(__import__("os").environ)
with direct():
    import gradio
    import httpx
    from starlette.middleware import Middleware
    from lavis.chat.web.guard import Guard, Uploads
with gradio.Blocks() as demo:
    gr = gradio.Textbox()
for host in ("127.0.0.1", "localhost", "::1", "[::1]"):
    guard = Middleware(Guard, uploads=Uploads())
    address = serve(demo, guard, host, 0, share=False, root_path="/x")
    answer = httpx.get(address + "config", trust_env=False)
    print(address.rsplit(":", 1)[0], answer.json()["root"].rsplit("/", 1)[1])
    demo.close(verbose=False)
assert dict(__import__("os").environ).items() >= before.items()
"""


def test_no_proxy_stands_before_the_page() -> None:
    proxies = {
        "http_proxy": "foo", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": ",,://[",
        "all_proxy": "socks5://127.0.0.1:9", "GRADIO_ANALYTICS_ENABLED": "False",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SERVED], cwd=REPO, env=os.environ | proxies,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "http://127.0.0.1", "x", "http://localhost", "x", "http://[::1]", "x", "http://[::1]", "x"
    ]  # fmt: skip


def test_a_tunnel_without_a_way_is_an_error() -> None:
    from lavis.chat.web.server import serve

    class Demo:
        def launch(self, **options: Any) -> Any:
            assert os.environ["no_proxy"].endswith("127.0.0.1")
            return None, "http://127.0.0.1", None

    with pytest.raises(ConfigError, match="--share: there is no tunnel"):
        serve(Demo(), None, "127.0.0.1", 1, share=True, root_path="")


def test_mistakes_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["webui_demo.py", "--port", "0"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lavis-minigpt4qwen\[web\]'"):
        webui_demo.main()
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["webui_demo.py", "--port", port])
        with pytest.raises(ConfigError, match=f"--port {port} cannot be used: another program"):
            webui_demo.main()
    for host, number, why in (
        ("127.0.0.1", 65536, "from 0 to 65535"), ("127.0.0.1", -1, "from 0 to 65535"),
        ("192.0.2.1", 0, "no such address"), ("no such host", 0, "Name or service not known"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            webui_demo.check_address(host, number)


def test_mistakes_are_found_before_anything_large_is_imported() -> None:
    code = "import sys, webui_demo; sys.exit(bool({'torch', 'gradio'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
