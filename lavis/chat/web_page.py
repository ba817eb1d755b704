"""The web page's parts and looks."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lavis.chat.settings import ChatSettings
from lavis.chat.web_sessions import data_address
from lavis.chat.web_texts import LANGUAGES, TEXTS
from lavis.common.cli import TOYBOX

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
        view: what shows the conversation: messages, waiting images, the button that removes
            these, Send, Stop.
        worded: everything with words, in the order of :meth:`words`.
    """

    def __init__(self, settings: ChatSettings, language: str, *, toybox: bool) -> None:
        self._toybox = toybox
        self._words: list[tuple[Any, str, str]] = []
        texts = TEXTS[language]
        with gr.Blocks(analytics_enabled=False, title="LAVIS chat", fill_width=True) as self.demo:
            self._head(language)
            self.chat = gr.Chatbot(
                show_label=False, height="max(300px, calc(100dvh - 330px))", render_markdown=False,
                sanitize_html=True, allow_tags=False, buttons=[], latex_delimiters=[],
                placeholder=texts["empty"], elem_id="chat", feedback_options=None,
            )  # fmt: skip
            self._words.append((self.chat, "placeholder", "empty"))
            self.waiting = gr.HTML("", elem_id="waiting", padding=False)
            self.discard = self._button("discard", visible=False, elem_id="discard")
            self._entry(texts)
            with gr.Row(elem_id="tools"):
                self.retry = self._button("retry")
                self.undo = self._button("undo")
                self.clear = self._button("clear")
                self.download = self._button("download")
            self._examples()
            with gr.Accordion(texts["settings"], open=False, elem_id="settings") as accordion:
                self._words.append((accordion, "label", "settings"))
                self.settings = self._settings(settings, texts)
            # "hidden" stays in the page, so that its value reaches the browser.
            self.uploaded = gr.Textbox(visible="hidden")
            self.record = gr.Textbox(visible="hidden")
        self.view = [self.chat, self.waiting, self.discard, self.send, self.stop]
        self.worded = [component for component, _, _ in self._words]

    def words(self, language: str) -> list[Any]:
        """Updates that put ``worded`` into a language."""
        return [
            gr.update(**{attribute: self._text(language, key)}) for _, attribute, key in self._words
        ]

    def _text(self, language: str, key: str) -> str:
        if key == "title":
            return heading(language, self._toybox)
        return TEXTS[language][key]

    def _head(self, language: str) -> None:
        with gr.Row(elem_id="head"):
            self.title = gr.HTML(heading(language, self._toybox), padding=False)
            self._words.append((self.title, "value", "title"))
            choices = [(name, code) for code, name in LANGUAGES.items()]
            self.language = gr.Radio(
                choices, value=language, show_label=False, container=False, elem_id="language",
                min_width=120, scale=0,
            )  # fmt: skip

    def _entry(self, texts: dict[str, str]) -> None:
        with gr.Row(elem_id="entry", equal_height=True):
            self.add = gr.UploadButton(
                texts["add"], file_count="multiple", file_types=["image"], scale=0, min_width=90,
                elem_id="add", size="md",
            )  # fmt: skip
            self._words.append((self.add, "label", "add"))
            self.question = gr.Textbox(
                show_label=False, placeholder=texts["question"], container=False, scale=1,
                lines=1, max_lines=6, min_width=120, elem_id="question",
            )  # fmt: skip
            self._words.append((self.question, "placeholder", "question"))
            self.send = self._button("send", variant="primary", scale=0, elem_id="send", size="md")
            self.stop = self._button(
                "stop", variant="stop", scale=0, elem_id="stop", size="md", visible=False
            )

    def _examples(self) -> None:
        with gr.Row(elem_id="examples", visible=bool(EXAMPLES)):
            self.examples_title = gr.HTML(TEXTS["en"]["examples"], padding=False)
            self._words.append((self.examples_title, "value", "examples"))
            self.examples = [
                gr.Button(name, elem_id=f"example-{i}", scale=0, min_width=64, size="sm")
                for i, name in enumerate(EXAMPLES)
            ]

    def _settings(self, settings: ChatSettings, texts: dict[str, str]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        with gr.Row():
            for name in SETTINGS:
                value = getattr(settings, name)
                kind: Any = gr.Checkbox if name == "do_sample" else gr.Number
                extra: dict[str, Any] = {}
                if kind is gr.Number:
                    extra = {"step": 1 if name in WHOLE else 0.05}
                made[name] = kind(
                    value=value, label=texts[name], min_width=150, elem_id=f"set-{name}", **extra
                )
                self._words.append((made[name], "label", name))
        return made

    def _button(self, key: str, **options: Any) -> Any:
        button = gr.Button(TEXTS["en"][key], **{"size": "sm", "min_width": 70} | options)
        self._words.append((button, "value", key))
        return button


def heading(language: str, toybox: bool) -> str:
    """HTML of the page's title."""
    texts = TEXTS[language]
    note = f"<p>{texts['toybox']}</p>" if toybox else ""
    return f"<h1>{texts['title']}</h1>{note}"


def chat_html(content: str) -> Any:
    """A message's part that is HTML."""
    return gr.HTML(content, padding=False, render=False)


def theme() -> Any:
    """Colours, and fonts that the visitor's system has."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


_PICTURES = "\n".join(
    f"#example-{i} {{background-image: url({data_address(path)})}}"
    for i, path in enumerate(EXAMPLES.values())
)

CSS = (
    """
.gradio-container, .gradio-container > .main {padding: 0 !important}
.gradio-container main {max-width: 860px !important; margin: 0 auto !important; width: 100%;
  padding: 12px 16px !important}
#waiting:not(:has(.strip)) {display: none}
.gradio-container main > .wrap > .column {gap: 10px}
#head {align-items: center; flex-wrap: nowrap; justify-content: space-between}
#head > :first-child {flex: 1 1 auto; width: auto}
#head .html-container, #examples .html-container {padding: 0}
#head h1 {font-size: 1.35rem; white-space: nowrap; font-weight: 650; margin: 0}
#head p {margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: .85rem}
#language {flex: none; width: auto}
#chat .top-panel {display: none}  /* its bin would clear the page, not the conversation */
#chat .md {white-space: pre-wrap; overflow-wrap: anywhere}
#add {white-space: nowrap}
.strip {display: flex; flex-wrap: wrap; gap: 6px; align-items: center}
.strip img {height: 84px; max-width: 192px; border-radius: 8px; object-fit: cover; margin: 0;
  border: 1px solid var(--border-color-primary)}
.strip span {font-size: .85rem; color: var(--body-text-color-subdued)}
#waiting .strip img {height: 56px}
#discard {align-self: flex-start; flex: none; width: auto}
.remark {font-size: .8rem; color: var(--body-text-color-subdued); font-style: italic}
.line {font-size: .8rem; color: var(--body-text-color-subdued);
  border-top: 1px dashed var(--border-color-accent); padding-top: 4px}
#entry, #tools, #examples {flex-wrap: nowrap}
#tools button {flex: 1 1 0; min-width: 0 !important}
#examples {align-items: center; justify-content: flex-start}
#examples > .block, #examples > div:first-child {flex: none; width: auto; font-size: .85rem;
  color: var(--body-text-color-subdued)}
#examples button {font-size: 0; width: 56px; height: 56px; min-width: 56px !important; flex: none;
  background-size: cover; background-position: center; border-radius: 8px;
  border: 1px solid var(--border-color-primary)}
footer {display: none !important}
@media (max-width: 640px) {
  .gradio-container main {padding: 6px 8px !important}
  #head {position: relative}
  #head h1 {font-size: 1.1rem; line-height: 2rem}
  #language {position: absolute; right: 0; top: 0}
  #language label {padding: 4px 8px}
  #language input {display: none}
  #language label span {margin: 0}
  #language label.selected {background: var(--color-accent); color: white}
  #chat {height: max(280px, calc(100dvh - 310px)) !important}
}
"""
    + _PICTURES
)
