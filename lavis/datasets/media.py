"""Sample video frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from lavis.common.errors import DataError
from lavis.common.images import to_rgb
from lavis.common.packages import check_packages


def frame_indices(total: int, max_frames: int) -> list[int]:
    """Indices of at most ``max_frames`` evenly spaced frames, as the original picks them."""
    interval = max(total // max_frames, 1)
    return list(range(0, total, interval))[:max_frames]


def count_frames(path: Path) -> int:
    """Number of frames of a video, decoding it only if its header does not say.

    Raises:
        DataError: if the video cannot be read.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise DataError(f"{path} has no video stream")
        stream = container.streams.video[0]
        count = int(stream.frames) or sum(1 for _ in container.decode(stream))
    if count < 1:
        raise DataError(f"{path} has no frames")
    return count


def open_frames(path: Path, max_frames: int) -> list[Image.Image]:
    """Decode evenly spaced frames of a video to RGB.

    Raises:
        DataError: if the video cannot be read or ends before its header says.
    """
    wanted = frame_indices(count_frames(path), max_frames)
    frames: list[Image.Image] = []
    with _opened(path) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i == wanted[len(frames)]:
                # a phone films on its side, and says so
                frames.append(to_rgb(frame.to_image().rotate(frame.rotation, expand=True)))
            if len(frames) == len(wanted):
                return frames
    raise DataError(f"{path} ends after {len(frames)} of the {len(wanted)} frames wanted")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    av = _import_av()
    try:
        with av.open(str(path)) as container:
            yield container
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from error


@cache
def _import_av():  # type: ignore[no-untyped-def]
    check_packages("video", "a video")  # an older PyAV does not say which way up a frame is
    import av

    return av
