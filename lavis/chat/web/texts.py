"""The web page's words, in Chinese and in English."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = {"zh": "中文", "en": "English"}

_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TEXTS: dict[str, dict[str, str]] = {
    code: {key: words[code] for key, words in _WORDS.items()} for code in LANGUAGES
}
GRADIO = {code: {k: v for k, v in texts.items() if k[0].isupper()} for code, texts in TEXTS.items()}
"""What Gradio's own script may say, as the page puts it."""

LIMITS = {
    "files": 16,
    "file_mb": 20,
    "upload_mb": 80,
    "megapixels": 50,
    "video_gigapixels": 10,
    "beams": 8,
}
LANGUAGE_COOKIE = "lavis_language"


class VisitorError(Exception):
    """What a visitor is told: the key of a text, and its values."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key)
        self.key, self.values = key, values

    def text(self, language: str) -> str:
        """In the visitor's language."""
        return TEXTS[language][self.key].format(**LIMITS, **self.values)


def language_of(request: Any, default: str) -> str:
    """The language a visitor chose, else the page's ``default``, or the browser's for ``auto``."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    if chosen in LANGUAGES:
        return str(chosen)
    if default != "auto":
        return default
    return accepted_language(request.headers.get("accept-language", ""))


def accepted_language(header: str) -> str:
    """The interface language for a browser's ``Accept-Language`` header."""
    found = re.findall(
        r"(?:^|,)\s*(zh|en)\b[\w-]*\s*(?:;\s*q\s*=\s*([01](?:\.\d+)?))?", header, re.I
    )
    # Of equal weights the first one counts.
    return str(max(found, key=lambda pair: float(pair[1] or 1), default=("en", ""))[0].lower())
