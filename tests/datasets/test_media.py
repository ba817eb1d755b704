"""Images and videos that can be read, and those that cannot."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis.common.errors import DataError
from lavis.common.images import open_image
from lavis.common.schema import (
    AnnotationConfig,
    BuildInfo,
    DatasetConfig,
    ImagesConfig,
    PreprocessConfig,
    SplitProcessors,
)
from lavis.common.types import BadSample, Sample
from lavis.datasets.builders import InstructionBuilder
from lavis.datasets.media import count_frames, frame_indices, open_frames
from lavis.processors.config import ImageEvalConfig
from lavis.processors.conversation import ChatML, ConversationEncoder


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_image(path)
    return str(caught.value)


def test_every_mode_is_decoded_to_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "RGB"):
        Image.new("RGB", (3, 2), "red").convert(mode).save(tmp_path / "a.png")
        image = open_image(tmp_path / "a.png")
        assert (image.mode, image.size) == ("RGB", (3, 2))


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert refusal(path) == f"{path} is not an image that can be read"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_short(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(buffer, kind)
    path = tmp_path / "a.img"
    path.write_bytes(buffer.getvalue()[:-500])
    assert refusal(path).startswith(f"{path} cannot be read: ")
    assert "truncated" in refusal(path)


def test_damaged_inside(tmp_path: Path) -> None:
    """A PNG whose data are no zlib stream."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    content = buffer.getvalue()
    start = content.index(b"IDAT") + 4
    path = tmp_path / "a.png"
    path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
    assert refusal(path).startswith(f"{path} cannot be read: ")


def test_decompression_bomb(tmp_path: Path) -> None:
    """A few bytes that claim to be 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    message = refusal(path)
    assert message.startswith(f"{path} is too large: ")
    assert "3600000000 pixels" in message


def test_a_decoder_that_raises_something_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: Any, formats: Any) -> Image.Image:
        raise RuntimeError

    (tmp_path / "a").touch()
    monkeypatch.setattr(Image, "open", broken)
    assert refusal(tmp_path / "a") == f"{tmp_path / 'a'} cannot be read: RuntimeError"


def test_missing_and_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.png").startswith(f"{tmp_path / 'none.png'} cannot be read: ")
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be read: ")


# --- videos ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "most", "wanted"),
    [
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (7, 4, [0, 1, 2, 3]),
        (8, 4, [0, 2, 4, 6]),
        (11, 4, [0, 2, 4, 6]),
        (12, 4, [0, 3, 6, 9]),
        (9, 1, [0]),
    ],
)
def test_frames_are_evenly_spaced(total: int, most: int, wanted: list[int]) -> None:
    assert frame_indices(total, most) == wanted


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames of 64 x 64, frame ``i`` of gray level ``20 * i``."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (20 * i,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_video_frames(video: Path) -> None:
    assert count_frames(video) == 10
    frames = open_frames(video, 4)
    assert [frame.size for frame in frames] == [(64, 64)] * 4
    levels = [frame.convert("L").getpixel((32, 32)) for frame in frames]
    assert levels == pytest.approx([0, 40, 80, 120], abs=6)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [  # as a phone writes it, and where the light upper left corner is to be seen
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (1, 0)),
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (0, 1)),
    ],
)
def test_frames_are_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int]
) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    picture = Image.new("RGB", (96, 64))
    picture.paste("white", (0, 0, 48, 32))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())

    def fixed(a: int, b: int, c: int, d: int) -> bytes:
        one = 1 << 16
        return struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)

    content = path.read_bytes()
    at = content.index(fixed(1, 0, 0, 1), content.index(b"tkhd"))
    path.write_bytes(content[:at] + fixed(*matrix) + content[at + 36 :])
    (frame,) = open_frames(path, 1)
    assert frame.size == ((64, 96) if matrix[0] == 0 else (96, 64))
    small = frame.convert("L").resize((2, 2), Image.Resampling.BOX)
    levels = {(x, y): small.getpixel((x, y)) for x in (0, 1) for y in (0, 1)}
    assert max(levels, key=levels.get) == corner  # type: ignore[arg-type]
    assert sorted(levels.values())[2] < 60 < 200 < levels[corner]  # type: ignore[type-var, operator]


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 999])
def test_damaged_video(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    for read in (count_frames, lambda p: open_frames(p, 3)):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path} cannot be read as a video: ")


def test_video_that_ends_early(video: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(video.read_bytes()[:-200])
    with pytest.raises(DataError, match=str(path)):
        open_frames(path, 10)


def test_sound_without_pictures(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "v.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=80)
        frame.planes[0].update(bytes(160))
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError) as caught:
        count_frames(path)
    assert str(caught.value) == f"{path} has no video stream"


def _builder(root: Path, max_frames: int) -> InstructionBuilder:
    return InstructionBuilder(
        "clips",
        DatasetConfig(
            BuildInfo({"train": AnnotationConfig("ann.json")}, ImagesConfig("videos"), max_frames),
            data_type="videos",
        ),
        PreprocessConfig(SplitProcessors(train=ImageEvalConfig("blip_image_eval", 14))),
        str(root),
    )


def test_a_video_sample_from_end_to_end(video: Path, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v.mp4").write_bytes(video.read_bytes())
    record = {"video": "v.mp4", "instruction": "<Img><ImageHere></Img>a", "output": "b"}
    (tmp_path / "ann.json").write_text(json.dumps([record]))
    encoder = ConversationEncoder(tokenizer, ChatML(tokenizer), num_query_token=2, max_txt_len=99)
    dataset = _builder(tmp_path, 4).build("train", encoder, train=True, seed=1, on_bad="error")
    sample = dataset[0, 0]
    assert isinstance(sample, Sample)
    assert sample.pixel_values.shape == (4, 3, 14, 14)
    means = sample.pixel_values.mean((1, 2, 3))
    assert (means.diff() > 0.3).all()  # the frames in order, ever lighter
    spans = (sample.input_ids == tokenizer.image_id).nonzero().flatten()
    assert torch.equal(spans, torch.arange(8) + spans[0])  # four frames of two ids, in one run
    # the file is damaged after the check
    (tmp_path / "videos" / "v.mp4").write_bytes(b"")
    bad = dataset[0, 0]
    assert isinstance(bad, BadSample)
    assert "cannot be read as a video" in bad.reason


def test_too_many_frames_for_the_text_length(video: Path, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v.mp4").write_bytes(video.read_bytes())
    record = {"video": "v.mp4", "instruction": "<ImageHere>", "output": "b"}
    (tmp_path / "ann.json").write_text(json.dumps([record]))
    encoder = ConversationEncoder(tokenizer, ChatML(tokenizer), num_query_token=16, max_txt_len=99)
    with pytest.raises(DataError, match=r"image 5 of 10 ends at token 102, past max_txt_len 99"):
        _builder(tmp_path, 10).build("train", encoder, train=True, seed=1, on_bad="error")
