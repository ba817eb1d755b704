"""Which parts of a large picture are shown beside the whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from lavis.common.errors import ConfigError
from lavis.common.typed import Checked, ranged


class Grid(NamedTuple):
    """How a picture is cut: resized to ``columns * side`` x ``rows * side`` pixels."""

    columns: int
    rows: int
    side: int

    @property
    def tiles(self) -> int:
        """How many are shown beside the whole; none of a picture that is one tile."""
        count = self.columns * self.rows
        return count if count > 1 else 0


@dataclass(frozen=True)
class TilesConfig(Checked):
    """``preprocess.tiles``: a picture is shown whole and, if it is large, again in parts.

    Each takes as many tokens as an image. A new line stands before each row of parts.

    Attributes:
        max: most parts of a picture; 1: it is shown whole only.
        max_tokens: of a picture, its parts together.
    """

    max: int = ranged(1, least=1)
    max_tokens: int | None = ranged(None, least=1)

    def within(self, tokens: int, limit: int, key: str) -> TilesConfig:
        """The same with ``max_tokens`` met by fewer parts, of so many tokens each.

        Args:
            limit: tokens that ``key`` leaves to a picture.

        Raises:
            ConfigError: the whole picture and two parts do not fit, or it may pass ``limit``.
        """
        most = self.max
        if most > 1 and self.max_tokens is not None:
            if self.max_tokens < 3 * tokens:
                raise ConfigError(
                    f"preprocess.tiles.max_tokens is {self.max_tokens}, but a picture takes "
                    f"{tokens} tokens and its parts, two at least, as many each: {3 * tokens}. "
                    "Raise it, take a connector that gives an image fewer, or set "
                    "preprocess.tiles.max: 1"
                )
            most = min(most, self.max_tokens // tokens - 1)
        if most > 1 and (most + 1) * tokens >= limit:
            raise ConfigError(
                f"preprocess.tiles.max is {self.max}: a picture may take {most + 1} x {tokens} "
                f"tokens, but {key} is {limit}; lower it, or set preprocess.tiles.max_tokens"
            )
        return replace(self, max=most)

    def grid(self, width: int, height: int, side: int) -> Grid:
        """The grid of a picture: the one that distorts it least, of these the finest.

        None enlarges the picture by more than a third.

        Args:
            width, height: pixels, upright.
            side: pixels of a part, the vision encoder's image size.
        """

        def rank(columns: int, rows: int) -> tuple[Fraction, int]:
            wide, high = columns * height, rows * width
            return Fraction(max(wide, high), min(wide, high)), -columns * rows

        most = [max(4 * pixels // (3 * side), 1) for pixels in (width, height)]
        fits = [
            (columns, rows)
            for columns in range(1, min(most[0], self.max) + 1)
            for rows in range(1, min(most[1], self.max // columns) + 1)
        ]
        return Grid(*min(fits, key=lambda fit: rank(*fit)), side)
