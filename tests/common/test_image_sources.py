"""Pictures: what may stand for one, what is said if it holds none, and that all readers agree."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavis.common import images
from lavis.common.errors import DataError
from lavis.common.images import TooLargeError, as_image, open_image, to_rgb
from tests.common.test_images import SEEN, gray, oriented, png, saved

# --- what stands for an image ---------------------------------------------------------------


class _Where:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_whatever_holds_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(SEEN).save(path)
    content = path.read_bytes()
    written = io.BytesIO()
    written.write(content)  # and not rewound
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    with path.open("rb") as file, Image.open(path) as lazy, os.fdopen(reading, "rb") as pipe:
        values = (path, str(path), _Where(path), content, bytearray(content), memoryview(content))
        for value in (*values, file, written, pipe, lazy, SEEN, SEEN[..., None], SEEN.astype(int)):
            assert np.array_equal(gray(as_image(value)), SEEN), value
    colours = np.stack([SEEN, SEEN + 1, SEEN + 2], -1)
    assert np.array_equal(np.asarray(as_image(colours)), colours)
    assert np.array_equal(np.asarray(as_image(colours[::-1, ::2])), colours[::-1, ::2])


@pytest.mark.parametrize(
    "value", [None, [], {}, 3, torch.zeros(3, 2, 2), io.StringIO("x"), ["a.png"]]
)
def test_what_holds_none(value: Any) -> None:
    with pytest.raises(DataError, match="an image must be a file's path, a Pillow image, an array"):
        as_image(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((3, 4, 5)), r"must be \(H, W\), \(H, W, 3\) or \(H, W, 4\), not \(3, 4, 5\)"),
        (np.zeros((1, 2, 2, 3)), r"not \(1, 2, 2, 3\)"),
        (np.zeros(3), r"not \(3,\)"),
        (np.full((2, 2, 3), -0.5), "levels from -0.5 to -0.5; scale them to 0..1, 0..255 or 0..6"),
        (np.array([["a"]]), "holds <U1, not numbers"),
        (np.array([[1j]]), "holds complex128, not numbers"),
        (np.zeros((0, 3, 3), np.uint8), "has no pixels: 3 x 0"),
        (Image.new("RGB", (0, 4)), "has no pixels: 0 x 4"),
        (b"", "is not an image that can be read: it is empty"),
    ],
)
def test_values_of_the_right_kind_that_hold_none(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_image(value)


def test_a_picture_whose_file_is_closed_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((90, 90), 50).save(path)
    with Image.open(path) as closed:
        pass
    with pytest.raises(DataError, match="the image cannot be read: "):
        to_rgb(closed)
    cut = path.read_bytes()[:-300]
    for value in (cut, io.BytesIO(cut), Image.open(io.BytesIO(cut))):
        with pytest.raises(DataError, match=r"cannot be read: .*truncated"):
            as_image(value)


@pytest.mark.parametrize(
    "address",
    [
        "https://a.b/c.jpg",
        "HTTP://a.b/c.jpg",
        "s3://a/b.png",
        "file:///a.png",
        "data:image/png;base64,A",
    ],
)
def test_an_address(address: str) -> None:
    for value in (address, Path(address)):
        with pytest.raises(DataError, match=r"is an address, not a file: download it first"):
            open_image(value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.png", "No such file or directory"),
        (Path("C:/none.png"), "No such file or directory"),
        (tmp_path / "a\0b", "embedded null byte"),
        (tmp_path / ("x" * 999), "File name too long"),
    ):
        with pytest.raises(DataError) as caught:
            open_image(path)
        assert str(caught.value) == f"{path} cannot be read: {reason}"


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b"", "it is empty"),
        (b"\0" * 5000, "it holds zeros"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "it is a Git LFS pointer: ",
        ),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "it is HEIC: install pillow-heif, or convert it to",
        ),
        (b"\0\0\0\x1cftypavis\0\0\0\0", "it is AVIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "it is JPEG XL: install pillow-jxl-plugin, or convert it"),
        (b"\xff\x0a\xfa\x7f", "it is JPEG XL"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a video"),
        (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="x">', "it is SVG"),
        (b"%PDF-1.7\n", "it is PDF"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><html><svg>", "it holds HTML or XML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "it holds HTML or XML"),
        (b'{"error": "not found"}', "it holds JSON"),
        (b"PK\x03\x04\x14\0", "it is an archive"),
        (b"\x93NUMPY\x01\0v\0", "it is a NumPy file"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, content: bytes, about: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for formats, kinds in ((None, ""), (("PNG", "JPEG"), " as PNG, JPEG")):
        with pytest.raises(DataError) as caught:
            open_image(path, formats=formats)
        start = f"{path} is not an image that can be read{kinds}: {about}"
        if about == "it is AVIF" and not formats:  # which Pillow may know, and find damaged
            start = str(path)
        assert str(caught.value).startswith(start)


def test_postscript_is_not_run() -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="the image is PostScript"):
        as_image(page)


def test_max_pixels() -> None:
    content = saved(Image.new("L", (1001, 1000)))
    message = "too large: 1001 x 1000 pixels are more than the 1 million that are allowed"
    with pytest.raises(TooLargeError, match=message):
        as_image(content, max_pixels=1_000_000)
    assert as_image(content, max_pixels=1_001_000).size == (1001, 1000)


def test_heic_is_read_where_the_plugin_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    plugin = types.ModuleType("pillow_heif")
    called: list[bool] = []
    plugin.register_heif_opener = lambda: called.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    spec = importlib.util.spec_from_file_location("images_again", images.__file__)  # type: ignore[attr-defined]
    assert spec and spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # type: ignore[attr-defined]
    assert called == [True]


# --- all readers agree ----------------------------------------------------------------------


@pytest.fixture()
def odd(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A picture on its side with 16 bits and a transparent level, and what it shows."""
    shown = np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in shown.T[::-1])
    content = png((6, 10), 16, 0, rows, struct.pack(">H", 7000))
    path = tmp_path / "odd.png"
    with Image.open(io.BytesIO(content)) as image:
        image.save(path, exif=oriented(6), transparency=7000)
    whole = path.read_bytes()
    if b"tRNS" not in whole:  # then put it where the format wants it
        at = whole.index(b"IDAT") - 4
        chunk = content[content.index(b"tRNS") - 4 :][:14]
        path.write_bytes(whole[:at] + chunk + whole[at:])
    wanted = np.rint(shown / 257).astype(np.uint8)
    wanted[shown == 7000] = 255
    return path, wanted


def test_every_reader_sees_the_same(
    odd: tuple[Path, np.ndarray], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    from lavis.chat import ChatEngine
    from lavis.chat.web.sessions import data_address
    from lavis.common.schema import (
        AnnotationConfig,
        BuildInfo,
        DatasetConfig,
        ImagesConfig,
        PreprocessConfig,
        SplitProcessors,
    )
    from lavis.common.types import Sample
    from lavis.datasets.builders import InstructionBuilder
    from lavis.datasets.feature_store import FeatureStore
    from lavis.datasets.features import CachedFeatures, FeatureIndex
    from lavis.processors.config import ImageEvalConfig
    from lavis.processors.conversation import ChatML, ConversationEncoder
    from lavis.processors.image import BlipImageEval
    from lavis.tasks.report import draw_answers
    from lavis.tasks.scoring import Prediction

    path, shown = odd
    assert np.array_equal(gray(open_image(path)), shown)
    config = ImageEvalConfig("blip_image_eval", 10)
    wanted = BlipImageEval(config)(Image.fromarray(shown).convert("RGB"))

    (tmp_path / "ann.json").write_text(
        json.dumps([{"image": path.name, "instruction": "<ImageHere>a", "output": "b"}])
    )
    data = DatasetConfig(BuildInfo({"train": AnnotationConfig("ann.json")}, ImagesConfig(".")))
    builder = InstructionBuilder(
        "demo", data, PreprocessConfig(SplitProcessors(train=config)), str(tmp_path)
    )
    encoder = ConversationEncoder(tokenizer, ChatML(tokenizer), 2)
    sample = builder.build("train", encoder, train=True, seed=0, on_bad="error")[0, 0]
    assert isinstance(sample, Sample) and torch.equal(sample.spans.pixels[0], wanted)

    cached = CachedFeatures(BlipImageEval(config), 0, 1)
    cached.index = FeatureIndex(FeatureStore(tmp_path, (1, 1), "fp32"), "", {path: ""}, {})
    assert torch.equal(cached.draw(open_image(path), path, 0), wanted)

    class Model:
        tokenizer = None
        encoder = types.SimpleNamespace(template=types.SimpleNamespace(stops=()), num_query_token=1)
        device = torch.device("cpu")
        context, image_size = 9, 28

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

    engine = ChatEngine(Model(), BlipImageEval(config))  # type: ignore[arg-type]
    with Image.open(path) as lazy:
        for value in (path, str(path), path.read_bytes(), path.open("rb"), lazy, shown):
            assert torch.equal(engine.encode_image(value).embeds, wanted[None])
    assert engine.encode_image(path).name == engine.encode_image(str(path)).name == "odd.png"
    with pytest.raises(DataError, match="an image must be a file's path"):
        engine.encode_image(None)

    thumbnail = data_address(path).removeprefix("data:image/png;base64,")
    assert np.array_equal(gray(as_image(base64.b64decode(thumbnail))), shown)
    assert data_address(open_image(path)) == data_address(path)

    drawn: list[Any] = []
    monkeypatch.setattr(Axes, "imshow", lambda self, image: drawn.append(np.asarray(image)))
    prediction = Prediction("1", "question", "en", "a", "b", "c", str(path))
    draw_answers([prediction], tmp_path / "r.png", columns=1, rows=1)
    assert np.array_equal(drawn[0][..., 0], shown)
