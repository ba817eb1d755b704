"""Pictures that visitors send."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lavis.chat.web.texts import LIMITS, VisitorError
from lavis.common.errors import DataError
from lavis.common.images import FORMATS, TooLargeError, open_image

MAX_PIXELS = LIMITS["megapixels"] * 10**6


def open_upload(path: Path, name: str) -> Image.Image:
    """A picture that a visitor sent.

    Raises:
        VisitorError: it cannot be used; the message of what failed has the server's path.
    """
    try:
        return open_image(path, formats=FORMATS, max_pixels=MAX_PIXELS)
    except DataError as error:
        key = "many_pixels" if isinstance(error, TooLargeError) else "unreadable"
        raise VisitorError(key, name=name, formats=", ".join(FORMATS)) from error
