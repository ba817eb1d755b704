"""Questions and answers about a scene, in Chinese and English."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from examples.toybox.world.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, in_words

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

_ZH_COLOUR = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "pink": "粉色",
    "black": "黑色",
}
_ZH_SHAPE = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
    "ring": "圆环",
}
_ZH_SIZE = {"big": "大", "small": "小"}
_ZH_PLACE = ["左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"]
_NUMBER = {
    "en": ("Zero", "One", "Two", "Three", "Four"),
    "zh": ("零个", "一个", "两个", "三个", "四个"),
}
_DIRECTION = {
    "left": ("To the left.", "左边。"),
    "right": ("To the right.", "右边。"),
    "above": ("Above.", "上面。"),
    "below": ("Below.", "下面。"),
}


@dataclass(frozen=True)
class Question:
    """A question with its one right answer."""

    kind: str
    language: Language
    question: str
    answer: str


Maker = Callable[[Scene, random.Random, Language], tuple[str, str] | None]


def ask(scene: Scene, rng: random.Random, kind: str, language: Language) -> Question | None:
    """Make a question of a kind, or ``None`` if the scene does not allow one."""
    made = KINDS[kind](scene, rng, language)
    return None if made is None else Question(kind, language, *made)


def _pick(rng: random.Random, language: Language, en: tuple[str, ...], zh: tuple[str, ...]) -> str:
    return rng.choice(en if language == "en" else zh)


def name_of(thing: Thing, language: Language, *, size: bool = False) -> str:
    """``red circle`` or, with its size, ``big red circle``."""
    if language == "en":
        return f"{thing.size + ' ' if size else ''}{thing.colour} {thing.shape}"
    prefix = f"{_ZH_SIZE[thing.size]}的" if size else ""
    return f"{prefix}{_ZH_COLOUR[thing.colour]}{_ZH_SHAPE[thing.shape]}"


def word_for(word: str, language: Language) -> str:
    """A colour or a shape in a language."""
    return word if language == "en" else (_ZH_COLOUR | _ZH_SHAPE)[word]


def place_of(place: int, language: Language) -> str:
    """A cell of the grid in a language."""
    return PLACES[place] if language == "en" else _ZH_PLACE[place]


def with_article(noun: str) -> str:
    """``a ring``, ``an orange ring``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sentence(text: str, language: Language) -> str:
    """With a capital letter and a full stop."""
    return text[0].upper() + text[1:] + ("." if language == "en" else "。")


def _unique(scene: Scene, rng: random.Random, *keys: str) -> Thing | None:
    """An object that no other matches in all of the named attributes."""

    def key(thing: Thing) -> tuple[str, ...]:
        return tuple(getattr(thing, k) for k in keys)

    candidates = [t for t in scene if sum(key(o) == key(t) for o in scene) == 1]
    return rng.choice(candidates) if candidates else None


def _ask_colour(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    thing = _unique(scene, rng, "shape")
    if thing is None:
        return None
    shape = word_for(thing.shape, language)
    question = _pick(
        rng,
        language,
        (
            f"What colour is the {shape}?",
            f"Which colour does the {shape} have?",
            f"Tell me the colour of the {shape}.",
        ),
        (f"{shape}是什么颜色？", f"图里的{shape}是什么颜色的？", f"请说出{shape}的颜色。"),
    )
    return question, sentence(word_for(thing.colour, language), language)


def _ask_shape(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    thing = _unique(scene, rng, "colour")
    if thing is None:
        return None
    colour = word_for(thing.colour, language)
    question = _pick(
        rng,
        language,
        (
            f"What shape is the {colour} object?",
            f"Which shape does the {colour} thing have?",
            f"Name the shape of the {colour} object.",
        ),
        (
            f"{colour}的物体是什么形状？",
            f"图里{colour}的东西是什么形状的？",
            f"请说出{colour}物体的形状。",
        ),
    )
    shape = word_for(thing.shape, language)
    return question, sentence(with_article(shape) if language == "en" else shape, language)


def _ask_size(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    thing = _unique(scene, rng, "colour", "shape")
    if thing is None:
        return None
    name = name_of(thing, language)
    question = _pick(
        rng,
        language,
        (f"Is the {name} big or small?", f"What size is the {name}?", f"How large is the {name}?"),
        (f"{name}是大还是小？", f"{name}有多大？", f"请说出{name}的大小。"),
    )
    return question, sentence(thing.size if language == "en" else _ZH_SIZE[thing.size], language)


def _ask_count(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    what = rng.choice(("all", "colour", "shape"))
    if what == "all":
        count = len(scene)
        noun = "objects" if language == "en" else "物体"
    else:
        # Mostly something that is there; sometimes nothing is.
        present = [getattr(t, what) for t in scene]
        value = rng.choice(
            present if rng.random() < 0.8 else list(COLOURS if what == "colour" else SHAPES)
        )
        count = present.count(value)
        if language == "en":
            noun = (
                f"{value} objects"
                if what == "colour"
                else value + ("es" if value == "cross" else "s")
            )
        else:
            noun = f"{_ZH_COLOUR[value]}的物体" if what == "colour" else _ZH_SHAPE[value]
    question = _pick(
        rng,
        language,
        (f"How many {noun} are there?", f"Count the {noun}.", f"How many {noun} do you see?"),
        (f"图里有几个{noun}？", f"有多少个{noun}？", f"数一数{noun}有几个。"),
    )
    return question, sentence(_NUMBER[language][count], language)


def _ask_yesno(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    thing = rng.choice(scene)
    yes = rng.random() < 0.5
    colour, shape = thing.colour, thing.shape
    if not yes:  # one attribute is changed, so that both must be seen
        while any((t.colour, t.shape) == (colour, shape) for t in scene):
            if rng.random() < 0.5:
                colour, shape = rng.choice(list(COLOURS)), thing.shape
            else:
                colour, shape = thing.colour, rng.choice(SHAPES)
    name = name_of(Thing(thing.size, colour, shape, 0), language)
    question = _pick(
        rng,
        language,
        (
            f"Is there {with_article(name)}?",
            f"Do you see {with_article(name)} in the picture?",
            f"Does the picture show {with_article(name)}?",
        ),
        (f"图里有{name}吗？", f"有没有{name}？", f"你看到{name}了吗？"),
    )
    answers = {"en": ("Yes.", "No."), "zh": ("有。", "没有。")}[language]
    return question, answers[0 if yes else 1]


def _ask_where(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    thing = _unique(scene, rng, "colour", "shape")
    if thing is None:
        return None
    name = name_of(thing, language)
    question = _pick(
        rng,
        language,
        (
            f"Where is the {name}?",
            f"In which place is the {name}?",
            f"Tell me where the {name} is.",
        ),
        (f"{name}在哪里？", f"{name}在图的什么位置？", f"请说出{name}的位置。"),
    )
    return question, sentence(place_of(thing.place, language), language)


def _ask_naming(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    thing = rng.choice(scene)
    place = place_of(thing.place, language)
    question = _pick(
        rng,
        language,
        (
            f"What is at the {place}?",
            f"Which object is at the {place}?",
            f"Name the object at the {place}.",
        ),
        (f"{place}是什么？", f"{place}有什么物体？", f"请说出{place}的物体。"),
    )
    name = name_of(thing, language, size=True)
    return question, sentence(with_article(name) if language == "en" else name, language)


def _ask_relation(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    pairs = [
        (a, b)
        for a in scene
        for b in scene
        if (a.row == b.row) != (a.column == b.column)
        and all(sum((o.colour, o.shape) == (t.colour, t.shape) for o in scene) == 1 for t in (a, b))
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    if a.row == b.row:
        direction = "left" if a.column < b.column else "right"
    else:
        direction = "above" if a.row < b.row else "below"
    one, other = name_of(a, language), name_of(b, language)
    question = _pick(
        rng,
        language,
        (
            f"Where is the {one} relative to the {other}?",
            f"Seen from the {other}, where is the {one}?",
            f"On which side of the {other} is the {one}?",
        ),
        (f"{one}在{other}的哪边？", f"{one}在{other}的什么方向？", f"从{other}看，{one}在哪边？"),
    )
    return question, _DIRECTION[direction][0 if language == "en" else 1]


def _ask_description(
    scene: Scene, rng: random.Random, language: Language
) -> tuple[str, str] | None:
    question = _pick(
        rng,
        language,
        ("Describe this image in detail.", "Describe the picture.", "What do you see?"),
        ("请描述这张图片。", "图里有什么？", "请详细描述图像。"),
    )
    if language == "en":
        parts = [
            f"{with_article(name_of(t, 'en', size=True))} at the {PLACES[t.place]}" for t in scene
        ]
        return question, sentence(", ".join(parts), "en")
    parts = [f"{_ZH_PLACE[t.place]}有一个{name_of(t, 'zh', size=True)}" for t in scene]
    return question, "，".join(parts) + "。"


def _ask_scan(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    return _pick(rng, language, ("Scan the grid.",), ("逐格扫描。",)), " ".join(in_words(scene))


_ATTRIBUTES = {
    "place": "位置",
    "size": "大小",
    "colour": "颜色",
    "shape": "形状",
}


def _ask_list(scene: Scene, rng: random.Random, language: Language) -> tuple[str, str] | None:
    """Some attributes of every object, in any order: every word but the first of an object can
    only be known by finding what belongs together, whichever of them is named first."""
    chosen = rng.sample(list(_ATTRIBUTES), rng.randint(2, len(_ATTRIBUTES)))
    things = rng.sample(scene, len(scene))
    words = {
        "place": lambda t: place_of(t.place, language),
        "size": lambda t: t.size if language == "en" else _ZH_SIZE[t.size],
        "colour": lambda t: word_for(t.colour, language),
        "shape": lambda t: word_for(t.shape, language),
    }
    if language == "en":
        rows = [" ".join(words[a](t) for a in chosen) for t in things]
        return f"List {', '.join(chosen)}.", sentence(", ".join(rows), language)
    rows = ["".join(words[a](t) for a in chosen) for t in things]
    return f"列出{'、'.join(_ATTRIBUTES[a] for a in chosen)}。", "，".join(rows) + "。"


KINDS: dict[str, Maker] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "yesno": _ask_yesno,
    "where": _ask_where,
    "naming": _ask_naming,
    "relation": _ask_relation,
    "description": _ask_description,
    "scan": _ask_scan,
    "list": _ask_list,
}
"""Kinds of question."""
DRILLS = ("scan", "list")
"""Kinds that are asked in training alone."""

assert set(SIZES) == set(_ZH_SIZE)
