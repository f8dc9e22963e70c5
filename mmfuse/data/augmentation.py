"""Variety in training images, drawn from each sample's own random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mmfuse.errors import ConfigError


@dataclass(frozen=True)
class ImageAugmentation:
    """Random changes of an image; by default none.

    What an image becomes depends on the seed of the run, the sample and its epoch alone, so that a run that is resumed,
    or has other workers, sees the same images.

    Attributes:
        crop: the smallest share of the height and of the width that a random crop keeps, up to 1.
        brightness, contrast: by how much these may change: 0.2 is a factor between 0.8 and 1.2.
        flip: probability of a mirror image. Not for pictures with text, or with questions about left and right.

    Raises:
        ConfigError: values out of range.
    """

    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ConfigError(f"augment.crop is the share of an image that is kept, above 0 and up to 1: {self.crop}")
        for name in ("brightness", "contrast", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} must lie between 0 and 1, got {getattr(self, name)}")

    def __call__(self, image: Any, rng: np.random.Generator) -> Any:
        """Return a changed image; what is no image, such as features, stays as it is."""
        # As many draws whatever is switched on, so that one setting does not change what another one draws.
        height, width, top, left, bright, contrast, mirror = rng.random(7).tolist()
        if not isinstance(image, Image.Image):
            return image
        if self.crop < 1:
            size = [
                max(1, round(side * (self.crop + (1 - self.crop) * share)))
                for side, share in zip(image.size, (width, height), strict=True)
            ]
            x, y = round((image.width - size[0]) * left), round((image.height - size[1]) * top)
            image = image.crop((x, y, x + size[0], y + size[1]))
        if self.brightness:
            image = ImageEnhance.Brightness(image).enhance(1 + self.brightness * (2 * bright - 1))
        if self.contrast:
            image = ImageEnhance.Contrast(image).enhance(1 + self.contrast * (2 * contrast - 1))
        return ImageOps.mirror(image) if mirror < self.flip else image
