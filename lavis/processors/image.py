"""Image -> tensor."""

from __future__ import annotations

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lavis.common.images import to_rgb
from lavis.processors.config import CLIP_MEAN, CLIP_STD, ImageEvalConfig, ImageTrainConfig


class ImageProcessor:
    """Base: apply ``steps``, then make a normalized tensor."""

    random = True
    """Whether two calls on an image may differ."""

    def __init__(self, config: ImageEvalConfig, *steps: object) -> None:
        self.config = config
        self.transform = transforms.Compose(
            [
                *steps,
                transforms.ToTensor(),
                transforms.Normalize(config.mean or CLIP_MEAN, config.std or CLIP_STD),
            ]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a (3, H, W) float tensor."""
        return self.transform(to_rgb(image))


class BlipImageEval(ImageProcessor):
    """Bicubic resize to a square."""

    random = False

    def __init__(self, config: ImageEvalConfig) -> None:
        size = (config.image_size, config.image_size)
        super().__init__(config, transforms.Resize(size, InterpolationMode.BICUBIC))


class Blip2ImageTrain(ImageProcessor):
    """Random resized crop (bicubic) and horizontal flip, drawn from PyTorch's generator."""

    def __init__(self, config: ImageTrainConfig) -> None:
        super().__init__(
            config,
            transforms.RandomResizedCrop(
                config.image_size,
                scale=(config.min_scale, config.max_scale),
                interpolation=InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(),
        )
