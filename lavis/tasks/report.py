"""A picture of answers: test images and videos with question, answer and truth."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from lavis.common.cli import printable
from lavis.common.videos import preview
from lavis.tasks.scoring import Prediction
from lavis.tasks.sheets import grouped

logger = logging.getLogger(__name__)
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Heiti SC",
    "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip


def draw_answers(
    predictions: Sequence[Prediction], path: Path, *, columns: int = 5, rows: int = 4
) -> None:
    """Draw a grid of answers, right ones in green and wrong ones in red.

    The kinds and languages take turns, so that the grid is like the split. Chinese is shown where
    a font for it is installed; elsewhere the grid shows English and the log says so.
    """
    from matplotlib.figure import Figure

    font = _cjk_font()
    asked = [p for p in _take_turns(predictions) if not p.skipped]
    shown = [p for p in asked if p.image and (font or _is_latin(p))]
    if font is None and len(shown) < len(asked):
        logger.info("%s shows English only: no font with Chinese characters is installed", path)
    shown = shown[: columns * rows]
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(2.5 * columns, 2.55 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    family = [font, "DejaVu Sans"] if font else ["DejaVu Sans"]
    for axes in grid:
        axes.set_axis_off()
    for axes, prediction in zip(grid, shown, strict=False):
        axes.imshow(preview(Path(prediction.image)))
        verdict = "" if prediction.right else f"\n(truth: {_wrapped(prediction.truth)})"
        axes.set_title(
            f"{_wrapped(prediction.question)}\n{_wrapped(prediction.answer)}{verdict}",
            fontsize=8,
            color="darkgreen" if prediction.right else "firebrick",
            family=family,
        )
    figure.savefig(path, dpi=110)


def _take_turns(predictions: Sequence[Prediction]) -> list[Prediction]:
    groups = grouped(predictions, lambda p: (p.kind, p.language)).values()
    return [p for turn in zip_longest(*groups) for p in turn if p is not None]


def _wrapped(text: str, width: int = 34) -> str:
    if not text.isascii():
        width //= 2
    return "\n".join(textwrap.wrap(printable(text).replace("$", r"\$"), width)) or "(nothing)"


def _is_latin(prediction: Prediction) -> bool:
    text = prediction.question + prediction.answer + prediction.truth
    return all(ord(c) < 0x2E80 or c == "\ufffd" for c in text)


def _cjk_font() -> str | None:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CJK_FONTS if name in installed), None)
