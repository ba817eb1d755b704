"""Pictures: which pixels a file or an object stands for, and what is said if it holds none."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from lavis.common.errors import DataError
from lavis.common.images import as_image, open_image, to_rgb

SEEN = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
LEVELS = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(2, 0)
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: x.T[::-1],  # the camera's top is the right side of what is stored: quarter left
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: x.T[:, ::-1],
}  # what a camera stores of what it sees


def gray(image: Image.Image) -> np.ndarray:
    """Levels of an RGB picture whose channels are equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, key: bytes) -> bytes:
    """A PNG with a transparent colour, by hand: Pillow does not write these depths."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# --- the right way up -----------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_orientation_is_upright(kind: str, orientation: int) -> None:
    blocks = SEEN.repeat(16, 0).repeat(16, 1)
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](blocks)))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = saved(stored.convert("RGB"), kind, exif=oriented(orientation), **options)
    image = as_image(content)
    assert image.size == (96, 64)
    error = np.abs(np.asarray(image).astype(int) - blocks[..., None])
    assert error.max() <= (12 if kind == "JPEG" else 0)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))  # turned once
    assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(content)))), np.asarray(image))


def test_the_table_of_orientations_is_pillows() -> None:
    for orientation in range(1, 9):
        image = Image.fromarray(SEEN)
        image.getexif()[ExifTags.Base.Orientation] = orientation
        assert np.array_equal(gray(to_rgb(image)), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"\xff" * 40,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x09",
    ],
)
def test_damaged_exif_leaves_the_picture_as_it_is(exif: bytes) -> None:
    image = Image.fromarray(SEEN)
    image.info["exif"] = exif
    assert np.array_equal(gray(to_rgb(image)), SEEN)
    flat = saved(Image.new("L", (6, 4), 100), "JPEG", exif=exif)
    assert gray(as_image(flat)).tolist() == [[100] * 6] * 4


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_is_none(orientation: int) -> None:
    content = saved(Image.fromarray(SEEN), exif=oriented(orientation))
    assert np.array_equal(gray(as_image(content)), SEEN)


# --- more than 8 bits -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_a_ramp_of_16_bits_stays_one(kind: str, dtype: str) -> None:
    image = Image.fromarray((LEVELS.astype(np.uint16) * 257).astype(dtype))
    assert np.array_equal(gray(to_rgb(image)), LEVELS)
    if (kind, dtype) != ("PPM", ">u2"):  # which Pillow does not write
        assert np.array_equal(gray(as_image(saved(image, kind))), LEVELS)


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        (LEVELS.astype(np.int32) * 257, LEVELS),
        (LEVELS.astype(np.int32), LEVELS),  # as Pillow converts L to I
        (LEVELS.astype(np.float32) / 255, LEVELS),
        (LEVELS.astype(np.float32), LEVELS),
        (LEVELS.astype(np.float32) * 257, LEVELS),
        (LEVELS > 99, (LEVELS > 99) * np.uint8(255)),
        (LEVELS.astype(np.int64), LEVELS),
        (LEVELS.astype(np.float16) / 255, LEVELS),
        (np.array([[0, 255]], np.uint16), np.array([[0, 1]], np.uint8)),  # 16 bits, by their type
        (np.array([[0, 255]], ">u2"), np.array([[0, 1]], np.uint8)),
        (np.array([[0.0, 0.5, 1.0]]), np.array([[0, 128, 255]], np.uint8)),
    ],
)
def test_levels_are_scaled_by_type_and_content(levels: np.ndarray, wanted: np.ndarray) -> None:
    assert np.array_equal(gray(as_image(levels)), wanted)
    if levels.dtype in (np.int32, np.float32):
        assert np.array_equal(gray(to_rgb(Image.fromarray(levels))), wanted)
        assert np.array_equal(gray(as_image(saved(Image.fromarray(levels), "TIFF"))), wanted)


@pytest.mark.parametrize("levels", [[np.nan, 1], [0, np.inf], [-np.inf, 0], [-1, 2], [0, 65536]])
def test_levels_of_no_known_range(levels: list[float]) -> None:
    image = Image.fromarray(np.array([levels], np.float32))
    low, high = np.min(levels), np.max(levels)
    with pytest.raises(DataError, match=rf"the image holds levels from {low:.1f} to {high:.1f}; "):
        to_rgb(image)


# --- transparency ---------------------------------------------------------------------------


def test_alpha_is_put_on_white() -> None:
    rgba = Image.fromarray(np.array([[[0, 100, 255, a] for a in (0, 51, 128, 255)]], np.uint8))
    wanted = [[255, 255, 255], [204, 224, 255], [127, 177, 255], [0, 100, 255]]
    for kind in ("PNG", "TIFF", "WEBP"):
        options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert np.asarray(as_image(saved(rgba, kind, **options)))[0].tolist() == wanted
    assert np.asarray(as_image(np.asarray(rgba)))[0].tolist() == wanted
    two = Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 51)))
    for kind in ("PNG", "TIFF"):
        assert gray(as_image(saved(two, kind))).tolist() == [[204]]


def test_transparent_palette_entries() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([0, 0, 0, 10, 20, 30, 255, 0, 0])
    for transparency in (1, b"\xff\x00\xff"):
        content = saved(image, transparency=transparency)
        wanted = [[0, 0, 0], [255, 255, 255], [255, 0, 0]]
        assert np.asarray(as_image(content))[0].tolist() == wanted
    half = saved(image, transparency=b"\xff\x33\xff")
    assert np.asarray(as_image(half))[0, 1].tolist() == [206, 208, 210]
    quantized = Image.new("RGBA", (1, 1), (255, 0, 0, 0)).quantize()
    assert np.asarray(to_rgb(quantized)).tolist() == [[[255, 255, 255]]]
    pa = Image.new("RGBA", (1, 1), (255, 0, 0, 0)).convert("PA")
    assert np.asarray(to_rgb(pa)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (png((3, 1), 8, 0, b"\0\x00\x64\xc8", b"\0\x64"), [0, 255, 200]),
        (png((2, 1), 16, 0, b"\0" + struct.pack(">2H", 0x6464, 0x6465), b"\x64\x64"), [255, 100]),
        (png((2, 1), 16, 0, b"\0" + struct.pack(">2H", 0, 0xC8C8), b"\0\0"), [255, 200]),
        (png((4, 1), 2, 0, b"\0\x1b", b"\0\1"), [0, 255, 170, 255]),
        (png((2, 1), 4, 0, b"\0\x5a", b"\0\5"), [255, 170]),
        (png((2, 1), 1, 0, b"\0\x40", b"\0\0"), [255, 255]),
        (png((2, 1), 8, 2, b"\0\1\1\1\2\2\2", b"\0\1\0\1\0\1"), [255, 2]),
        (png((2, 1), 16, 2, b"\0" + b"\x64\x32" * 3 + b"\x65\0" * 3, b"\x64\x32" * 3), [255, 101]),
    ],
    ids=["L", "I;16", "black I;16", "2 bits", "4 bits", "1 bit", "RGB", "RGB of 16 bits"],
)
def test_a_transparent_colour(content: bytes, wanted: list[int]) -> None:
    assert gray(as_image(content)).tolist() == [wanted]


# --- other modes, animations, shapes --------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
)
def test_modes(mode: str) -> None:
    image = Image.new("RGB", (2, 1), (255, 255, 255))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")  # type: ignore[assignment]
    else:
        image = image.convert("RGBA" if mode == "RGBa" else mode).convert(mode)
    assert (np.asarray(to_rgb(image)) >= (254 if mode == "LAB" else 255)).all()


def test_the_inverted_cmyk_of_a_jpeg() -> None:
    content = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(np.asarray(as_image(content))[4, 4].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_picture_of_an_animation(kind: str) -> None:
    first = Image.fromarray(np.array([[[200, 0, 0, 255], [9, 9, 9, 0]]], np.uint8))
    more = [Image.new("RGBA", (2, 1), (0, 200, 0, 255))] * 2
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=more, **options)
    assert np.asarray(as_image(content))[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_a_very_long_picture(tmp_path: Path) -> None:
    Image.new("L", (10_000, 1), 7).save(tmp_path / "a.png")
    assert gray(open_image(tmp_path / "a.png")).tolist() == [[7] * 10_000]


def test_the_original_is_not_changed() -> None:
    image = Image.new("RGB", (2, 3))
    image.info["transparency"] = (0, 0, 0)
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert to_rgb(image).size == (3, 2)
    assert image.size == (2, 3) and image.info["transparency"] == (0, 0, 0)
    assert image.getexif()[ExifTags.Base.Orientation] == 6
