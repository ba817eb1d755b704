"""Image -> tensor."""

from __future__ import annotations

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lavis.common.images import to_rgb
from lavis.processors.config import CLIP_MEAN, CLIP_STD, ImageEvalConfig, ImageTrainConfig


class ImageProcessor:
    """Base: :meth:`steps`, then make a normalized tensor."""

    random = True
    """Whether two calls on an image may differ."""
    image_size = 384
    """Without a vision encoder that says otherwise, as in the original."""

    def __init__(self, config: ImageEvalConfig) -> None:
        self.config = config
        self.image_size = size = config.image_size or self.image_size
        mode = InterpolationMode(config.interpolation or "bicubic")
        self.transform = transforms.Compose(
            [
                *self.steps(size, mode),
                transforms.ToTensor(),
                transforms.Normalize(config.mean or CLIP_MEAN, config.std or CLIP_STD),
            ]
        )

    def steps(self, size: int, mode: InterpolationMode) -> list[object]:
        """Pillow image -> square one of ``size`` pixels a side."""
        raise NotImplementedError

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a (3, H, W) float tensor."""
        return self.transform(to_rgb(image))


class BlipImageEval(ImageProcessor):
    """Resize to a square."""

    random = False

    def steps(self, size: int, mode: InterpolationMode) -> list[object]:
        return [transforms.Resize((size, size), mode)]


class Blip2ImageTrain(ImageProcessor):
    """Random resized crop and horizontal flip, drawn from PyTorch's generator."""

    config: ImageTrainConfig
    image_size = 364

    def steps(self, size: int, mode: InterpolationMode) -> list[object]:
        scale = self.config.min_scale, self.config.max_scale
        crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=mode)
        return [crop, transforms.RandomHorizontalFlip()]
