"""Read videos: what their headers say, and the frames that are shown of them.

Training, the feature cache, evaluation, chat and the web page all come here, so that a video is
the same row of pictures to all of them. A file is read alone: formats that name other files or
addresses (playlists) are not opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lavis.common.errors import DataError, raised_as
from lavis.common.frames import VideoConfig
from lavis.common.images import TooLargeError, is_video, open_image, to_rgb
from lavis.common.packages import check_packages
from lavis.common.tiles import Grid

_ALONE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,ogg,asf,mpeg,mpegvideo,"
    "mpegts,m4v,gif,apng",
}


class Tile(NamedTuple):
    """A part of a picture."""

    grid: Grid
    number: int  # row by row, from 0


class Picture(NamedTuple):
    """Something to be shown: a picture's file or a part of it, or a frame of a video."""

    path: Path
    frame: int | None = None  # counted from 0, of a video
    tile: Tile | None = None


def parts_of(path: Path, grid: Grid) -> list[Picture]:
    """A picture, then its tiles."""
    tiles = (Picture(path, tile=Tile(grid, number)) for number in range(grid.tiles))
    return [Picture(path), *tiles]


def cut(image: Image.Image, grid: Grid) -> list[Image.Image]:
    """The tiles of an RGB picture, each of ``side`` x ``side`` pixels."""
    if not grid.tiles:
        return []
    columns, rows, side = grid
    resized = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    corners = [(x * side, y * side) for y in range(rows) for x in range(columns)]
    return [resized.crop((x, y, x + side, y + side)) for x, y in corners]


class VideoHeader(NamedTuple):
    """What is to be known of a video before its frames are decoded."""

    frames: int
    rate: float  # frames a second, on average


def read_header(path: Path, *, max_pixels: float = float("inf")) -> VideoHeader:
    """Number and rate of a video's frames; they are decoded only if the file does not say.

    Args:
        max_pixels: of all frames together; a longer or larger video is refused.

    Raises:
        DataError: the video cannot be read; :class:`TooLargeError` if it is too large.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise DataError(f"{path} has no video stream")
        stream = container.streams.video[0]
        size = stream.width * stream.height
        count, rate = int(stream.frames), float(stream.average_rate or 0)
        if not (count and rate):
            times: list[float] = []
            for frame in container.decode(stream):
                times.append(frame.time or 0.0)
                if len(times) * size > max_pixels:
                    break
            count = len(times)
            lasts = times[-1] - times[0] if times else 0.0
            rate = (count - 1) / lasts if lasts > 0 else 1.0
    if count < 1:
        raise DataError(f"{path} has no frames")
    if count * size > max_pixels:
        raise TooLargeError(
            f"{path} is too large: its frames have over {max_pixels:.0f} pixels together"
        )
    return VideoHeader(count, rate)


def open_frames(path: Path, wanted: Sequence[int]) -> list[Image.Image]:
    """Decode frames by their numbers, which ascend, to RGB.

    Raises:
        DataError: the video cannot be read, or ends before the last of them.
    """
    frames: list[Image.Image] = []
    with _opened(path) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i == wanted[len(frames)]:
                # a phone films on its side, and says so
                frames.append(to_rgb(frame.to_image().rotate(frame.rotation, expand=True)))
            if len(frames) == len(wanted):
                return frames
    raise DataError(f"{path} ends after {len(frames)} of the {len(wanted)} frames wanted")


def open_pictures(pictures: Sequence[Picture]) -> list[Image.Image]:
    """Decode pictures to RGB, the frames of a video, or the tiles of a picture, in one pass.

    Args:
        pictures: frames of a video in their order.

    Raises:
        DataError: one cannot be read.
    """
    images: list[Image.Image] = []
    for path, group in groupby(pictures, key=lambda picture: picture.path):
        same = list(group)
        frames = [p.frame for p in same if p.frame is not None]
        images += open_frames(path, frames) if frames else _open_parts(path, same)
    return images


def _open_parts(path: Path, parts: Sequence[Picture]) -> list[Image.Image]:
    image = open_image(path)
    tiles = {g: cut(image, g) for g in {part.tile.grid for part in parts if part.tile}}
    return [tiles[p.tile.grid][p.tile.number] if p.tile else image for p in parts]


def read_video(
    path: Path, config: VideoConfig, *, max_pixels: float = float("inf")
) -> list[Image.Image]:
    """The frames of a video that are shown; arguments and errors as :func:`read_header`."""
    return open_frames(path, config.choose(*read_header(path, max_pixels=max_pixels)))


def check_media(path: str | os.PathLike[str]) -> None:
    """Check that a file is a picture or a video.

    Raises:
        DataError: it cannot be read.
    """
    if is_video(path):
        read_header(Path(path))
    else:
        open_image(path)


def preview(path: Path) -> Image.Image:
    """A picture, or a few frames of a video in one; errors as :func:`check_media`."""
    return contact_sheet(read_video(path, VideoConfig(4)) if is_video(path) else [open_image(path)])


def contact_sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """At most four of a video's frames in one picture, row by row; one alone is itself."""
    if len(frames) == 1:
        return frames[0]
    most = min(len(frames), 4)
    shown = [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]
    width, height = shown[0].size
    sheet = Image.new("RGB", (2 * width, height * (-(-most // 2))), "white")
    for i, frame in enumerate(shown):
        sheet.paste(frame, (i % 2 * width, i // 2 * height))
    return sheet


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    av, what = _import_av(), f"{path} cannot be read as a video"
    with (
        raised_as(DataError, what, av.FFmpegError, OSError, ValueError),
        av.open(str(path), container_options=_ALONE) as container,
    ):
        yield container


@cache
def _import_av():  # type: ignore[no-untyped-def]
    check_packages("video", "a video")  # an older PyAV does not say which way up a frame is
    import av

    return av
