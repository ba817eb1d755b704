"""Open image files that may be damaged or hostile."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lavis.common.errors import DataError


def open_image(
    path: Path, *, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode an image to RGB.

    Args:
        formats: what Pillow may try, such as ``("PNG", "JPEG")``; all that it knows by default.
        max_pixels: refuse a larger picture before decoding it. Without, Pillow's own limit holds.

    Raises:
        DataError: if the file is missing, damaged, of another format, or so large that it may be
            a bomb.
    """
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if max_pixels is not None and width * height > max_pixels:
                raise DataError(
                    f"{path} is too large: {width} x {height} pixels are more than the "
                    f"{max_pixels / 1e6:.0f} million that are allowed"
                )
            return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError as error:
        kinds = f" as {', '.join(formats)}" if formats else ""
        raise DataError(f"{path} is not an image that can be read{kinds}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise what their format's library does
        raise DataError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
