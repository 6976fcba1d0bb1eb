"""Overlap and surface distances of whole volumes, per class, in mm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedsca_pipeline.metrics.images import EMPTY_DIAGONALS, asd_of, dice_of, hd95_of, surface_distances, which_is_empty


def score_volume(
    pred: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, float, float],
    classes: Sequence[int],
    tolerance: float,
) -> list[dict[str, Any]]:
    """Return the scores of each class of one volume on the volume's own grid.

    Surfaces, HD95 and ASD are defined as in ``images.score_images``, in three dimensions and mm. NSD, the normalised
    surface Dice, is the share of both masks' surface voxels within ``tolerance`` of the other mask's surface (Nikolov
    et al., arXiv 1809.04430, with MONAI's surfaces). Both masks empty: Dice and NSD 1, distances 0. One mask empty:
    Dice and NSD 0, distances the volume's diagonal. No score is NaN or infinite.

    Args:
        pred, truth: label maps uint8 [X, Y, Z], 0 = background.
        spacing: mm along X, Y and Z, which are assumed to be at right angles.
        classes: classes to score.
        tolerance: mm, above 0.

    Returns:
        One record per class, in the order of ``classes``: ``class``, ``dice``, ``hd95_mm``, ``asd_mm``, ``nsd``, and
        ``empty``, which names the empty mask: ``both``, ``truth``, ``prediction`` or "" for neither.

    >>> truth = np.zeros((4, 4, 4), np.uint8)
    >>> truth[1:3, 1:3, 1:3] = 1
    >>> score_volume(np.roll(truth, 1, axis=2), truth, (1.0, 1.0, 2.5), [1], tolerance=2.0)
    [{'class': 1, 'dice': 0.5, 'hd95_mm': 2.5, 'asd_mm': 1.25, 'nsd': 0.5, 'empty': ''}]
    """
    return [{"class": label, **_score(pred == label, truth == label, spacing, tolerance)} for label in classes]


def _score(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float], tolerance: float
) -> dict[str, float | str]:
    empty = which_is_empty(pred, truth)
    pred_mask, truth_mask = (torch.from_numpy(mask)[None, None] for mask in (pred, truth))
    dice = dice_of(pred_mask, truth_mask).item()
    if empty:
        diagonal = math.hypot(*(side * mm for side, mm in zip(pred.shape, spacing, strict=True)))
        distance, nsd = EMPTY_DIAGONALS[empty] * diagonal, float(empty == "both")
        return {"dice": dice, "hd95_mm": distance, "asd_mm": distance, "nsd": nsd, "empty": empty}
    to_truth, to_pred = surface_distances(pred, truth, spacing)
    return {
        "dice": dice,
        "hd95_mm": hd95_of(to_truth, to_pred),
        "asd_mm": asd_of(to_truth, to_pred),
        "nsd": float((np.concatenate([to_truth, to_pred]) <= tolerance).mean()),
        "empty": empty,
    }
