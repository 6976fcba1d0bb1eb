from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsca_pipeline.config import AugmentConfig
from fedsca_pipeline.federation.site.batches import UNCHANGED, VIEWS, SiteBatches, plain_batches
from fedsca_pipeline.federation.site.prefix import FeatureCache

EPOCH = {"seed": 0, "site": "a", "round_": 1, "epoch": 0}
VIEWS_ALONE = AugmentConfig(flip=0.5, rotate90=0.75, intensity=0)


def site_batches(data, augmentation, cache: FeatureCache | None = None, embed=lambda images, valid: images.float()):
    """Return batches whose features are the images themselves."""
    return SiteBatches(data, embed, augmentation, cache or FeatureCache(Path("unused"), [], (3, 32, 32), 0))


def test_equal_arguments_give_equal_batches_and_another_round_gives_others(make_site) -> None:
    data, augmentation = make_site("a"), AugmentConfig(intensity=0.5)

    first, again = (list(site_batches(data, augmentation).training(2, **EPOCH)) for _ in range(2))
    other = list(site_batches(data, augmentation).training(2, **{**EPOCH, "round_": 2}))

    assert all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.masks, b.masks) for a, b in zip(first, again, strict=True)
    )
    assert not all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, other, strict=True))


def test_an_epoch_is_every_training_image_once(make_site) -> None:
    data = make_site("a")
    still = AugmentConfig(flip=0, rotate90=0, intensity=0)

    batches = list(site_batches(data, still).training(2, **EPOCH))

    seen = sorted(int(image.sum()) for batch in batches for image in batch.inputs)
    expected = sorted(int(image.sum()) for image in data.batch(data.rows("train"))[0].astype(np.int64))
    assert [len(batch.inputs) for batch in batches] == [2, 2, 1]
    assert seen == expected


def test_image_mask_and_padding_move_together(make_site) -> None:
    data = make_site("a")
    moved = AugmentConfig(flip=0.5, rotate90=1, intensity=0)

    for batch in site_batches(data, moved).training(4, **EPOCH):
        # In these sites a pixel is bright exactly where its mask is 1.
        assert torch.equal(batch.inputs[:, 0] > 110, batch.masks == 1)
        assert batch.masks.dtype == torch.uint8
        assert batch.valid.all()


def test_intensity_changes_stay_in_range_and_leave_the_mask_alone(make_site) -> None:
    data = make_site("a")
    jitter = AugmentConfig(flip=0, rotate90=0, intensity=1, brightness=0.5, contrast=0.5)

    batches = list(site_batches(data, jitter).training(5, **EPOCH))

    assert all(batch.inputs.min() >= 0 and batch.inputs.max() <= 255 for batch in batches)
    assert int(batches[0].masks.sum()) == int(data.batch(data.rows("train"))[1].sum())


def test_plain_batches_are_the_split_in_order(make_site) -> None:
    data = make_site("a")

    batches = list(plain_batches(data, "validation", 8))

    assert np.array_equal(batches[0].inputs.numpy(), data.batch(data.rows("validation"))[0])
    assert list(plain_batches(data, "unused", 8)) == []


def test_every_view_of_an_image_is_recognised_and_computed_once(make_site, tmp_path: Path) -> None:
    data, calls = make_site("a"), []

    def embed(images, valid):
        calls.append(1)
        return images.float()

    rows = [int(row) for row in data.rows("train")]
    cache = FeatureCache(tmp_path / "features", [(row, view) for row in rows for view in VIEWS], (3, 32, 32), 10**9)
    augmentation = VIEWS_ALONE
    for round_ in range(1, 41):
        place = {**EPOCH, "round_": round_}
        kept = list(site_batches(data, augmentation, cache, embed).training(2, **place))
        computed = list(site_batches(data, augmentation).training(2, **place))
        # Whole numbers up to 255 are exact in fp16.
        for ours, theirs in zip(kept, computed, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.masks, theirs.masks)

    assert len(calls) == len(VIEWS) * len(rows)


def test_an_unchanged_image_is_embedded_once(make_site, tmp_path: Path) -> None:
    data, calls = make_site("a"), []

    def embed(images, valid):
        calls.append(1)
        return images.float()

    keys = [(int(row), UNCHANGED) for row in data.rows("validation")]
    cache = FeatureCache(tmp_path / "features", keys, (3, 32, 32), 10**9)
    batches = site_batches(data, AugmentConfig(), cache, embed)

    first, again = (torch.cat([batch.inputs for batch in batches.plain("validation", 8)]) for _ in range(2))

    assert torch.equal(first, again)
    assert np.array_equal(first.numpy(), data.batch(data.rows("validation"))[0])
    assert len(calls) == len(keys)
    assert list(batches.plain("unused", 8)) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_batch_moves_to_cuda(make_site) -> None:
    (batch,) = plain_batches(make_site("a"), "validation", 8)

    moved = batch.to(torch.device("cuda"))

    assert moved.inputs.is_cuda
    assert torch.equal(moved.inputs.cpu(), batch.inputs)
