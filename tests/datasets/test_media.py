"""Images that can be read, and those that cannot."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis.common.errors import DataError
from lavis.common.images import open_image


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
