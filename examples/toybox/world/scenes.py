"""Scenes of coloured shapes on a 3 x 3 grid, and their pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 84
GRID = 3
_CELL = IMAGE_SIZE // GRID
_SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 205, 40),
    "purple": (140, 55, 175),
    "orange": (240, 135, 30),
    "pink": (240, 140, 185),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, float] = {"big": 24.0, "small": 14.0}  # pixels across
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
COMPASS = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)  # fmt: skip

HELD_OUT = frozenset(
    (colour, SHAPES[(5 * i + 1) % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
"""(colour, shape) pairs that no picture shows in training: one of each colour."""


@dataclass(frozen=True)
class Thing:
    """One object. ``place`` counts the cells of the grid row by row."""

    size: str
    colour: str
    shape: str
    place: int

    @property
    def row(self) -> int:
        """Row, from the top."""
        return self.place // GRID

    @property
    def column(self) -> int:
        """Column, from the left."""
        return self.place % GRID


Scene = tuple[Thing, ...]
"""Objects in reading order, at most one in a cell."""


def random_scene(rng: random.Random, *, held_out: bool | None) -> Scene:
    """Draw a scene of 1 to 4 objects.

    Args:
        held_out: ``True`` for held-out (colour, shape) pairs alone, ``False`` for the others,
            ``None`` for both.
    """
    pairs = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if held_out is None or ((colour, shape) in HELD_OUT) == held_out
    ]
    places = sorted(rng.sample(range(GRID * GRID), rng.randint(1, 4)))
    return tuple(
        Thing(rng.choice(list(SIZES)), colour, shape, place)
        for place, (colour, shape) in ((p, rng.choice(pairs)) for p in places)
    )


def in_words(scene: Scene) -> list[str]:
    """The scene cell by cell: place, size, colour and shape, or that it is empty."""
    there = {t.place: f"{t.size} {t.colour} {t.shape}" for t in scene}
    return [f"{name} {there.get(place, 'empty')}" for place, name in enumerate(COMPASS)]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene; positions, sizes, colours and the background vary a little."""
    return paint(((thing, rng, 0.0, 0.0) for thing in scene), rng)


def paint(
    things: Iterable[tuple[Thing, random.Random, float, float]], rng: random.Random
) -> Image.Image:
    """Draw things on a background that varies a little.

    Args:
        things: each with what its own look is drawn from, and how many cells right of and below
            its place it is.
    """
    side = IMAGE_SIZE * _SUPERSAMPLING
    shade = rng.randint(225, 255)
    image = Image.new("RGB", (side, side), (shade, shade, shade - rng.randint(0, 12)))
    canvas = ImageDraw.Draw(image)
    for thing, look, right, below in things:
        radius = SIZES[thing.size] / 2 * look.uniform(0.92, 1.08)
        slack = max(0.0, _CELL / 2 - radius - 0.5)
        x = (thing.column + 0.5 + right) * _CELL + look.uniform(-1, 1) * min(slack, 4)
        y = (thing.row + 0.5 + below) * _CELL + look.uniform(-1, 1) * min(slack, 4)
        fill = tuple(min(255, max(0, c + look.randint(-14, 14))) for c in COLOURS[thing.colour])
        _draw_shape(canvas, thing.shape, (x, y, radius), fill)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    at: tuple[float, float, float],
    fill: tuple[int, ...],
) -> None:
    x, y, r = (v * _SUPERSAMPLING for v in at)
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * 0.42))
    elif shape == "square":
        half = r * 0.86
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "cross":
        arm = r * 0.34
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:
        canvas.polygon(_corners(shape, x, y, r), fill=fill)


def _corners(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    star = [r if i % 2 == 0 else r * 0.42 for i in range(10)]
    radii = [r] * 3 if shape == "triangle" else star
    step = 2 * math.pi / len(radii)
    return [
        (x + radius * math.sin(i * step), y - radius * math.cos(i * step))
        for i, radius in enumerate(radii)
    ]
