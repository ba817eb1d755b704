"""Pictures and videos that visitors send."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lavis.chat.web.texts import LIMITS, VisitorError
from lavis.common.errors import ConfigError, DataError
from lavis.common.frames import VideoConfig
from lavis.common.images import FORMATS, TooLargeError, is_video, open_image
from lavis.common.videos import read_video

MAX_PIXELS = LIMITS["megapixels"] * 10**6
MAX_VIDEO_PIXELS = LIMITS["video_gigapixels"] * 10**9


def open_upload(path: Path, name: str, video: VideoConfig) -> list[Image.Image]:
    """A picture that a visitor sent, or the frames of a video that are shown.

    Raises:
        VisitorError: it cannot be used; the message of what failed has the server's path.
    """
    moving = is_video(path)
    try:
        if moving:
            return read_video(path, video, max_pixels=MAX_VIDEO_PIXELS)
        return [open_image(path, formats=FORMATS, max_pixels=MAX_PIXELS)]
    except (DataError, ConfigError) as error:
        if isinstance(error, ConfigError):  # a package is missing
            key = "no_video"
        elif isinstance(error, TooLargeError):
            key = "long_video" if moving else "many_pixels"
        else:
            key = "broken_video" if moving else "unreadable"
        raise VisitorError(key, name=name, formats=", ".join(FORMATS)) from error
