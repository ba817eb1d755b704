"""How libraries' vision encoders take their images, from small files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis.common.errors import ConfigError, WeightsError, raised_as
from lavis.common.registry import did_you_mean
from lavis.common.schema import ImageTransform, Key
from lavis.models.weights.shards import read_json
from lavis.processors.config import CLIP_MEAN, CLIP_STD

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def normalization(transform: ImageTransform) -> Normalization:
    """Mean and standard deviation, which are CLIP's unless a vision encoder says otherwise."""
    return transform.mean or CLIP_MEAN, transform.std or CLIP_STD


def of_folder(folder: Path, image_size: int | None, key: str) -> ImageTransform:
    """What the image processor of a folder of Transformers does.

    Its centre crop is left out: pictures are resized to a square as a whole.

    Args:
        image_size: in place of the folder's.
        key: names the folder in messages.

    Raises:
        WeightsError: the folder has none.
        ConfigError: it does what is not done here.
    """
    from transformers import AutoImageProcessor

    names = ("preprocessor_config.json", "processor_config.json")
    found = [path for name in names if (path := folder / name).is_file()]
    if not found:
        raise WeightsError(f"{key}: {folder} has no {names[0]}, which says how images are prepared")
    read_json(found[0])
    # The library's own checks raise all kinds.
    with raised_as(WeightsError, f"{key}: {found[0]} cannot be used", Exception):
        stock: Any = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if not stock.do_rescale or not math.isclose(stock.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"{found[0]}: pixels must be rescaled by 1/255 and by nothing else")
    if stock.resample not in RESAMPLE:
        raise ConfigError(f"{found[0]}: resample {stock.resample} is none of {RESAMPLE}")
    crop = stock.crop_size if getattr(stock, "do_center_crop", None) else None
    mean, std = stock.image_mean, stock.image_std
    if not stock.do_normalize:
        mean, std = (0.0,) * 3, (1.0,) * 3
    return ImageTransform(
        image_size or _side(dict(crop or stock.size), found[0]),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        RESAMPLE[int(stock.resample)],
    )


def _side(size: Mapping[str, int | None], file: Path) -> int:
    sides = {v for k, v in size.items() if v and k in ("height", "width", "shortest_edge")}
    if len(sides) != 1:
        raise ConfigError(f"{file}: no squares of one size ({dict(size)}): set image_size")
    return int(sides.pop())


def of_timm(model: str, image_size: int | None, key: Key) -> ImageTransform:
    """What timm says of a model.

    Raises:
        ConfigError: timm has no such model, or it reads another size.
    """
    import timm

    if not timm.is_model(model):
        near = did_you_mean(model, timm.list_models())
        raise ConfigError(f"{key('model')}: timm {timm.__version__} has no {model!r}{near}")
    said = timm.get_pretrained_cfg(model)
    size = said.input_size[1]
    if image_size not in (None, size) and said.fixed_input_size:
        raise ConfigError(
            f"{key('image_size')} is {image_size}, but {model} reads {size} pixels; take timm's "
            "model of that size, or remove the key"
        )
    return ImageTransform(image_size or size, said.mean, said.std, said.interpolation)
