"""Annotation files: what is read, and what is said about records that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis.common.errors import DataError
from lavis.common.types import BadSample
from lavis.datasets.annotations import Record, read_annotations
from lavis.processors.conversation import SYSTEM_PROMPT, ChatML, ConversationEncoder, Turn
from lavis.processors.tokenizer import QwenTokenizer
from tests.conftest import TOY

ASK = "<Img><ImageHere></Img> What?"


@pytest.fixture()
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "图 片"
    folder.mkdir()
    for name in ("a.png", "猫.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    (folder / "v.mp4").write_bytes(b"")
    return folder


def check_system(system: str) -> None:
    """As a first-generation Qwen does."""
    tokenizer = QwenTokenizer(TOY / "cache/ckpt/Qwen7B-chat/qwen.tiktoken")
    ConversationEncoder(tokenizer, ChatML(tokenizer), 1, system=SYSTEM_PROMPT).check_system(system)


def read(
    media: Path | None, content: Any, record_format: str = "minigpt4qwen", name: str = "ann.json"
) -> list[Record | BadSample]:
    assert media is not None
    path = media.parent / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
    return list(read_annotations(path, media, record_format, check_system))


def reason(media: Path, record: Any, record_format: str = "minigpt4qwen") -> str:
    (bad,) = read(media, [record], record_format)
    assert isinstance(bad, BadSample)
    assert bad.sample_id.startswith("ann.json[0]")
    return bad.reason


# --- what is read ---------------------------------------------------------------------------


def test_one_turn(media: Path) -> None:
    assert read(media, [{"image": "a.png", "instruction": ASK, "output": "A cat."}]) == [
        Record(
            "ann.json[0]",
            (Turn("user", ASK), Turn("assistant", "A cat.")),
            images=(media / "a.png",),
        )
    ]


def test_several_turns_and_images(media: Path) -> None:
    record = {
        "id": 7,
        "image": ["a.png", "猫.png"],
        "instruction": [ASK, "And here? <ImageHere>"],
        "output": ["one", "two"],
    }
    assert read(media, [record]) == [
        Record(
            "ann.json[0] (id 7)",
            (
                Turn("user", ASK),
                Turn("assistant", "one"),
                Turn("user", "And here? <ImageHere>"),
                Turn("assistant", "two"),
            ),
            images=(media / "a.png", media / "猫.png"),
        )
    ]


def test_text_only_needs_no_folder(media: Path) -> None:
    path = media.parent / "ann.json"
    path.write_text('[{"instruction": "q", "output": "a"}]')
    (record,) = read_annotations(path, None, "minigpt4qwen", check_system)
    assert record == Record("ann.json[0]", (Turn("user", "q"), Turn("assistant", "a")))


def test_video(media: Path) -> None:
    (record,) = read(media, [{"video": "v.mp4", "instruction": ASK, "output": "A cat."}])
    assert isinstance(record, Record)
    assert record.video == media / "v.mp4"
    assert (
        replace(record, frames=(0, 2, 4)).shown_turns[0].text
        == "<Img><ImageHere><ImageHere><ImageHere></Img> What?"
    )


def test_llava_format(media: Path) -> None:
    record = {
        "id": "x1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A <image> of a cat."},
        ],
    }
    assert read(media, [record], "llava") == [
        Record(
            "ann.json[0] (id x1)",
            (
                Turn("user", "<Img><ImageHere></Img>\nWhat?"),
                Turn("assistant", "A <image> of a cat."),
            ),
            images=(media / "a.png",),
        )
    ]


def test_list_under_annotations_and_byte_order_mark(media: Path) -> None:
    content = '\ufeff{"annotations": [{"instruction": "q", "output": "a"}]}'
    assert len(read(media, content)) == 1


@pytest.mark.parametrize("name", ["ann.jsonl", "ann.JSONL"])
def test_json_lines(media: Path, name: str) -> None:
    lines = (
        '{"instruction": "one\u2028two", "output": "a\x85b"}\r\n'
        "\n"
        "{broken\n"
        '"a text"\n'
        '{"instruction": "q", "output": "a"}'
    )
    good, broken, text, last = read(media, lines, name=name)
    assert isinstance(good, Record)
    assert [turn.text for turn in good.turns] == ["one\u2028two", "a\x85b"]
    assert isinstance(broken, BadSample)
    assert broken.sample_id == f"{name}[2]"
    assert broken.reason.startswith("not valid JSON: Expecting property name")
    assert text == BadSample(f"{name}[3]", "must be an object, not str")
    assert isinstance(last, Record)


# --- records that cannot be used ------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "must be an object, not str"),
        (None, "must be an object, not NoneType"),
        ([], "must be an object, not list"),
        ({}, "`instruction` must be a text or a list of texts, not None"),
        ({"instruction": "q"}, "`output` must be a text or a list of texts, not None"),
        ({"instruction": [], "output": []}, "`instruction` must be a text or a list of texts, no"),
        ({"instruction": "q", "output": 5}, "`output` must be a text or a list of texts, not 5"),
        ({"instruction": ["q", 3], "output": "a"}, "`instruction` must be a text or a list of te"),
        ({"instruction": ["q", "r"], "output": "a"}, "2 instructions but 1 outputs"),
        ({"instruction": "q", "output": " \n"}, "the answer of turn 1 is empty"),
        ({"instruction": ["q", "r"], "output": ["a", ""]}, "the answer of turn 2 is empty"),
        (
            {"conversations": []},
            "has `conversations` but no `instruction`: set the data set's format: llava",
        ),
        (
            {"image": "a.png", "instruction": ASK + ASK, "output": "a"},
            "2 <ImageHere> placeholders in the instruction but 1 image; the numbers must be equal",
        ),
        (
            {"image": ["a.png", "a.png"], "instruction": ASK, "output": "a"},
            "1 <ImageHere> placeholder in the instruction but 2 images; the numbers must be equal",
        ),
        (
            {"image": "a.png", "instruction": "q", "output": ASK},
            "0 <ImageHere> placeholders in the instruction but 1 image; the numbers must be equal",
        ),
        (
            {"instruction": ASK, "output": "a"},
            "1 <ImageHere> placeholder in the instruction but 0 images; the numbers must be equal",
        ),
        (
            {"video": "v.mp4", "instruction": "q", "output": "a"},
            "0 <ImageHere> placeholders in the instruction but 1 video; the numbers must be equal",
        ),
        (
            {"video": "v.mp4", "image": "a.png", "instruction": ASK, "output": "a"},
            "has more than one of `image`, `video` and `words`; give one of them",
        ),
        (
            {"image": 3, "instruction": ASK, "output": "a"},
            "an image or video must be a file name, not 3",
        ),
        (
            {"image": [["a.png"]], "instruction": ASK, "output": "a"},
            "an image or video must be a file name, not ['a.png']",
        ),
    ],
)
def test_bad_record(media: Path, record: Any, message: str) -> None:
    assert reason(media, record).startswith(message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "`conversations` must be a list of messages"),
        ("q", "`conversations` must be a list of messages"),
        (["q"], "must be an object, not str"),
        ([{"from": "human", "value": "q"}], "the last question has no answer"),
        (
            [{"from": "system", "value": "q"}],
            "message 0 must have `from: human` and a text `value`, not from 'system'",
        ),
        (
            [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}],
            "message 1 must have `from: gpt` and a text `value`, not from 'human'",
        ),
        (
            [{"from": "human", "value": 3}],
            "message 0 must have `from: human` and a text `value`",
        ),
    ],
)
def test_bad_llava_record(media: Path, messages: Any, message: str) -> None:
    assert reason(media, {"conversations": messages}, "llava").startswith(message)


@pytest.mark.parametrize("name", ["none.png", ".", "x/y.png", "a\0.png", "\ud800.png", "x" * 5000])
def test_image_that_is_not_there(media: Path, name: str) -> None:
    record = {"image": name, "instruction": ASK, "output": "a"}
    (bad,) = read(media, json.dumps([record]))
    assert isinstance(bad, BadSample)
    assert bad.reason.startswith(f"no image or video {media}")


def test_image_without_a_folder(media: Path) -> None:
    path = media.parent / "ann.json"
    path.write_text(json.dumps([{"image": "a.png", "instruction": ASK, "output": "a"}]))
    (bad,) = read_annotations(path, None, "minigpt4qwen", check_system)
    assert bad == BadSample(
        "ann.json[0]", "has an image, but the data set has no build_info.images.storage"
    )


def test_good_records_around_a_bad_one(media: Path) -> None:
    good = {"instruction": "q", "output": "a"}
    kinds = [type(r) for r in read(media, [good, {}, good])]
    assert kinds == [Record, BadSample, Record]


# --- files that cannot be read --------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is not valid JSON: Expecting value: line 1 column 1 (char 0). One object a line "),
        (b"[1,]", " is not valid JSON: "),
        (b'{"a": 1}\n{"a": 2}', " is not valid JSON: Extra data: line 2 column 1 (char 9). One o"),
        (b"[" * 100_000, " is not valid JSON: "),
        (b"[" + b"1" * 5000 + b"]", " is not valid JSON: "),
        ('[{"a": "é"}]'.encode("latin-1"), " is not UTF-8 text: "),
        ("[]".encode("utf-16"), " is not UTF-8 text: "),
        (b'{"a": 1}', " must hold a list of records, not dict"),
        (b'"a"', " must hold a list of records, not str"),
    ],
)
def test_unreadable_file(media: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(media, content)
    assert str(caught.value).startswith(f"{media.parent / 'ann.json'}{message}")


def test_a_file_that_the_system_does_not_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read: .*No such file"):
        list(read_annotations(tmp_path / "none.json", None, "llava", check_system))


def test_empty_list(media: Path) -> None:
    assert read(media, []) == []


# --- keys of other formats ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["images", "image"])
@pytest.mark.parametrize("names", ["a.png", ["a.png"]])
def test_images_is_image(media: Path, key: str, names: Any) -> None:
    talk = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A."}]
    llava = {"conversations": talk}
    for record, kind in (({"instruction": ASK, "output": "A."}, "minigpt4qwen"), (llava, "llava")):
        (read_one,) = read(media, [{**record, key: names}], kind)
        assert isinstance(read_one, Record)
        assert read_one.images == (media / "a.png",)
        assert read_one.turns == (Turn("user", ASK), Turn("assistant", "A."))


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
@pytest.mark.parametrize("videos", [{"video": "v.mp4"}, {"videos": ["v.mp4"]}])
def test_a_video_of_llava_stands_at_its_mark(media: Path, mark: str, videos: Any) -> None:
    talk = [{"from": "human", "value": f"{mark}\nWhat?"}, {"from": "gpt", "value": "A."}]
    (record,) = read(media, [{**videos, "conversations": talk}], "llava")
    assert isinstance(record, Record)
    assert record.video == media / "v.mp4"
    assert record.turns[0].text == "<Img><ImageHere></Img>\nWhat?"


def test_alpaca(media: Path) -> None:
    record = {
        "instruction": "Translate.",
        "input": "A cat.",
        "output": "猫。",
        "history": [["Hi", "Hello."], ["Ready?", "Yes."]],
        "system": "You are a helpful assistant.",
    }
    (read_one,) = read(media, [record])
    assert isinstance(read_one, Record)
    assert [t.text for t in read_one.turns] == [
        "Hi", "Hello.", "Ready?", "Yes.", "Translate.\nA cat.", "猫。",
    ]  # fmt: skip
    plain = {
        "instruction": "Translate.",
        "output": "猫。",
        "input": "",
        "history": [],
        "system": "",
    }
    (read_one,) = read(media, [plain])
    assert isinstance(read_one, Record)
    assert [t.text for t in read_one.turns] == ["Translate.", "猫。"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"system": ["You translate."]}, "`system` must be a text, not ['You translate.']"),
        ({"system": "You translate."}, "has a `system` prompt of its own, but every conversation "),
        ({"messages": [{"role": "user"}]}, "`messages` (turns with `role` and `content`) is not "),
        ({"conversations": [1]}, "`conversations` (turns) is not read in format minigpt4qwen and "),
        ({"audio": "a.wav"}, "`audio` (sound) is not read in format minigpt4qwen and would be "),
        ({"tools": "[]"}, "`tools` (tools) is not read in format minigpt4qwen and would be lost; "),
        ({"rejected": "no"}, "`rejected` (a pair of answers) is not read in format minigpt4qwen "),
        ({"videos": ["v.mp4", "w.mp4"]}, "has 2 videos; one can be read"),
        ({"image": "a.png", "images": ["猫.png"]}, "has both `image` and `images`; give one of "),
        ({"history": ["Hi", "Hello"]}, "`history` must hold pairs [question, answer], not 'Hi'"),
        ({"history": "Hi"}, "`history` must be a list of pairs of texts, not 'Hi'"),
        ({"input": ["a"]}, "`input` must be a text, and `instruction` one too, not ['a']"),
        ({"image": "a.png", "instruction": "<image> q"}, "0 <ImageHere> placeholders in the "
         "instruction but 1 image; the numbers must be equal (<image> is no placeholder; write "),
    ],
)  # fmt: skip
def test_keys_that_would_be_lost(media: Path, more: Any, message: str) -> None:
    assert reason(media, {"instruction": "q", "output": "a", **more}).startswith(message)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "q", "response": "a"}, "`instruction` must be a text or a list of texts, not "
         "None; the record has `query`, `response`, format minigpt4qwen reads `instruction`, "),
        ({"messages": [{"role": "user", "content": "q"}]}, "`messages` (turns with `role` and `co"),
    ],
)  # fmt: skip
def test_a_record_of_another_format_lists_what_it_has(
    media: Path, record: Any, message: str
) -> None:
    assert reason(media, record).startswith(message)


@pytest.mark.parametrize(
    ("talk", "more", "message"),
    [
        ([("system", "Be kind."), ("human", "q"), ("gpt", "a")], {}, "has a `system` prompt of its "
         "own, but every conversation begins with '<|im_start|>system\\nYou are a helpful assis"),
        ([("human", "q"), ("system", "Be kind."), ("gpt", "a")], {}, "message 1 must have `from: "
         "gpt` and a text `value`, not from 'system'; a system prompt stands first, "),
        ([("human", "q"), ("gpt", "a")], {"image": "a.png"}, "0 <image> placeholders in the "
         "questions but 1 image; the numbers must be equal"),
        ([("human", "<image> q"), ("gpt", "a")], {}, "1 <image> placeholder in the questions but 0 "
         "images; the numbers must be equal"),
        ([("human", "q"), ("gpt", "a")], {"video": "v.mp4"}, "0 <video> placeholders in the "
         "questions but 1 video; the numbers must be equal"),
        ([("human", "q"), ("gpt", "a")], {"input": "x"}, "`input` (turns) is not read in format l"),
    ],
)  # fmt: skip
def test_llava_speaks_of_its_own_marks(media: Path, talk: Any, more: Any, message: str) -> None:
    said = [{"from": role, "value": text} for role, text in talk]
    assert reason(media, {"conversations": said, **more}, "llava").startswith(message)


def test_a_first_message_with_the_models_system_prompt(media: Path) -> None:
    said = [("system", SYSTEM_PROMPT), ("human", "q"), ("gpt", "a")]
    messages = [{"from": role, "value": text} for role, text in said]
    (record,) = read(media, [{"conversations": messages}], "llava")
    assert isinstance(record, Record)
    assert record.turns == (Turn("user", "q"), Turn("assistant", "a"))


@pytest.mark.parametrize("names", [None, "a.png"])
def test_a_video_mark_without_a_video(media: Path, names: Any) -> None:
    said = [{"from": "human", "value": "<video> q"}, {"from": "gpt", "value": "a"}]
    found = reason(media, {"conversations": said, "image": names}, "llava")
    assert found.startswith(
        "0 <image> placeholders in the questions but 1 image;"
        if names
        else "1 <video> placeholder in the questions but 0 images;"
    )


@pytest.mark.parametrize(
    "key", ["image_path", "Image", "img", "imageUrl", "video_path", "my_photos"]
)
def test_media_under_a_name_that_is_not_read(media: Path, key: str) -> None:
    record = {"instruction": "q", "output": "a"}
    wanted = f"`{key}` is not read; name files in `image` or `video`"
    for value in ("a.png", ["a.png"]):
        assert reason(media, record | {key: value}) == wanted
    shown = record | {"instruction": ASK, "image": "a.png", key: "b.png"}  # about the one that is
    others = [record | {key: value} for value in (None, "", [], 7, True)]
    others += [record | {"framework": "x", "imagine": "x"}]
    assert all(isinstance(r, Record) for r in read(media, [shown, *others]))


def test_an_address_in_place_of_a_file(media: Path) -> None:
    for key, name in (("image", "https://a.b/c.png"), ("videos", ["s3://a/v.mp4"])):
        found = reason(media, {key: name, "instruction": ASK, "output": "a"})
        assert found.endswith("is an address, not a file: download it first")


def test_input_without_an_instruction(media: Path) -> None:
    (record,) = read(media, [{"instruction": "", "input": "cat", "output": "a"}])
    assert isinstance(record, Record) and record.turns[0].text == "cat"


def test_one_object_over_several_lines_of_a_jsonl_file(media: Path) -> None:
    text = '\ufeff{ \n "annotations": []\n}'
    with pytest.raises(DataError, match=r"holds one object over several lines, where .* to \.json"):
        read(media, text, name="ann.jsonl")


def test_role_and_content_in_llava(media: Path) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert reason(media, {"conversations": said}, "llava") == (
        "message 0 must have `from: human` and a text `value`, not from None; it has `role` and "
        "`content`: rename them"
    )


def test_other_keys_are_named_in_the_log(media: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        read(media, [{"instruction": "q", "output": "a", "source": "web", "none": None}] * 3)
    assert caplog.messages == [
        f"{media.parent / 'ann.json'}: keys that are not read: source (3 records)"
    ]


@pytest.mark.parametrize("text", ['[{"instruction": "q", "output": "a"}]', '\n[\n {"a": 1}\n]'])
def test_a_list_in_a_jsonl_file(media: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"ann\.jsonl holds a list, where .*; rename it to \.json"):
        read(media, text, name="ann.jsonl")


def test_a_pointer_of_git_lfs(media: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("ann.json", "ann.jsonl"):
        with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer; .*: git lfs pull"):
            read(media, pointer, name=name)
