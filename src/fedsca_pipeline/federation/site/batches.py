"""Batches of one site: seeded order, seeded augmentation, and features from the cache if they are in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsca_pipeline.compute import stream_seed
from fedsca_pipeline.config import AugmentConfig
from fedsca_pipeline.data.arrays import Arrays
from fedsca_pipeline.federation.site.augmentation import Augmentation
from fedsca_pipeline.federation.site.prefix import FeatureCache, Key
from fedsca_pipeline.model.batch import CPU, Batch

Embed = Callable[[Tensor, Tensor], Tensor]

# The corners 0 1 / 2 3 of an image in its eight views (flips and quarter turns); the first is the image itself.
_CORNERS = (
    (0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 3, 2), (1, 3, 0, 2), (2, 0, 3, 1), (2, 3, 0, 1), (3, 1, 2, 0), (3, 2, 1, 0),
)  # fmt: skip
VIEWS = range(len(_CORNERS))
UNCHANGED = 0


class SiteBatches:
    """The batches of one site, as input of the model's trained part.

    Args:
        data: the site's arrays.
        embed: images in 0..255 [B,3,S,S] and valid area [B,S,S] to features [B, ...].
        augment: how training images are augmented.
        cache: features of the site's (row, view) pairs. It may hold views of training images only if ``augment`` only
            flips and turns.
        device: of whole batches. Features that are not cached never leave it.
    """

    def __init__(
        self, data: Arrays, embed: Embed, augment: AugmentConfig, cache: FeatureCache, device: torch.device = CPU
    ) -> None:
        self._data, self._embed, self._augment, self._cache, self._device = data, embed, augment, cache, device
        self._generator = np.random.RandomState()

    def count(self, batch_size: int) -> int:
        """Return the number of batches in one epoch of training."""
        return -(-len(self._data.rows("train")) // batch_size)

    def training(self, batch_size: int, *, seed: int, site: str, round_: int, epoch: int) -> Iterator[Batch]:
        """Yield one epoch of augmented batches; the last may be smaller. The same arguments give the same batches."""
        order = np.random.default_rng(stream_seed(seed, site, round_, epoch)).permutation(self._data.rows("train"))
        for rows in _chunks(order, batch_size):
            yield self._stack([self.augmented(row, stream_seed(seed, site, round_, epoch, row)) for row in rows])

    def augmented(self, row: int, seed: int) -> Batch:
        """Return one training image as a batch, flipped, turned and jittered by ``seed``."""
        draws = Augmentation.draw(self._augment, seed, self._generator)
        image, mask, valid = _read(self._data, [row])
        mask, valid = draws.move(mask), draws.move(valid)

        def augmented_image() -> Tensor:
            return draws.jitter(draws.move(image).float()).clamp(0, 255)

        return Batch(self._features((row, _view(draws)), augmented_image, valid), mask, valid)

    def plain(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Yield a split in manifest order, unaugmented; the last batch may be smaller, an empty split yields none."""
        for rows in _chunks(self._data.rows(split), batch_size):
            yield self._stack([self._unchanged(row) for row in rows])

    def _unchanged(self, row: int) -> Batch:
        image, mask, valid = _read(self._data, [row])
        return Batch(self._features((row, UNCHANGED), lambda: image, valid), mask, valid)

    def _features(self, key: Key, image: Callable[[], Tensor], valid: Tensor) -> Tensor:
        features = self._cache.read(key)
        if features is None:
            features = self._cache.store(key, self._embed(image(), valid)[0])
        return features.unsqueeze(0)

    def _stack(self, samples: Sequence[Batch]) -> Batch:
        moved = [sample.to(self._device) for sample in samples]
        return Batch(*(torch.cat(parts) for parts in zip(*((s.inputs, s.masks, s.valid) for s in moved), strict=True)))


def plain_batches(data: Arrays, split: str, batch_size: int) -> Iterator[Batch]:
    """Yield the images of a split in manifest order; the last batch may be smaller, an empty split yields none."""
    for rows in _chunks(data.rows(split), batch_size):
        yield Batch(*_read(data, rows))


def _view(draws: Augmentation) -> int:
    return _CORNERS.index(tuple(draws.move(torch.arange(4).view(2, 2)).flatten().tolist()))


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _read(data: Arrays, rows: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    images, masks, valid = map(torch.from_numpy, data.batch(rows))
    return images, masks, valid
