from __future__ import annotations

import numpy as np
import torch

from fedsca_pipeline.config import AugmentConfig
from fedsca_pipeline.federation.batches import build_augmentation, plain_batches, training_batches

PLACE = {"seed": 0, "site": "a", "round_": 1, "epoch": 0}


def test_the_same_place_gives_the_same_batches_and_another_round_gives_others(make_site) -> None:
    data, augmentation = make_site("a"), build_augmentation(AugmentConfig())

    first, again = (list(training_batches(data, 2, augmentation, **PLACE)) for _ in range(2))
    other = list(training_batches(data, 2, augmentation, **{**PLACE, "round_": 2}))

    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks) for a, b in zip(first, again, strict=True)
    )
    assert not all(torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))


def test_an_epoch_is_every_training_image_once(make_site) -> None:
    data = make_site("a")
    still = build_augmentation(AugmentConfig(flip=0, rotate90=0, intensity=0))

    batches = list(training_batches(data, 2, still, **PLACE))

    seen = sorted(int(image.sum()) for batch in batches for image in batch.images)
    expected = sorted(int(image.sum()) for image in data.batch(data.rows("train"))[0].astype(np.int64))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert seen == expected


def test_image_mask_and_padding_move_together(make_site) -> None:
    data = make_site("a")
    moved = build_augmentation(AugmentConfig(flip=0.5, rotate90=1, intensity=0))

    for batch in training_batches(data, 4, moved, **PLACE):
        # In these sites a pixel is bright exactly where its mask is 1.
        assert torch.equal(batch.images[:, 0] > 110, batch.masks == 1)
        assert batch.masks.dtype == torch.uint8
        assert batch.valid.all()


def test_intensity_changes_stay_in_range_and_leave_the_mask_alone(make_site) -> None:
    data = make_site("a")
    jitter = build_augmentation(AugmentConfig(flip=0, rotate90=0, intensity=1, brightness=0.5, contrast=0.5))

    batches = list(training_batches(data, 5, jitter, **PLACE))

    assert all(batch.images.min() >= 0 and batch.images.max() <= 255 for batch in batches)
    assert int(batches[0].masks.sum()) == int(data.batch(data.rows("train"))[1].sum())


def test_plain_batches_are_the_split_in_order(make_site) -> None:
    data = make_site("a")

    batches = list(plain_batches(data, "validation", 8))

    assert np.array_equal(batches[0].images.numpy(), data.batch(data.rows("validation"))[0])
    assert list(plain_batches(data, "unused", 8)) == []
