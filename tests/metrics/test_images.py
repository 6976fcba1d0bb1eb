"""Scores of images against closed forms, dense distance transforms and MONAI's own functions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    get_mask_edges,
    get_surface_distance,
)
from scipy import ndimage

from fedsca_pipeline.metrics.images import dice_per_image, score_images, surface_distances

SEEDS = st.integers(0, 2**32 - 1)


def random_masks(seed: int, images: int = 2, classes: int = 2, side: int = 20) -> torch.Tensor:
    """Return random blobs bool [B, K, H, W]; some are empty or full."""
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.normal(size=(images, classes, side, side)), sigma=(0, 0, 2, 2))
    return torch.from_numpy(noise > generator.uniform(-0.4, 0.6, size=(images, classes, 1, 1)))


def random_sizes(seed: int, images: int = 2, side: int = 20) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 1).integers(5, side + 1, size=(images, 2)))


def full_sizes(masks: torch.Tensor) -> torch.Tensor:
    return torch.tensor([list(masks.shape[-2:])] * len(masks))


def valid_area(sizes: torch.Tensor, side: int) -> torch.Tensor:
    valid = torch.zeros(len(sizes), side, side, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes.tolist()):
        valid[image, :height, :width] = True
    return valid


def square(top: int, left: int, length: int, side: int = 32) -> torch.Tensor:
    mask = torch.zeros(1, 1, side, side, dtype=torch.bool)
    mask[..., top : top + length, left : left + length] = True
    return mask


def reference_distances(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, float]) -> tuple[float, float]:
    """Return HD95 and ASD from dense distance transforms of four-connected inner boundaries."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, truth)]
    to_pred, to_truth = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
    there, back = to_truth[edges[0]], to_pred[edges[1]]
    return max(np.percentile(there, 95), np.percentile(back, 95)), float(np.concatenate([there, back]).mean())


def test_dice_and_iou_of_shifted_squares_have_their_closed_form() -> None:
    pred, truth = square(4, 4, 10), square(4, 9, 10)

    (score,) = score_images(pred, truth, full_sizes(pred))

    assert score["dice"] == pytest.approx(2 * 50 / 200)
    assert score["iou"] == pytest.approx(50 / 150)
    assert dice_per_image(pred, truth, torch.ones(1, 32, 32, dtype=torch.bool)).item() == pytest.approx(0.5, abs=1e-15)


def test_distances_of_single_pixels_are_the_distance_between_their_centres() -> None:
    pred, truth = square(3, 5, 1), square(6, 9, 1)

    (score,) = score_images(pred, truth, full_sizes(pred))

    assert (score["hd95"], score["asd"]) == (5.0, 5.0)


def test_spacing_scales_height_and_width_separately() -> None:
    pred, truth = square(3, 5, 1), square(6, 9, 1)

    (score,) = score_images(pred, truth, full_sizes(pred), spacing=(4.0, 0.5))

    assert score["hd95"] == pytest.approx(math.hypot(3 * 4.0, 4 * 0.5))


def test_a_square_grown_by_two_pixels_has_its_closed_form_distances() -> None:
    truth, pred = square(10, 10, 9), square(8, 8, 13)

    (score,) = score_images(pred, truth, full_sizes(pred))

    # Of the 48 outer pixels 36 face the inner square and 3 lie around each of its corners.
    corner = [math.hypot(2, 1), math.hypot(2, 2), math.hypot(1, 2)] * 4
    outer = [2.0] * 36 + corner
    inner = [2.0] * 32
    assert score["asd"] == pytest.approx(np.mean(outer + inner), abs=1e-6)
    assert score["hd95"] == pytest.approx(np.percentile(outer, 95), abs=1e-6)


@pytest.mark.parametrize(
    ("pred_there", "truth_there", "overlap", "distance", "empty"),
    [
        (False, False, 1.0, 0.0, "both"),
        (True, False, 0.0, math.hypot(30, 20), "truth"),
        (False, True, 0.0, math.hypot(30, 20), "prediction"),
    ],
)
def test_empty_masks_follow_the_convention(
    pred_there: bool, truth_there: bool, overlap: float, distance: float, empty: str
) -> None:
    there, none = square(2, 2, 5), square(0, 0, 0)
    sizes = torch.tensor([[30, 20]])

    (score,) = score_images(there if pred_there else none, there if truth_there else none, sizes)

    assert (score["dice"], score["iou"]) == (overlap, overlap)
    assert (score["hd95"], score["asd"]) == pytest.approx((distance, distance))
    assert score["empty"] == empty


def test_the_diagonal_of_one_empty_mask_is_in_units_of_the_spacing() -> None:
    (score,) = score_images(square(2, 2, 5), square(0, 0, 0), torch.tensor([[30, 20]]), spacing=(2.0, 0.5))

    assert score["hd95"] == pytest.approx(math.hypot(60, 10))


def test_a_mask_only_in_the_padding_counts_as_empty() -> None:
    (score,) = score_images(square(20, 20, 8), square(2, 2, 8), torch.tensor([[16, 16]]))

    assert score["empty"] == "prediction"


def test_full_masks_are_compared_along_the_image_border() -> None:
    full = torch.ones(1, 1, 12, 12, dtype=torch.bool)

    (score,) = score_images(full, square(0, 0, 10, side=12), full_sizes(full))

    assert score["empty"] == ""
    assert 0 < score["asd"] < score["hd95"] <= math.hypot(2, 2) + 1e-6


@settings(deadline=None, max_examples=60)
@given(SEEDS)
def test_scores_are_always_finite_and_in_range(seed: int) -> None:
    pred, truth, sizes = random_masks(seed), random_masks(seed + 7), random_sizes(seed)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_images(pred, truth, sizes)

    assert len(scores) == 4
    for score, (height, width) in zip(scores, np.repeat(sizes.numpy(), 2, axis=0), strict=True):
        assert 0 <= score["iou"] <= score["dice"] <= 1
        assert 0 <= score["asd"] <= math.hypot(height, width)
        assert 0 <= score["hd95"] <= math.hypot(height, width)
        assert score["dice"] == pytest.approx(2 * score["iou"] / (1 + score["iou"]), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)))
def test_distances_agree_with_dense_distance_transforms(seed: int, spacing: tuple[float, float]) -> None:
    pred, truth, sizes = random_masks(seed), random_masks(seed + 7), random_sizes(seed)

    scores = iter(score_images(pred, truth, sizes, spacing))

    for image, (height, width) in enumerate(sizes.tolist()):
        for label in range(2):
            score = next(scores)
            if score["empty"]:
                continue
            a, b = (masks[image, label, :height, :width].numpy() for masks in (pred, truth))
            expected = reference_distances(a, b, spacing)
            assert (score["hd95"], score["asd"]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert score["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_dice_and_iou_are_those_of_monai(seed: int) -> None:
    pred, truth = random_masks(seed), random_masks(seed + 7)
    pred[0, 0] = truth[0, 0] = truth[1, 1] = False

    scores = score_images(pred, truth, full_sizes(pred))

    options = {"include_background": True, "ignore_empty": False}
    assert [score["dice"] for score in scores] == compute_dice(pred, truth, **options).flatten().tolist()
    assert [score["iou"] for score in scores] == compute_iou(pred, truth, **options).flatten().tolist()


@pytest.mark.parametrize("shape", [(9, 12), (5, 7, 6)], ids=str)
def test_surface_distances_are_those_of_monai(shape: tuple[int, ...]) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pred, truth = rng.random((2, *shape)) < rng.uniform(0.05, 0.95)
        pred.flat[0] = truth.flat[-1] = True
        spacing = tuple(rng.uniform(0.2, 3.0, len(shape)))
        edges = get_mask_edges(pred, truth, crop=bool(seed % 2))

        there, back = surface_distances(pred, truth, spacing)

        np.testing.assert_array_equal(there, get_surface_distance(*edges, spacing=spacing))
        np.testing.assert_array_equal(back, get_surface_distance(*edges[::-1], spacing=spacing))


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
def test_distances_agree_with_monais_own_functions() -> None:
    pred, truth = (random_masks(seed, images=4, classes=2, side=40) for seed in (3, 4))
    # A pixel in opposite corners, so that no mask is empty.
    pred[..., 0, 0] = truth[..., -1, -1] = True

    scores = score_images(pred, truth, full_sizes(pred))

    options = {"include_background": True, "spacing": 1.0}
    hd95 = compute_hausdorff_distance(pred, truth, percentile=95, **options).flatten().tolist()
    asd = compute_average_surface_distance(pred, truth, symmetric=True, **options).flatten().tolist()
    assert [score["hd95"] for score in scores] == pytest.approx(hd95, rel=1e-5)
    assert [score["asd"] for score in scores] == pytest.approx(asd, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(0, 9), st.integers(0, 9))
def test_padding_changes_nothing_whatever_is_predicted_there(seed: int, below: int, right: int) -> None:
    pred, truth, sizes = random_masks(seed), random_masks(seed + 7), random_sizes(seed)
    pad = (0, right, 0, below)
    padded_pred = torch.nn.functional.pad(pred, pad, value=True)
    padded_truth = torch.nn.functional.pad(truth, pad, value=False)

    assert score_images(padded_pred, padded_truth, sizes) == score_images(pred, truth, sizes)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_every_image_and_class_is_scored_by_itself(seed: int) -> None:
    pred, truth, sizes = random_masks(seed, 3), random_masks(seed + 7, 3), random_sizes(seed, 3)
    order = [2, 0, 1]

    together = score_images(pred, truth, sizes)
    permuted = score_images(pred[order], truth[order], sizes[order])
    classes_swapped = score_images(pred.flip(1), truth.flip(1), sizes)

    assert permuted == [together[2 * image + label] for image in order for label in range(2)]
    expected = [together[2 * image + 1 - label] | {"class": label + 1} for image in range(3) for label in range(2)]
    assert classes_swapped == expected


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_swapping_prediction_and_truth_changes_only_which_one_is_empty(seed: int) -> None:
    pred, truth, sizes = random_masks(seed), random_masks(seed + 7), random_sizes(seed)
    swap = {"truth": "prediction", "prediction": "truth"}

    there, back = score_images(pred, truth, sizes), score_images(truth, pred, sizes)

    for one, other in zip(there, back, strict=True):
        assert swap.get(one["empty"], one["empty"]) == other["empty"]
        assert [one[name] for name in ("dice", "iou", "hd95", "asd")] == pytest.approx(
            [other[name] for name in ("dice", "iou", "hd95", "asd")]
        )


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_identical_masks_are_perfect(seed: int) -> None:
    masks, sizes = random_masks(seed), random_sizes(seed)

    for score in score_images(masks, masks.clone(), sizes):
        assert (score["dice"], score["iou"], score["hd95"], score["asd"]) == (1.0, 1.0, 0.0, 0.0)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_dice_per_image_agrees_with_score_images(seed: int) -> None:
    pred, truth, sizes = random_masks(seed), random_masks(seed + 7), random_sizes(seed)

    cheap = dice_per_image(pred, truth, valid_area(sizes, 20))

    assert cheap.dtype == torch.float64
    assert cheap.flatten().tolist() == pytest.approx(
        [score["dice"] for score in score_images(pred, truth, sizes)], abs=1e-6
    )


def test_dice_per_image_of_masks_without_valid_pixels_is_one() -> None:
    valid = valid_area(torch.tensor([[8, 8]]), 32)

    assert dice_per_image(square(20, 20, 4), square(9, 9, 4), valid).tolist() == [[1.0]]


def test_inputs_are_left_as_they_were() -> None:
    pred, truth, sizes = random_masks(1), random_masks(2), random_sizes(1)
    copies = pred.clone(), truth.clone(), sizes.clone()

    score_images(pred, truth, sizes)

    assert all(torch.equal(now, before) for now, before in zip((pred, truth, sizes), copies, strict=True))
