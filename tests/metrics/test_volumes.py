"""Scores of volumes against closed forms in mm, and against MONAI's own functions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from fedsca_pipeline.metrics.volumes import score_volume

SPACING = (0.5, 1.25, 3.0)


def ball(shape: tuple[int, int, int], radius: float, spacing: tuple[float, float, float] = SPACING) -> np.ndarray:
    """Return a ball of ``radius`` mm in the middle of the grid."""
    axes = [(np.arange(side) - (side - 1) / 2) * mm for side, mm in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return (x**2 + y**2 + z**2 <= radius**2).astype(np.uint8)


def score(pred: np.ndarray, truth: np.ndarray, tolerance: float = 2.0, spacing: Any = SPACING) -> dict[str, Any]:
    (record,) = score_volume(pred, truth, spacing, [1], tolerance)
    return record


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_a_plate_moved_along_its_normal_is_as_far_away_as_it_was_moved(axis: int, shift: int) -> None:
    truth, pred = np.zeros((2, 9, 8, 7), np.uint8)
    np.moveaxis(truth, axis, 0)[1, 1:6, 1:6] = 1
    np.moveaxis(pred, axis, 0)[1 + shift, 1:6, 1:6] = 1
    mm = shift * SPACING[axis]
    found = score(pred, truth, tolerance=mm + 0.01)
    assert (found["dice"], found["nsd"], found["empty"]) == (0.0, 1.0, "")
    assert (found["hd95_mm"], found["asd_mm"]) == pytest.approx((mm, mm))
    assert score(pred, truth, tolerance=mm - 0.01)["nsd"] == 0.0


def test_the_dice_of_shifted_boxes_is_the_product_of_their_overlaps() -> None:
    truth, pred = np.zeros((2, 30, 30, 30), np.uint8)
    truth[5:15, 5:15, 5:15] = 1
    pred[7:17, 6:16, 8:18] = 1
    assert score(pred, truth)["dice"] == pytest.approx(0.8 * 0.9 * 0.7)
    assert score(pred, truth)["hd95_mm"] <= math.hypot(2 * SPACING[0], 1 * SPACING[1], 3 * SPACING[2])


def test_concentric_balls_are_apart_by_the_difference_of_their_radii() -> None:
    spacing = (0.4, 0.5, 0.8)
    small, large = (ball((72, 60, 40), radius, spacing) for radius in (8.0, 12.0))
    found = score(small, large, spacing=spacing, tolerance=4.0 + 1.0)
    assert found["dice"] == pytest.approx(2 * 8**3 / (8**3 + 12**3), rel=0.01)
    assert found["hd95_mm"] == pytest.approx(4.0, abs=0.5)
    assert found["asd_mm"] == pytest.approx(4.0, abs=0.3)
    assert found["nsd"] == 1.0
    assert score(small, large, spacing=spacing, tolerance=3.0)["nsd"] == 0.0


def test_a_perfect_prediction_has_perfect_scores() -> None:
    truth = ball((20, 12, 8), 4.0)
    assert score(truth, truth) == {"class": 1, "dice": 1.0, "hd95_mm": 0.0, "asd_mm": 0.0, "nsd": 1.0, "empty": ""}


def test_empty_masks_score_as_documented() -> None:
    nothing, something = np.zeros((20, 12, 8), np.uint8), ball((20, 12, 8), 4.0)
    diagonal = math.hypot(20 * 0.5, 12 * 1.25, 8 * 3.0)
    assert score(nothing, nothing) == {
        "class": 1, "dice": 1.0, "hd95_mm": 0.0, "asd_mm": 0.0, "nsd": 1.0, "empty": "both",
    }  # fmt: skip
    for pred, truth, empty in ((something, nothing, "truth"), (nothing, something, "prediction")):
        found = score(pred, truth)
        assert (found["dice"], found["nsd"], found["empty"]) == (0.0, 0.0, empty)
        assert found["hd95_mm"] == found["asd_mm"] == pytest.approx(diagonal)


def test_only_the_given_classes_are_scored_each_by_itself() -> None:
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:3], truth[4] = 1, 3
    pred = np.where(truth == 3, 2, truth)
    found = {record["class"]: record for record in score_volume(pred, truth, SPACING, [1, 3], 1.0)}
    assert found[1]["dice"] == 1.0
    assert found[3]["empty"] == "prediction"
    assert list(found) == [1, 3]


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(2, 7)] * 3), st.floats(0.1, 0.9), st.floats(0.1, 6.0))
def test_scores_are_those_of_monai(seed: int, shape: tuple[int, int, int], share: float, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    pred, truth = (rng.random((2, *shape)) < share).astype(np.uint8)
    pred[0, 0, 0] = truth[-1, -1, -1] = 1
    found = score(pred, truth, tolerance)
    given_ = {"y_pred": torch.from_numpy(pred)[None, None].bool(), "y": torch.from_numpy(truth)[None, None].bool()}
    options = {"include_background": True, "spacing": SPACING}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd95 = compute_hausdorff_distance(**given_, percentile=95, **options).item()
        nsd = compute_surface_dice(**given_, class_thresholds=[tolerance], **options).item()
        there = compute_average_surface_distance(**given_, symmetric=True, **options).item()
    assert found["hd95_mm"] == pytest.approx(hd95, rel=1e-5)
    assert found["nsd"] == pytest.approx(nsd, rel=1e-5)
    assert found["asd_mm"] == pytest.approx(there, rel=1e-5)
