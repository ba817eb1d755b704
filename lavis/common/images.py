"""Read pictures: the one place that decides which pixels a file or an object stands for.

Training, the feature cache, chat, the web page and reports all come here, so that a picture looks
the same to all of them: upright, with 8 bits a channel, on white where it is transparent, and the
first one of an animation.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lavis.common.errors import DataError

IMAGE_READING = 2
"""Counts changes of what is read: features of another reading are not used."""

for _plugin in ("pillow_heif", "pillow_jxl"):  # where they are installed, their formats are read
    with contextlib.suppress(ImportError):
        getattr(importlib.import_module(_plugin), "register_heif_opener", lambda: None)()

Image.init()
_WANTED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JXL")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""What is read of strangers: less than all that Pillow knows, some of which runs other programs."""

_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip
# Pillow scales these to 8 bits, but leaves the transparent colour as it stands in the file.
_KEY_SCALE = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
_VIDEO = "it is a video"
_CONVERT = "or convert it to JPEG or PNG"
_CONTENTS = (
    (rb"$", "it is empty"),
    (rb"\x00{32}", "it holds zeros, as an interrupted download leaves them: download it again"),
    (rb"version https://git-lfs", "it is a Git LFS pointer: fetch the file with `git lfs pull`"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", f"it is HEIC: install pillow-heif, {_CONVERT}"),
    (rb".{4}ftypavi[fs]", f"it is AVIF: install pillow-avif-plugin, {_CONVERT}"),
    (rb"\xff\x0a|.{4}JXL ", f"it is JPEG XL: install pillow-jxl-plugin, {_CONVERT}"),
    (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|OggS", _VIDEO),
    (rb"\x00\x00\x01[\xb3\xba]|\x30\x26\xb2\x75", _VIDEO),  # MPEG, WMV
    (rb"(<\?xml.*?>|<!--.*?-->|<!doctype svg.*?>|\s)*<svg", "it is SVG: draw it to a PNG"),
    (rb"%PDF-", "it is PDF: draw its page to a PNG"),
    (rb"\s*<", "it holds HTML or XML, as a failed download leaves it: download it again"),
    (rb"\s*[\[{]", "it holds JSON: a failed download, or a file of another kind"),
    (rb"PK\x03\x04|\x1f\x8b", "it is an archive: unpack it"),
    (rb"\x93NUMPY", "it is a NumPy file: numpy.load it and give the array"),
)


class TooLargeError(DataError):
    """A picture has more pixels than are allowed."""


def open_image(
    path: str | os.PathLike[str],
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decode an image file to RGB, as :func:`to_rgb`; of an animation, the first picture.

    Args:
        formats: what Pillow may try, such as ``("PNG", "JPEG")``; all that it knows by default.
        max_pixels: refuse a larger picture before decoding it. Without, Pillow's own limit holds.

    Raises:
        DataError: if the file is missing, damaged or of another format; :class:`TooLargeError` if
            it may be a bomb.
    """
    refuse_address(os.fspath(path))
    with _explained(str(path)), Path(path).open("rb") as file:
        return to_rgb(_opened(file, str(path), formats, max_pixels), str(path))


def as_image(
    value: object, *, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """The RGB picture that a value stands for; arguments as :func:`open_image`.

    Args:
        value: an image file's path, its bytes or an open binary file; a Pillow image; or an array
            of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), in the order RGB, with levels as
            :func:`to_rgb` scales them.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    if isinstance(value, str | os.PathLike):
        return open_image(value, formats=formats, max_pixels=max_pixels)
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, np.ndarray):
        return to_rgb(_from_array(value))
    name = "the image"
    if callable(read := getattr(value, "read", None)):
        name = str(getattr(value, "name", name))
        with _explained(name):
            with contextlib.suppress(AttributeError, OSError):  # a pipe cannot be rewound
                value.seek(0)  # type: ignore[attr-defined]
            value = read()
    if isinstance(value, bytes | bytearray | memoryview):
        with _explained(name):
            return to_rgb(_opened(io.BytesIO(value), name, formats, max_pixels), name)
    raise DataError(
        "an image must be a file's path, a Pillow image, an array of (H, W), (H, W, 3) or "
        "(H, W, 4), an image file's bytes or a file open for reading bytes, not "
        f"{type(value).__name__}"
    )


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, upright, from its header.

    Raises:
        DataError: as :func:`open_image`, but for pixels that are damaged.
    """
    name = str(path)
    with _explained(name), path.open("rb") as file:
        image = _opened(file, name)
        turned = _orientation(image) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """An RGB copy of a picture, the way it is meant to be seen.

    It is turned upright as its EXIF says. What is transparent is put on white. 16 bits (``I;16``)
    are scaled to 8 by their full range; 32-bit integers and floats by what they hold: levels up to
    255 are taken as they are, up to 65535 as 16 bits, and floats up to 1 as shares of full.
    Colour profiles are not applied.

    Raises:
        DataError: it cannot be decoded, has no pixels, or its levels fit none of these ranges.
    """
    with _explained(name):
        if 0 in image.size:
            raise DataError(f"{name} has no pixels: {image.width} x {image.height}")
        key = _transparent_colour(image)
        image.load()
        orientation = _orientation(image)
        if image.mode.startswith(("I", "F")):
            levels = np.asarray(image)
            scaled = _to_8_bits(levels, name)
            rgb = Image.fromarray(scaled if key is None else np.where(levels == key, 255, scaled))
        elif image.has_transparency_data:
            rgb = image if key is None else image.copy()
            if key is not None:
                rgb.info["transparency"] = key
            rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb.convert("RGBA"))
        else:
            rgb = image
        rgb = rgb.convert("RGB")
        rgb.info = {}  # what it said of orientation and transparency is done
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file's first bytes are a video's. An animation (GIF, WebP) is a picture."""
    try:
        with Path(path).open("rb") as file:
            return _contents(file.read(1000)) == _VIDEO
    except (OSError, ValueError):
        return False


def _contents(head: bytes) -> str:
    """What a file that is no picture holds, by its first bytes; "" if that is not known."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    return next((about for start, about in _CONTENTS if re.match(start, head, re.S | re.I)), "")


def refuse_address(path: str) -> None:
    """Refuse an address in place of a file's path.

    Raises:
        DataError: saying so. ``pathlib`` may have made ``https:/`` of ``https://``.
    """
    if re.match(r"(?i)[a-z][a-z0-9+.-]+:/|data:", path):
        raise DataError(f"{path[:200]} is an address, not a file: download it first")


def _opened(
    file: BinaryIO,
    name: str,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """A picture whose header has been read."""
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        file.seek(0)
        holds = _contents(file.read(1000))
        kinds = f" as {', '.join(formats)}" if formats else ""
        about = f": {holds}" if holds else ""
        raise DataError(f"{name} is not an image that can be read{kinds}{about}") from error
    if image.format == "EPS":  # Pillow would have Ghostscript run what the file says
        raise DataError(f"{name} is PostScript: draw it to a PNG")
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise TooLargeError(
            f"{name} is too large: {image.width} x {image.height} pixels are more than the "
            f"{max_pixels / 1e6:.0f} million that are allowed"
        )
    return image


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name} is too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise what their format's library does
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read: {reason}") from error


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  # damaged EXIF says nothing; the pixels are none the worse
        return None


def _transparent_colour(image: Image.Image) -> Any:
    """The level or colour that stands for transparent, if one does, in the units of the pixels."""
    key = image.info.get("transparency")
    if image.mode not in ("1", "L", "I", "I;16", "RGB") or key is None:
        return None
    tile = getattr(image, "tile", None)  # of a file that is not decoded yet
    scale = _KEY_SCALE.get(str(tile[0][3]), 1.0) if tile else 1.0
    return tuple(int(k * scale) for k in key) if isinstance(key, tuple) else int(key * scale)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise DataError(f"an image array must be (H, W), (H, W, 3) or (H, W, 4), not {array.shape}")
    return Image.fromarray(_to_8_bits(array, "the image's array"))


def _to_8_bits(levels: np.ndarray, name: str) -> np.ndarray:
    """Levels as uint8, of the same shape."""
    kind = levels.dtype.kind
    if levels.dtype == np.uint8 or levels.size == 0:
        return levels.astype(np.uint8)
    if kind not in "buif":
        raise DataError(f"{name} holds {levels.dtype}, not numbers")
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 65535):  # NaN is not either
        raise DataError(
            f"{name} holds levels from {low} to {high}; scale them to 0..1, 0..255 or 0..65535"
        )
    full = 65535 if levels.dtype.newbyteorder("=") == np.uint16 or high > 255 else 255
    if kind == "b" or (kind == "f" and high <= 1):
        full = 1
    return np.rint(levels.astype(np.float64) * (255 / full)).astype(np.uint8)
