"""Pictures of the web page for the documentation.

``python -m docs.web_screenshots --out docs/images`` starts the page with the toybox, talks
to it in a headless Chromium, and writes ``web_en.png``, ``web_zh.png`` and ``web_phone.png``. It
needs the extra ``web``, Playwright, and Chromium on the system.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from lavis.common.cli import output_folder, run_cli
from lavis.common.errors import ConfigError
from lavis.common.paths import TOYBOX

_ENGLISH = ("What colour is the star?", "How many objects are there?")
_CHINESE = ("星形是什么颜色的？", "图里有几个物体？")
_DETAIL = {"en": "Describe this image in detail.", "zh": "请详细描述这张图片。"}


def main() -> int:
    """Write the pictures, print their names."""
    parser = argparse.ArgumentParser(description="Pictures of the web page.")
    parser.add_argument("--out", type=output_folder, required=True)
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ConfigError("no chromium in PATH")

    from playwright.sync_api import sync_playwright

    from lavis.chat.command import add_chat_arguments, load_chat
    from lavis.chat.web.app import WebChat

    chat = argparse.ArgumentParser()
    add_chat_arguments(chat)
    engine, settings, toybox = load_chat(chat.parse_args(["--cpu-only"]))
    web = WebChat(engine, settings, toybox=toybox)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        address = web.launch("127.0.0.1", 0)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"]
            )  # a container's root has no sandbox; the only page is our own
            for name, language, size, questions in (
                ("web_en", "en", (1000, 860), (*_ENGLISH, _DETAIL["en"])),
                ("web_zh", "zh", (1000, 860), (*_CHINESE, _DETAIL["zh"])),
                ("web_phone", "en", (390, 780), _ENGLISH),
            ):
                path = args.out / f"{name}.png"
                _picture(browser, address, path, language, size, questions)
                print(path)
            browser.close()
    finally:
        web.close()
    return 0


def _picture(
    browser: Any,
    address: str,
    path: Path,
    language: str,
    size: tuple[int, int],
    questions: tuple[str, ...],
) -> None:
    context = browser.new_context(
        locale={"en": "en-US", "zh": "zh-CN"}[language],
        viewport={"width": size[0], "height": size[1]},
    )
    page = context.new_page()
    page.goto(address)
    page.locator("h1", has_text={"en": "Chat about", "zh": "看图"}[language]).wait_for()
    for turn, question in enumerate(questions):
        if turn == 0:
            page.set_input_files("#files", TOYBOX / "image" / "scene.png")
            page.locator("#waiting img").wait_for()
        page.fill("#question textarea", question)
        page.press("#question textarea", "Enter")
        page.locator("#chat .bot-row").nth(turn).wait_for()
        page.locator("#send").wait_for()
    page.evaluate("document.activeElement.blur()")
    page.locator("#chat .message-wrap").evaluate(
        "e => { e.parentElement.scrollTop = e.parentElement.scrollHeight }"
    )
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=path, animations="disabled")
    context.close()


if __name__ == "__main__":
    run_cli(main)
