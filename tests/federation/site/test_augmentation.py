from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data.meta_obj import set_track_meta
from monai.transforms import Compose, RandAdjustContrastd, RandFlipd, RandRotate90d, RandScaleIntensityd

from fedsca_pipeline.config import AugmentConfig
from fedsca_pipeline.federation.site.augmentation import Augmentation

KEYS = ("image", "mask")
IMAGE = torch.randint(0, 256, (3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MASK = torch.arange(48, dtype=torch.uint8).view(1, 6, 8)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(flip=0.3, rotate90=0.5, intensity=1.0, brightness=0.4, contrast=0.6),
        AugmentConfig(flip=1.0, rotate90=1.0, intensity=0.5, brightness=0.0, contrast=0.0),
        AugmentConfig(flip=0.0, rotate90=0.0, intensity=0.0),
    ],
    ids=["default", "all", "always", "never"],
)
def test_draws_and_values_are_those_of_monai(config: AugmentConfig) -> None:
    contrast = (1 - config.contrast, 1 + config.contrast)
    monai = Compose(
        [
            RandFlipd(KEYS, prob=config.flip, spatial_axis=0),
            RandFlipd(KEYS, prob=config.flip, spatial_axis=1),
            RandRotate90d(KEYS, prob=config.rotate90, max_k=3),
            RandScaleIntensityd("image", factors=config.brightness, prob=config.intensity),
            RandAdjustContrastd("image", gamma=contrast, prob=config.intensity),
        ]
    )
    generator = np.random.RandomState()
    set_track_meta(False)
    try:
        for seed in (*range(60), 2**32 - 1):
            expected = monai.set_random_state(seed=seed)({"image": IMAGE.float(), "mask": MASK})

            draws = Augmentation.draw(config, seed, generator)

            assert torch.equal(draws.move(MASK), expected["mask"])
            assert torch.equal(draws.jitter(draws.move(IMAGE).float()), expected["image"])
    finally:
        set_track_meta(True)


def test_a_move_keeps_type_and_leading_axes() -> None:
    draws = Augmentation(flip_rows=True, flip_columns=False, turns=1, brightness=1.0, gamma=1.0)

    assert draws.move(torch.zeros(2, 3, 4, 6, dtype=torch.bool)).shape == (2, 3, 6, 4)
    assert draws.move(MASK).dtype == torch.uint8
