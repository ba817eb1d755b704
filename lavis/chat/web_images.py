"""Pictures that visitors send."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lavis.chat.web_texts import ToldError
from lavis.common.errors import DataError
from lavis.common.images import open_image

Image.init()
# Less than all that Pillow knows: some of that runs other programs.
FORMATS = tuple(
    name
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
    if name in Image.OPEN
)
MAX_PIXELS = 50_000_000


def open_upload(path: Path, name: str) -> Image.Image:
    """A picture that a visitor sent.

    Raises:
        ToldError: it cannot be used; the message of what failed has the server's path.
    """
    try:
        return open_image(path, formats=FORMATS, max_pixels=MAX_PIXELS)
    except DataError as error:
        formats = ", ".join(FORMATS)
        key = _fault(path)
        raise ToldError(key, name=name, limit=MAX_PIXELS // 10**6, formats=formats) from error


def _fault(path: Path) -> str:
    with path.open("rb") as file:
        kind = file.read(12)[4:]
    if kind.startswith(b"ftyp") and kind[4:] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "heic"
    try:
        with Image.open(path, formats=FORMATS) as image:
            large = image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        large = True
    except Exception:  # noqa: BLE001 -- Pillow's readers raise what their format's library does
        large = False
    return "many_pixels" if large else "unreadable"
