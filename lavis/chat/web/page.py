"""The web page's parts and looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from lavis.chat.settings import ChatSettings
from lavis.chat.web.guard import MAX_FILE_BYTES, MAX_FILES, MAX_UPLOAD_BYTES
from lavis.chat.web.sessions import data_address
from lavis.chat.web.texts import GRADIO, LANGUAGE_COOKIE, LANGUAGES, LIMITS, TEXTS, VisitorError
from lavis.common.errors import ConfigError
from lavis.common.paths import TOYBOX

SETTINGS = (
    "do_sample", "temperature", "top_p", "top_k",
    "repetition_penalty", "max_new_tokens", "seed", "num_beams",
)  # fmt: skip
WHOLE = ("top_k", "max_new_tokens", "seed", "num_beams")

EXAMPLES = {
    path.name: path
    for path in (TOYBOX / "image" / f"{name}.png" for name in ("scene", "four", "pair"))
    if path.is_file()
}
"""Pictures to try, by name."""


class Page:
    """Gradio's components, laid out; nothing happens yet.

    Attributes:
        view: what shows the conversation: messages, waiting images, Send, Stop, ``held``.
        held: the session whose conversation the page shows; "" if it shows none.
        sent: what the page's script hands over with a click of a hidden button.
        worded: everything with words, in the order of :meth:`words`.
    """

    def __init__(self, settings: ChatSettings, language: str, *, toybox: bool) -> None:
        self._toybox = toybox
        self._language = language
        self._words: list[tuple[Any, str, str]] = []
        with gr.Blocks(analytics_enabled=False, title="LAVIS chat", fill_width=True) as self.demo:
            self._head()
            self.chat = self._worded(
                gr.Chatbot, "placeholder", "empty",
                show_label=False, height="max(300px, calc(100dvh - 330px))", buttons=[],
                elem_id="chat", feedback_options=None,
            )  # fmt: skip
            self.waiting = gr.HTML("", elem_id="waiting", padding=False)
            self._entry()
            with gr.Row(elem_id="tools"):
                self.retry = self._button("retry")
                self.undo = self._button("undo")
                self.clear = self._button("clear")
                self.download = self._button("download")
            self._examples()
            # No accordion of Gradio's: when it opens first, it puts the fields' first values back
            # a moment after they can be typed in.
            self.toggle = self._button("settings", elem_id="toggle")
            with gr.Row(elem_id="settings"):
                self.settings = {name: self._setting(settings, name) for name in SETTINGS}
            # "hidden" stays in the page, so that its value reaches the browser.
            self.held = gr.Textbox(visible="hidden", elem_id="held")
            self.sent = gr.Textbox(visible="hidden")
            self.record = gr.Textbox(visible="hidden")
            self.show = gr.Button(visible="hidden", elem_id="show")
            self.discard = gr.Button(visible="hidden", elem_id="discard")
        self.view = [self.chat, self.waiting, self.send, self.stop, self.held]
        self.worded = [component for component, _, _ in self._words]

    def words(self, language: str) -> list[Any]:
        """Updates that put ``worded`` into a language."""
        return [
            gr.update(**{attribute: self._text(language, key)}) for _, attribute, key in self._words
        ]

    def _text(self, language: str, key: str) -> str:
        texts = TEXTS[language]
        if key != "title":
            return texts[key]
        note = f"<p>{texts['toybox']}</p>" if self._toybox else ""
        return f'<h1 lang="{language}">{texts["title"]}</h1>{note}'

    def _worded(self, kind: Any, attribute: str, key: str, **options: Any) -> Any:
        """A component whose ``attribute`` has words, those of ``key``."""
        component = kind(**{attribute: self._text(self._language, key)}, **options)
        self._words.append((component, attribute, key))
        return component

    def _button(self, key: str, **options: Any) -> Any:
        options = {"size": "sm", "min_width": 70} | options
        return self._worded(gr.Button, "value", key, **options)

    def _head(self) -> None:
        with gr.Row(elem_id="head"):
            self._worded(gr.HTML, "value", "title", padding=False)
            self.language = gr.Radio(
                [(name, code) for code, name in LANGUAGES.items()], value=self._language,
                show_label=False, container=False, elem_id="language", min_width=120, scale=0,
            )  # fmt: skip

    def _entry(self) -> None:
        with gr.Row(elem_id="entry", equal_height=True):
            self.add = self._button("add", scale=0, min_width=90, elem_id="add", size="md")
            self.question = self._worded(
                gr.Textbox, "placeholder", "question", show_label=False, container=False, scale=1,
                lines=1, max_lines=6, min_width=120, elem_id="question",
            )  # fmt: skip
            self.send = self._button("send", variant="primary", scale=0, elem_id="send", size="md")
            self.stop = self._button(
                "stop", variant="stop", scale=0, elem_id="stop", size="md", visible=False
            )

    def _examples(self) -> None:
        with gr.Row(elem_id="examples", visible=bool(EXAMPLES)):
            self._worded(gr.HTML, "value", "examples", padding=False)
            self.examples = [
                gr.Button(name, elem_id=f"example-{i}", scale=0, min_width=64, size="sm")
                for i, name in enumerate(EXAMPLES)
            ]

    def _setting(self, settings: ChatSettings, name: str) -> Any:
        options = {"value": getattr(settings, name), "min_width": 150, "elem_id": f"set-{name}"}
        if name == "do_sample":
            return self._worded(gr.Checkbox, "label", name, **options)
        step = 1 if name in WHOLE else 0.05
        return self._worded(gr.Number, "label", name, step=step, **options)


def chosen_settings(values: tuple[Any, ...]) -> dict[str, Any]:
    """The page's settings by name, each one checked.

    Raises:
        VisitorError: a value does not fit.
    """
    chosen = dict(zip(SETTINGS, values, strict=True))
    for name, value in chosen.items():
        if value is None and name != "seed":
            raise VisitorError("no_value", name=name)
        if name in WHOLE and isinstance(value, float) and value.is_integer():
            chosen[name] = int(value)  # a field's number is a float
        try:
            ChatSettings(**{name: chosen[name]})
        except ConfigError as error:
            raise VisitorError(f"bad_{name}") from error
    if chosen["num_beams"] > LIMITS["beams"]:
        raise VisitorError("many_beams")
    if chosen["num_beams"] > 1 and chosen["do_sample"]:
        raise VisitorError("beams_draw")
    return chosen


def chat_html(content: str) -> Any:
    """A message's part that is HTML."""
    return gr.HTML(content, padding=False, render=False)


_PICTURES = "\n".join(
    f"#example-{i} {{background-image: url({data_address(path)})}}"
    for i, path in enumerate(EXAMPLES.values())
)

_CSS = Path(__file__).with_suffix(".css")
_SCRIPT = Path(__file__).with_suffix(".js")


def looks() -> dict[str, Any]:
    """Options of the launch: colours, fonts that the visitor's system has, the page's script."""
    known = {
        "words": GRADIO, "cookie": LANGUAGE_COOKIE, "files": MAX_FILES,
        "file_bytes": MAX_FILE_BYTES, "upload_bytes": MAX_UPLOAD_BYTES,
    }  # fmt: skip
    script = f"const KNOWN = {json.dumps(known)};\n{_SCRIPT.read_text(encoding='utf-8')}"
    return {
        "theme": gr.themes.Base(
            primary_hue="blue",
            neutral_hue="slate",
            font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css": _CSS.read_text(encoding="utf-8") + _PICTURES,
        "head": f"<script>{script}</script>",
    }
