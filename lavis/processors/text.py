"""Text -> text."""

from __future__ import annotations

import re
from collections.abc import Callable

from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.processors.config import BaseInstructionConfig, BaseTextConfig, BlipCaptionConfig


class BaseInstruction:
    """Leaves an instruction as it is."""

    def __init__(self, config: BaseInstructionConfig) -> None:
        self.config = config

    def __call__(self, text: str) -> str:
        return text


class BaseText:
    """Lower case, at most ``max_words`` words."""

    def __init__(self, config: BaseTextConfig) -> None:
        self.config = config

    def __call__(self, text: str) -> str:
        return _first_words(text.lower().rstrip(" "), self.config.max_words)


class BlipCaption:
    """Lower case, punctuation to spaces, at most ``max_words`` words, after ``prompt``."""

    def __init__(self, config: BlipCaptionConfig) -> None:
        self.config = config

    def __call__(self, text: str) -> str:
        text = re.sub(r"""([.!"()*#:;~])""", " ", text.lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return self.config.prompt + _first_words(text, self.config.max_words)


_IMAGES = re.compile(rf"((?:(?<!\s)\s+)?(?:<Img>\s*)?(?:{IMAGE_PLACEHOLDER})+(?:\s*</Img>)?\s*)")


def process_around_images(processor: Callable[[str], str], text: str) -> str:
    """Apply a text processor to each stretch of a question between images, and to nothing else."""
    parts = _IMAGES.split(text)  # stretches of text at even places
    return "".join(
        part if i % 2 or (not part and len(parts) > 1) else processor(part)
        for i, part in enumerate(parts)
    )


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split(" ")[:count])
