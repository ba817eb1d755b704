"""The web page in a headless Chromium, as a visitor uses it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat.conftest import PICTURES, wait_until

pytest.importorskip("gradio", reason="needs the extra `web`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip(
        "needs `chromium` in PATH (Debian: apt-get install chromium)", allow_module_level=True
    )

expect = playwright.expect
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # A container's root has no sandbox; the only page is our own.
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visitor:
    """A browser window, and what went over its network and console."""

    def __init__(self, browser: Any, web: Any, locale: str = "en-US") -> None:
        self.web = web
        self.context = browser.new_context(locale=locale)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page = self.tab()

    def _fault(self, error: Any) -> None:
        # A page that goes (a reload) ends Gradio's open streams, and Gradio leaves that uncaught;
        # whether the dying page still reports it is a race.
        if error.name != "AbortError":
            self.errors.append(str(error))

    def tab(self) -> Any:
        page = self.context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda r: self.hosts.add(re.sub(r"^(\w+:(//[^:/]*)?).*", r"\1", r.url)))
        page.on("pageerror", self._fault)
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        with page.expect_response(lambda r: "queue/data" in r.url):  # the page greets the server
            page.goto(self.web.address)
        expect(page.locator("#question textarea")).to_be_editable()
        return page


@pytest.fixture()
def visit(browser: Any, web: Any) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def come(locale: str = "en-US") -> Visitor:
        visitors.append(Visitor(browser, web, locale))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.context.close()
        assert visitor.errors == []
        assert visitor.hosts <= {"http://127.0.0.1", "data:", "blob:"}


def upload(page: Any, *files: Path) -> None:
    page.set_input_files("#files", files)


def waiting(page: Any) -> Any:
    return page.locator("#waiting img")


def ask(page: Any, question: str) -> None:
    expect(page.locator("#send")).to_be_visible()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def answer(page: Any, turn: int) -> Any:
    return page.locator("#chat .bot-row").nth(turn).locator(".said")


def choose(page: Any, **settings: Any) -> None:
    if not page.locator("#set-seed input").is_visible():
        page.click("#toggle")
    for name, value in settings.items():
        box = page.locator(f"#set-{name} input")
        if isinstance(value, bool):
            box.set_checked(value)
        else:
            box.fill(str(value))
            box.blur()


def test_ask_undo_and_show_a_second_image(visit: Any) -> None:
    page = visit().page
    upload(page, PICTURES / "scene.png")
    expect(waiting(page)).to_have_count(1)
    ask(page, "What colour is the star?")
    expect(answer(page, 0)).to_have_text("Blue.")
    expect(waiting(page)).to_have_count(0)
    ask(page, "图里有几个物体？")
    expect(answer(page, 1)).to_have_text("三个。")

    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#question textarea")).to_have_value("图里有几个物体？")
    expect(page.locator("#chat .bot-row")).to_have_count(1)

    upload(page, PICTURES / "pair.png")
    expect(waiting(page)).to_have_count(1)
    page.locator("#example-1").click()
    expect(waiting(page)).to_have_count(2)
    ask(page, "How many objects are there?")
    expect(page.locator("#chat .user-row").nth(1).locator("img")).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()

    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [e["images"] for e in record["exchanges"]] == [["scene.png"], ["pair.png", "four.png"]]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#chat .message")).to_have_count(0)


def test_the_answer_streams_and_stops(visit: Any, gate: threading.Semaphore) -> None:
    visitor = visit()
    page = visitor.page
    page.locator("#example-0").click()
    expect(waiting(page)).to_have_count(1)
    gate.release(4)
    ask(page, "Describe this image in detail.")
    growing = answer(page, 0)
    expect(growing).to_have_text(re.compile("^A big"))
    first = growing.inner_text()
    gate.release(4)
    expect(growing).to_have_text(re.compile(rf"^{first}.+"))
    expect(page.locator("#send")).to_be_hidden()
    page.click("#stop")
    (session,) = (s for s in visitor.web.sessions._sessions.values() if s.busy)
    wait_until(session.answer._cancelled.is_set)
    gate.release(1000)
    expect(page.locator("#chat .remark")).to_have_text("Stopped: the answer is not complete.")
    expect(growing).not_to_have_text(re.compile("bottom right"))
    expect(page.locator("#send")).to_be_visible()

    page.get_by_role("button", name="Retry").click()
    expect(growing).to_have_text(re.compile(r"^A big red circle at the top left.*right\.\s*$"))
    expect(page.locator("#chat .remark")).to_have_count(0)


def test_chinese_by_the_browser_and_by_choice(visit: Any) -> None:
    page = visit("zh-CN").page
    expect(page.locator("h1")).to_have_text("看图对话")
    page.locator("#example-0").click()
    expect(waiting(page)).to_have_count(1)
    choose(page, max_new_tokens=2)
    ask(page, "请详细描述这张图片。")
    expect(page.locator("#chat .remark")).to_have_text("已达到最长 token 数，回答被截断。")
    page.locator("#language").get_by_text("English").click()
    expect(page.locator("h1")).to_have_text("Chat about images")
    expect(page.locator("#chat .remark")).to_have_text(re.compile("The answer was cut"))
    choose(page, top_p=2)
    ask(page, "What?")
    expect(page.get_by_text(re.compile("top_p must be"))).to_be_visible()


def test_two_tabs_do_not_mix(visit: Any) -> None:
    visitor = visit()
    one, two = visitor.page, visitor.tab()
    upload(one, PICTURES / "scene.png")
    upload(two, PICTURES / "pair.png")
    for page in (one, two):
        expect(waiting(page)).to_have_count(1)
    ask(one, "How many objects are there?")
    ask(two, "How many objects are there?")
    expect(answer(one, 0)).to_have_text("Three.")
    expect(answer(two, 0)).to_have_text("Two.")
    expect(one.locator("#chat img[alt='pair.png']")).to_have_count(0)
    held = len(visitor.web.sessions)
    two.close()
    wait_until(lambda: len(visitor.web.sessions) == held - 1)


def test_bad_files_and_text_that_looks_like_html(
    visit: Any, huge_png: Path, tmp_path: Path
) -> None:
    visitor = visit()
    page = visitor.page
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes((PICTURES / "scene.png").read_bytes()[:500])
    upload(page, corrupt)
    expect(page.get_by_text(re.compile("corrupt.png: not a PNG"))).to_be_visible()
    upload(page, huge_png)
    expect(page.get_by_text(re.compile("huge.png: too many pixels"))).to_be_visible()
    expect(waiting(page)).to_have_count(0)
    text = "<img src='http://outside.example/a.png' onerror='alert(1)'> **b** $$x$$\n  <b>b</b>"
    ask(page, text)
    shown = page.locator("#chat .user-row .said")
    expect(shown.locator("*")).to_have_count(0)
    assert shown.inner_text() == text


def test_settings_keep_what_is_typed_at_once(visit: Any) -> None:
    page = visit().page
    # In the same moment in which they first appear: nothing may put the first values back.
    page.evaluate("""() => {
        document.querySelector("#toggle").click();
        const box = document.querySelector("#set-max_new_tokens input");
        box.value = "2";
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }""")
    page.locator("#example-0").click()
    expect(waiting(page)).to_have_count(1)
    ask(page, "Describe this image in detail.")
    expect(page.locator("#chat .remark")).to_have_text(re.compile("The answer was cut"))
    for name in ("do_sample", "repetition_penalty"):
        label = page.locator(f"#set-{name} label")
        assert label.evaluate("e => e.scrollWidth <= e.clientWidth")
        assert label.evaluate("e => e.scrollHeight <= e.clientHeight")


def test_paste_drop_and_take_off(visit: Any) -> None:
    page = visit().page
    content = base64.b64encode((PICTURES / "pair.png").read_bytes()).decode()
    for kind, place in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """([kind, place, content]) => {
                const blob = new Blob([Uint8Array.from(atob(content), c => c.charCodeAt(0))]);
                const data = new DataTransfer();
                data.items.add(new File([blob], `${kind}.png`, {type: "image/png"}));
                const event = new Event(kind, {bubbles: true, cancelable: true});
                Object.defineProperty(event, place, {value: data});
                document.querySelector("#question textarea").dispatchEvent(event);
            }""",
            [kind, place, content],
        )
        expect(page.locator(f"#waiting img[alt='{kind}.png']")).to_have_count(1)
    page.get_by_title("Remove paste.png").click()
    expect(waiting(page)).to_have_count(1)
    expect(page.locator("#waiting img[alt='drop.png']")).to_have_count(1)
    page.set_input_files("#files", [PICTURES / "pair.png"] * 17)
    expect(page.get_by_text("At most 16 images go with one question.")).to_be_visible()
    expect(waiting(page)).to_have_count(1)


def test_copy(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#example-0").click()
    expect(waiting(page)).to_have_count(1)
    ask(page, "What colour is the star?")
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("button.copy.done")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == "Blue."


def test_a_reload_keeps_conversation_question_and_settings(
    visit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = visit()
    page = visitor.page
    monkeypatch.setattr(visitor.web, "_grace", 60)
    page.locator("#example-0").click()
    expect(waiting(page)).to_have_count(1)
    choose(page, max_new_tokens=50)
    ask(page, "What colour is the star?")
    expect(answer(page, 0)).to_have_text("Blue.")
    expect(page.locator("#send")).to_be_visible()
    page.fill("#question textarea", "How many objects are there?")
    page.reload()
    expect(answer(page, 0)).to_have_text("Blue.")
    expect(page.locator("#question textarea")).to_have_value("How many objects are there?")
    choose(page)
    expect(page.locator("#set-max_new_tokens input")).to_have_value("50")
    page.press("#question textarea", "Enter")
    expect(answer(page, 1)).to_have_text("Three.")


def test_a_page_whose_server_was_restarted_says_so(browser: Any, toybox: Any) -> None:
    from lavis.chat.web.app import WebChat

    server = WebChat(toybox)
    server.address = server.launch("127.0.0.1", 0)
    visitor = Visitor(browser, server, "zh-CN")
    page = visitor.page
    page.locator("#example-0").click()
    expect(waiting(page)).to_have_count(1)
    server.close()
    page.fill("#question textarea", "星形是什么颜色的？")
    page.press("#question textarea", "Enter")
    expect(page.get_by_text("与服务器的连接已断开，正在重新连接……")).to_be_visible()
    again = WebChat(toybox)
    try:
        again.launch("127.0.0.1", int(server.address.rsplit(":", 1)[1].strip("/")))
        expect(page.get_by_text(re.compile("服务器已不再保存之前的对话"))).to_be_visible()
        expect(page.locator("#question textarea")).to_have_value("星形是什么颜色的？")
        expect(waiting(page)).to_have_count(0)
        page.press("#question textarea", "Enter")
        expect(page.locator("#chat .bot-row .copy")).to_have_count(1)
    finally:
        visitor.context.close()
        again.close()


def test_phone_width(visit: Any) -> None:
    page = visit().page
    page.set_viewport_size({"width": 360, "height": 700})
    expect(page.locator("#send")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
