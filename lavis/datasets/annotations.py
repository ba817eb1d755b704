"""Read annotation files and name every record that cannot be used.

Two formats. ``minigpt4qwen``, the original's::

    {"image": "a.jpg", "instruction": "<Img><ImageHere></Img> What is it?", "output": "A cat."}

``image`` may be a list, ``video`` may stand in its place, both may be missing (text only), or
``words`` may describe what the image would show: a list of phrases, one for each position of the
image span, whose words' embeddings are added up;
``instruction`` and ``output`` may be lists of equal length, one item per turn. ``llava``::

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                          {"from": "gpt", "value": "A cat."}]}

In both, ``images`` and ``videos`` are read as ``image`` and ``video``; in the first also Alpaca's
``input``, which ends the question, and ``history``, pairs of earlier questions and answers. A key
that would change what is learned and cannot be read makes its record unusable; others are named in
the log.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from lavis.common.errors import DataError, listed, raised_as
from lavis.common.images import refuse_address
from lavis.common.paths import is_file
from lavis.common.tiles import Grid
from lavis.common.types import IMAGE_PLACEHOLDER, BadSample, Reference
from lavis.common.videos import Picture, parts_of
from lavis.processors.conversation import IMAGE, Turn, show_in_turns, tiles_text

logger = logging.getLogger(__name__)
NOT_JSON = (ValueError, RecursionError)  # what `json.loads` raises
_READ = ("id", "image", "images", "video", "videos", "words", "kind", "language", "system")
_TURN_KEYS = {
    "minigpt4qwen": ("instruction", "output", "input", "history"),
    "llava": ("conversations",),
}  # keys of each format's turns, the first of which must be there
_TURNS = {"minigpt4qwen": "a text or a list of texts", "llava": "a list of messages"}
_FOREIGN = {
    "messages": "turns with `role` and `content`",
    "conversation": "turns of another format",
    "chosen": "a pair of answers",
    "rejected": "a pair of answers",
    "rejected_response": "a pair of answers",
    "tools": "tools",
    "functions": "tools",
    "audio": "sound",
    "audios": "sound",
    "objects": "places in the image",
    "bbox": "places in the image",
}  # what would be lost
_MEDIA = re.compile(r"(?i)(?<![a-z])(image|img|photo|picture|video|frames)")


@dataclass(frozen=True)
class Record:
    """One usable annotation.

    Attributes:
        sample_id: for messages: the record's own ``id`` if it has one, and where it stands.
        turns: alternating user and assistant.
        images: image files, one per placeholder; empty for text only.
        video: a video file, whose frames take the place of its one placeholder.
        frames: numbers of these, once the video's header has been read.
        grids: how each image is cut, once its header has been read; empty if none is.
        words: phrases that take the place of an image, one per position of the span.
        tags: the record's ``kind`` and ``language``, if it has them; evaluation groups by them.
        reference: what its last answer is scored by.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    video: Path | None = None
    frames: tuple[int, ...] = ()
    grids: tuple[Grid, ...] = ()
    words: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    reference: Reference = Reference()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What is shown, in order: images with their tiles, or the frames of the video."""
        if self.video is not None:
            return tuple(Picture(self.video, frame) for frame in self.frames)
        grids = self.grids or [Grid(1, 1, 0)] * len(self.images)
        return tuple(p for parts in map(parts_of, self.images, grids) for p in parts)

    @property
    def shown_turns(self) -> tuple[Turn, ...]:
        """The turns with a placeholder for each of :attr:`pictures`."""
        if self.video is None and not self.grids:
            return self.turns
        frames = IMAGE_PLACEHOLDER * len(self.frames)
        places = repeat(frames) if self.video is not None else map(tiles_text, self.grids)
        return show_in_turns(self.turns, places)


def read_annotations(
    path: Path,
    media_root: Path | None,
    record_format: str,
    check_system: Callable[[str], None],
) -> Iterator[Record | BadSample]:
    """Yield every record of a JSON list or a JSON-lines file.

    Args:
        path: ``.json`` (a list of objects) or ``.jsonl`` (an object a line).
        media_root: folder that image and video names are relative to.
        record_format: ``minigpt4qwen`` or ``llava``.
        check_system: raises :class:`DataError` for a system prompt that would be lost, as
            :meth:`lavis.processors.conversation.ConversationEncoder.check_system`.

    Raises:
        DataError: if the file as a whole cannot be read.
    """
    to_record = _FORMATS[record_format]
    unread: Counter[str] = Counter()
    for number, raw in _read_json(path):
        sample_id = f"{path.name}[{number}]"
        if isinstance(raw, dict) and "id" in raw:
            sample_id = f"{path.name}[{number}] (id {raw['id']})"
        if isinstance(raw, DataError):  # a line of JSON lines that does not parse
            yield BadSample(sample_id, str(raw))
            continue
        try:
            unread.update(_check_keys(as_object(raw), record_format))
            for system in _systems(raw):
                check_system(system)
            yield to_record(sample_id, raw, media_root)
        except DataError as error:
            yield BadSample(sample_id, str(error))
    if unread:
        listed = ", ".join(f"{key} ({count} records)" for key, count in unread.most_common(8))
        logger.info("%s: keys that are not read: %s", path, listed)


def read_text(path: Path) -> str:
    """The text of an annotation file.

    Raises:
        DataError: it cannot be read, or is the pointer to a file that was not fetched.
    """
    with (
        raised_as(DataError, f"{path} is not UTF-8 text", UnicodeDecodeError),
        raised_as(DataError, f"{path} cannot be read", OSError),
    ):
        text = path.read_text(encoding="utf-8-sig")
    if text.startswith("version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer; fetch the file with: git lfs pull")
    return text


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        if found := re.match(r"\s*(\[|{\s*\n)", text):
            what = "a list" if found[1] == "[" else "one object over several lines"
            raise DataError(
                f"{path} holds {what}, where a .jsonl file has an object on each line; rename it "
                "to .json"
            )
        return list(read_lines(text))
    try:
        data = json.loads(text)
    except NOT_JSON as error:
        raise DataError(
            f"{path} is not valid JSON: {error}. One object a line belongs in a .jsonl file"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        data = data["annotations"]
    if not isinstance(data, list):
        raise DataError(f"{path} must hold a list of records, not {type(data).__name__}")
    return enumerate(data)


def read_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Values of JSON lines by their number, or the :class:`DataError` of a line that is none."""
    for number, line in enumerate(text.split("\n")):  # splitlines would cut at U+2028 in a text
        if line.strip():
            try:
                yield number, json.loads(line)
            except NOT_JSON as error:
                yield number, DataError(f"not valid JSON: {error}")


def as_object(raw: Any) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(raw, dict):
        raise DataError(f"must be an object, not {type(raw).__name__}")
    return raw


def _check_keys(raw: dict[str, Any], record_format: str) -> list[str]:
    """The keys of a record that are not read; one that changes what is learned is refused."""
    turns = _TURN_KEYS[record_format]
    for other, keys in _TURN_KEYS.items():
        if other != record_format and keys[0] in raw and turns[0] not in raw:
            raise DataError(
                f"has `{keys[0]}` but no `{turns[0]}`: set the data set's format: {other}"
            )
    known = (*turns, *_READ)
    given = (key for key, value in raw.items() if value not in (None, "", [], {}))
    unread = [key for key in given if key not in known]
    shown = any(raw.get(key) for key in ("image", "images", "video", "videos", "words"))
    for key in unread:
        if not shown and isinstance(raw[key], str | list) and _MEDIA.search(key):
            raise DataError(f"`{key}` is not read; name files in `image` or `video`")
        if key in _FOREIGN or any(key in keys for keys in _TURN_KEYS.values()):
            raise DataError(
                f"`{key}` ({_FOREIGN.get(key, 'turns')}) is not read in format {record_format} and "
                f"would be lost; write it into {_names(turns)}, or remove the key"
            )
    if turns[0] not in raw:
        raise DataError(
            f"`{turns[0]}` must be {_TURNS[record_format]}, not None; the record has "
            f"{_names(raw) or 'no keys'}, format {record_format} reads {_names(known)}"
        )
    return unread


def _systems(raw: dict[str, Any]) -> Iterator[str]:
    """The system prompts of a record: its own key's, and a first message's."""
    if raw.get("system") not in (None, ""):
        if not isinstance(raw["system"], str):
            raise DataError(f"`system` must be a text, not {raw['system']!r:.60}")
        yield raw["system"]
    if _has_system_message(raw.get("conversations")):
        yield raw["conversations"][0]["value"]


def _has_system_message(messages: Any) -> bool:
    first = messages[0] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(first, dict):
        return False
    return first.get("from") == "system" and isinstance(first.get("value"), str)


def _names(keys: Iterable[str]) -> str:
    return listed([f"`{key!s:.30}`" for key in keys], most=12)


def _from_minigpt4qwen(sample_id: str, raw: dict[str, Any], root: Path | None) -> Record:
    questions, answers = _texts(raw, "instruction"), _texts(raw, "output")
    if len(questions) != len(answers):
        raise DataError(f"{len(questions)} instructions but {len(answers)} outputs")
    if more := raw.get("input"):
        if not isinstance(more, str) or len(questions) > 1:
            raise DataError(f"`input` must be a text, and `instruction` one too, not {more!r:.60}")
        questions = ["\n".join(filter(None, (questions[0], more)))]
    turns: list[Turn] = []
    for pair in [*_history(raw), *zip(questions, answers, strict=True)]:
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return _record(sample_id, turns, raw, root)


def _history(raw: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = raw.get("history") or []
    if not isinstance(pairs, list):
        raise DataError(f"`history` must be a list of pairs of texts, not {pairs!r:.60}")
    for pair in pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        if not whole:
            raise DataError(f"`history` must hold pairs [question, answer], not {pair!r:.60}")
    return [(question, answer) for question, answer in pairs]


def _from_llava(sample_id: str, raw: dict[str, Any], root: Path | None) -> Record:
    messages = raw.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`conversations` must be {_TURNS['llava']}")
    marks = "<image>" if raw.get("image") or raw.get("images") else "<image>|<video>"
    turns: list[Turn] = []
    for i, message in enumerate(messages[_has_system_message(messages) :]):
        expected = "human" if i % 2 == 0 else "gpt"
        source, text = as_object(message).get("from"), as_object(message).get("value")
        if source != expected or not isinstance(text, str):
            why = ""
            if source == "system":
                why = "; a system prompt stands first, or in `system`"
            elif "role" in message or "content" in message:
                why = "; it has `role` and `content`: rename them"
            raise DataError(
                f"message {i} must have `from: {expected}` and a text `value`, not from "
                f"{source!r:.30}{why}"
            )
        if expected == "human":
            turns.append(Turn("user", re.sub(marks, IMAGE, text)))
        else:
            turns.append(Turn("assistant", text))
    if len(turns) % 2:
        raise DataError("the last question has no answer")
    return _record(sample_id, turns, raw, root)


_FORMATS: dict[str, Callable[[str, dict[str, Any], Path | None], Record]] = {
    "minigpt4qwen": _from_minigpt4qwen,
    "llava": _from_llava,
}


def _texts(raw: dict[str, Any], key: str) -> list[str]:
    value = raw.get(key)
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(f"`{key}` must be {_TURNS['minigpt4qwen']}, not {value!r:.60}")
    return texts


def _record(sample_id: str, turns: list[Turn], raw: dict[str, Any], root: Path | None) -> Record:
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"the answer of turn {number // 2 + 1} is empty")
    names = _media(raw, "image")
    videos = _media(raw, "video")
    if len(videos) > 1:
        raise DataError(f"has {len(videos)} videos; one can be read")
    for name in (*names, *videos):
        if not isinstance(name, str):
            raise DataError(f"an image or video must be a file name, not {name!r:.60}")
        refuse_address(name)
    words = raw.get("words") or []
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
        raise DataError(f"`words` must be a list of phrases, not {words!r:.60}")
    if sum(map(bool, (names, videos, words))) > 1:
        raise DataError("has more than one of `image`, `video` and `words`; give one of them")
    if (names or videos) and root is None:
        raise DataError("has an image, but the data set has no build_info.images.storage")
    root = root or Path()
    placeholders = sum(t.text.count(IMAGE_PLACEHOLDER) for t in turns if t.role == "user")
    media = 1 if videos or words else len(names)
    if placeholders != media:
        what = "video" if videos else "image" if media == 1 else "images"
        llava = "conversations" in raw
        said = "<video>" in str(raw.get("conversations")) and not names
        mark = ("<video>" if videos or said else "<image>") if llava else IMAGE_PLACEHOLDER
        raise DataError(
            f"{placeholders} {mark} placeholder{'s' * (placeholders != 1)} in the "
            f"{'questions' if llava else 'instruction'} but {media} {what}; the numbers must be "
            f"equal{_misspelt(turns) if not placeholders and not llava else ''}"
        )
    for path in (files := [root / name for name in (*names, *videos)]):
        if not is_file(path):
            raise DataError(f"no image or video {path!s:.300}")
    return Record(
        sample_id,
        tuple(turns),
        images=() if videos else tuple(files),
        video=files[0] if videos else None,
        words=tuple(words),
        tags={k: raw[k] for k in ("kind", "language") if isinstance(raw.get(k), str)},
    )


def _media(raw: dict[str, Any], key: str) -> list[Any]:
    """Files of ``key`` or of its plural, one or a list."""
    one, many = raw.get(key) or [], raw.get(f"{key}s") or []
    if one and many and one != many:
        raise DataError(f"has both `{key}` and `{key}s`; give one of them")
    files = one or many
    return files if isinstance(files, list) else [files]


def _misspelt(turns: Iterable[Turn]) -> str:
    tags = ("<image>", "<video>", "<ImageHere", "<imagehere>", "<|image_pad|>", "<img>")
    found = next((tag for tag in tags for t in turns if tag in t.text), None)
    return f" ({found} is no placeholder; write {IMAGE_PLACEHOLDER})" if found else ""
