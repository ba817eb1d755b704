"""The world in motion: clips in which one thing happens, and questions about it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from examples.toybox.world.questions import (
    LANGUAGES,
    Language,
    Question,
    name_of,
    place_of,
    sentence,
    with_article,
    word_for,
)
from examples.toybox.world.scenes import (
    COLOURS,
    GRID,
    HELD_OUT,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Thing,
    paint,
)

FRAMES, RATE = 5, 4  # frames of a clip, and how many there are in a second
SIDES = {"left": 3, "right": 5, "top": 1, "bottom": 7}  # cells in the middle of the grid's edges
EVENTS = ("moves", "appears", "disappears", "changes")
KINDS = (*EVENTS, "motion")
"""Kinds of question: about each event, and whether anything moves at all."""


@dataclass(frozen=True)
class Clip:
    """A scene in which one thing happens to ``actor``, while ``others`` stay as they are.

    Attributes:
        event: one of :data:`EVENTS`.
        side: where it moves to, of :data:`SIDES`.
        colour: that it changes to.
    """

    actor: Thing
    others: tuple[Thing, ...]
    event: str
    side: str = ""
    colour: str = ""

    def frame(self, number: int) -> Iterator[tuple[Thing, float, float]]:
        """Things, and how many cells right of and below their places they are."""
        yield from ((other, 0.0, 0.0) for other in self.others)
        share = number / (FRAMES - 1)
        late = share >= 0.5
        if self.event == "moves":
            along = (2.0 if self.side in ("right", "bottom") else -2.0) * share
            sideways = self.side in ("left", "right")
            yield (self.actor, along, 0.0) if sideways else (self.actor, 0.0, along)
        elif self.event == "changes":
            yield replace(self.actor, colour=self.colour) if late else self.actor, 0.0, 0.0
        elif late == (self.event == "appears"):
            yield self.actor, 0.0, 0.0


def random_clip(rng: random.Random, event: str) -> Clip:
    """Draw a clip of 1 to 3 objects, no two of one shape or of one colour."""
    count = rng.randint(1, 3)
    shapes, colours = rng.sample(SHAPES, count), rng.sample(list(COLOURS), count + 1)
    side = rng.choice(list(SIDES)) if event == "moves" else ""
    cells = list(range(GRID * GRID))
    if side:  # from the other end of a row or column, which is free
        line = rng.randrange(GRID)
        path = [line * GRID + i if side in ("left", "right") else i * GRID + line for i in range(3)]
        place = path[0] if side in ("right", "bottom") else path[-1]
        cells = [cell for cell in cells if cell not in path]
    else:
        place = cells.pop(rng.randrange(len(cells)))
    things = [
        Thing(rng.choice(list(SIZES)), colour, shape, at)
        for colour, shape, at in zip(
            colours, shapes, (place, *rng.sample(cells, count - 1)), strict=False
        )
    ]
    seen = [(t.colour, t.shape) for t in things]
    if event == "changes":
        seen.append((colours[-1], shapes[0]))
    if HELD_OUT.intersection(seen):
        return random_clip(rng, event)
    return Clip(
        things[0], tuple(things[1:]), event, side, colours[-1] if event == "changes" else ""
    )


def ask(clip: Clip, rng: random.Random, kind: str, language: Language) -> Question:
    """A question of a kind: ``motion``, or the clip's event."""
    english = language == "en"
    name, shape = name_of(clip.actor, language), word_for(clip.actor.shape, language)
    if kind == "motion":
        texts = (
            ("Does anything move?", "Is something moving?"),
            ("有东西在动吗？", "有物体移动吗？"),
        )
        answer = {"en": ("No.", "Yes."), "zh": ("没有。", "有。")}[language][clip.event == "moves"]
    elif kind == "moves":
        texts = (
            (f"To which side does the {name} move?", f"Where does the {name} go?"),
            (f"{name}往哪边移动？", f"{name}去哪里？"),
        )
        answer = sentence(place_of(SIDES[clip.side], language), language)
    elif kind == "changes":
        texts = (
            (f"What colour does the {shape} become?", f"Which colour has the {shape} at the end?"),
            (f"{shape}变成什么颜色？", f"最后{shape}是什么颜色？"),
        )
        answer = sentence(word_for(clip.colour, language), language)
    else:
        verb = "出现" if kind == "appears" else "消失"
        texts = (
            (f"What {kind}?", f"Which object {kind}?"),
            (f"什么{verb}了？", f"哪个物体{verb}了？"),
        )
        whole = name_of(clip.actor, language, size=True)
        answer = sentence(with_article(whole) if english else whole, language)
    return Question(kind, language, rng.choice(texts[0] if english else texts[1]), answer)


def make_clip(
    rng: random.Random, number: int, languages: Sequence[Language] = LANGUAGES, *, train: bool
) -> tuple[list[Image.Image], list[Question]]:
    """Frames and questions: for training three, about the event and about motion; else one.

    Kinds and languages of single questions take turns.
    """
    kind = KINDS[number % len(KINDS)]
    language = languages[number // len(KINDS) % len(languages)]
    event = kind
    if kind == "motion":
        event = "moves" if rng.random() < 0.5 else rng.choice(EVENTS[1:])
    clip = random_clip(rng, event)
    questions = [ask(clip, rng, kind, language)]
    if train:
        kinds = [event, event, "motion"]
        rng.shuffle(kinds)
        questions = [ask(clip, rng, k, rng.choice(languages)) for k in kinds]
    return draw_clip(clip, rng.randrange(2**32)), questions


def draw_clip(clip: Clip, seed: int) -> list[Image.Image]:
    """The frames; what varies a little from clip to clip stays the same within one."""
    frames = []
    for number in range(FRAMES):
        looks = (
            (thing, random.Random(f"{seed}/{thing.shape}"), right, below)
            for thing, right, below in clip.frame(number)
        )
        frames.append(paint(looks, random.Random(seed)))
    return frames


def write_video(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as MP4."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = IMAGE_SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000  # small pictures: hardly anything is lost
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
