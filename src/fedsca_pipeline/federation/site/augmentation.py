"""Seeded augmentation: flips and turns of image and mask, brightness and contrast of the image (docs/method.md).

Draws and values are, bit for bit, those of MONAI's RandFlipd, RandRotate90d, RandScaleIntensityd and
RandAdjustContrastd in this order. Importing MONAI takes longer than a short training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedsca_pipeline.config import AugmentConfig

# As in MONAI: each transform has a generator of its own, seeded by that of all.
_SEEDS, _RANGE = 5, 2**32
_LEAST = 1e-7


@dataclass(frozen=True)
class Augmentation:
    """The draws for one image. ``turns``: quarter turns, 0 to 3; ``brightness`` and ``gamma``: 1 changes nothing."""

    flip_rows: bool
    flip_columns: bool
    turns: int
    brightness: float
    gamma: float

    @classmethod
    def draw(cls, config: AugmentConfig, seed: int, generator: np.random.RandomState) -> Self:
        """Return the draws of a seed; the same seed gives the same.

        ``generator``: any, seeded here. Making a new one takes fifty times as long as seeding it.
        """
        generator.seed(seed)
        seeds = iter(generator.randint(_RANGE, size=_SEEDS, dtype="uint32"))

        def begin() -> np.random.RandomState:
            generator.seed(next(seeds))
            return generator

        flips = [begin().rand() < config.flip for _ in range(2)]
        turns = begin().randint(3) + 1
        return cls(
            flip_rows=flips[0],
            flip_columns=flips[1],
            turns=turns if generator.rand() < config.rotate90 else 0,
            brightness=1 + _jitter(begin(), -config.brightness, config.brightness, config.intensity, 0.0),
            gamma=_jitter(begin(), 1 - config.contrast, 1 + config.contrast, config.intensity, 1.0),
        )

    def move(self, pixels: Tensor) -> Tensor:
        """Return [..., H, W] flipped and turned; of the same type, and H and W may change places."""
        flipped = [axis for axis, flips in ((-2, self.flip_rows), (-1, self.flip_columns)) if flips]
        return torch.rot90(pixels.flip(flipped), self.turns, (-2, -1))

    def jitter(self, image: Tensor) -> Tensor:
        """Return an image in other brightness and contrast, float32."""
        if self.brightness != 1:
            image = image * self.brightness
        if self.gamma == 1:
            return image
        low = image.min()
        extent = image.max() - low
        changed: Tensor = ((image - low) / float(extent + _LEAST)) ** self.gamma * extent + low
        return changed


def _jitter(draws: np.random.RandomState, low: float, high: float, share: float, otherwise: float) -> float:
    """Return a value of ``low`` to ``high`` with probability ``share``."""
    # MONAI's inner transform starts with the same seed, and draws once to find that it is always applied: the number
    # that has decided here.
    return draws.uniform(low, high) if draws.rand() < share else otherwise
