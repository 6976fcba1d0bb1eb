"""Batches of one site: seeded order, seeded augmentation, normalised for the foundation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data.meta_obj import set_track_meta
from monai.transforms import Compose, RandAdjustContrastd, RandFlipd, RandRotate90d, RandScaleIntensityd
from torch import Tensor

from fedsca_pipeline.config import AugmentConfig
from fedsca_pipeline.federation.devices import stream_seed
from fedsca_pipeline.sites.arrays import SiteArrays

_IMAGE, _GEOMETRY = "image", ("image", "mask", "valid")


@dataclass(frozen=True)
class Batch:
    """``images`` uint8-ranged [B,3,S,S], ``masks`` uint8 [B,S,S], ``valid`` bool [B,S,S]: False on padding."""

    images: Tensor
    masks: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(*(t.to(device, non_blocking=True) for t in (self.images, self.masks, self.valid)))


def build_augmentation(config: AugmentConfig) -> Compose:
    """MONAI transforms of docs/method.md: flips and quarter turns of all three, intensity jitter of the image."""
    return Compose(
        [
            RandFlipd(_GEOMETRY, prob=config.flip, spatial_axis=0),
            RandFlipd(_GEOMETRY, prob=config.flip, spatial_axis=1),
            RandRotate90d(_GEOMETRY, prob=config.rotate90, max_k=3),
            RandScaleIntensityd(_IMAGE, factors=config.brightness, prob=config.intensity),
            RandAdjustContrastd(_IMAGE, gamma=(1 - config.contrast, 1 + config.contrast), prob=config.intensity),
        ]
    )


def training_batches(
    data: SiteArrays, batch_size: int, augmentation: Compose, *, seed: int, site: str, round_: int, epoch: int
) -> Iterator[Batch]:
    """Yield one epoch of augmented batches; the last may be smaller. The same arguments give the same batches."""
    rows = data.rows("train")
    order = np.random.default_rng(stream_seed(seed, site, round_, epoch)).permutation(rows)
    for chunk in _chunks(order, batch_size):
        yield _augmented(_read(data, chunk), augmentation, [stream_seed(seed, site, round_, epoch, r) for r in chunk])


def plain_batches(data: SiteArrays, split: str, batch_size: int) -> Iterator[Batch]:
    """Yield a split in manifest order, unaugmented; the last batch may be smaller, an empty split yields none."""
    for chunk in _chunks(data.rows(split), batch_size):
        yield _read(data, chunk)


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _read(data: SiteArrays, rows: Sequence[int]) -> Batch:
    return Batch(*map(torch.from_numpy, data.batch(rows)))


def _augmented(batch: Batch, augmentation: Compose, seeds: Sequence[int]) -> Batch:
    # MetaTensor bookkeeping costs more than the transforms themselves; nothing here needs it.
    set_track_meta(False)
    try:
        samples = [
            augmentation.set_random_state(seed=seed)(
                {"image": image.float(), "mask": mask.unsqueeze(0), "valid": valid.unsqueeze(0)}
            )
            for image, mask, valid, seed in zip(batch.images, batch.masks, batch.valid, seeds, strict=True)
        ]
    finally:
        set_track_meta(True)
    images, masks, valid = (torch.stack([sample[key] for sample in samples]) for key in _GEOMETRY)
    return Batch(images.clamp(0, 255), masks[:, 0].to(torch.uint8), valid[:, 0].bool())
