"""What the task ``toybox`` asks, shows and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavis.common.images import open_image
from lavis.processors.conversation import IMAGE
from lavis.tasks.scoring import DESCRIPTION, normalize

_IMAGES = Path("cache/toybox/demo/image")


def questions(split: Any) -> Any:
    """All records but descriptions, which exact match does not suit."""
    return split.filter(lambda record: record["kind"] != DESCRIPTION)


def pictures(record: dict[str, Any]) -> list[Any]:
    """The record's picture."""
    return [open_image(_IMAGES / record["image"])]


def question(record: dict[str, Any]) -> str:
    """The question without the picture's place, which the model's own prompt has."""
    return record["instruction"].removeprefix(f"{IMAGE} ")


def process_results(record: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Exact match as evaluate.py counts it."""
    return {"exact": float(normalize(answers[0]) == normalize(record["output"]))}
