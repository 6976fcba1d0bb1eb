"""Scores of whole volumes, in mm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice

from fedsca_pipeline.metrics.images import EMPTY_DIAGONALS, asd_of, hd95_of, surface_distances, which_is_empty


def score_volume(
    pred: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, float, float],
    classes: Sequence[int],
    tolerance: float,
) -> list[dict[str, Any]]:
    """Score each class of one volume on its own grid.

    Surfaces, HD95 and ASD are those of ``metrics.score_images``, in three dimensions and mm. NSD, the normalised
    surface Dice, is the share of the surface voxels of both masks that lie within ``tolerance`` of the other's surface
    (Nikolov et al., arXiv 1809.04430; surfaces as MONAI counts them). Both masks empty: Dice and NSD 1,
    distances 0. One empty: Dice and NSD 0, distances the diagonal of the volume. Nothing is ever NaN or infinite.

    Args:
        pred, truth: labels uint8 [X, Y, Z], 0 = background.
        spacing: mm along X, Y and Z; axes are taken to be at right angles.
        classes: to score.
        tolerance: mm, above 0.

    Returns:
        One record a class, in their order: ``class``, ``dice``, ``hd95_mm``, ``asd_mm``, ``nsd``, and ``empty``, which
        names the empty mask: ``both``, ``truth``, ``prediction`` or "" for neither.
    """
    return [{"class": label, **_score(pred == label, truth == label, spacing, tolerance)} for label in classes]


def _score(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float], tolerance: float
) -> dict[str, float | str]:
    empty = which_is_empty(pred, truth)
    masks = (torch.from_numpy(mask)[None, None] for mask in (pred, truth))
    dice = compute_dice(*masks, include_background=True, ignore_empty=False).item()
    if empty:
        diagonal = math.hypot(*(side * mm for side, mm in zip(pred.shape, spacing, strict=True)))
        distance, nsd = EMPTY_DIAGONALS[empty] * diagonal, float(empty == "both")
        return {"dice": dice, "hd95_mm": distance, "asd_mm": distance, "nsd": nsd, "empty": empty}
    there, back = surface_distances(pred, truth, spacing, crop=True)
    return {
        "dice": dice,
        "hd95_mm": hd95_of(there, back),
        "asd_mm": asd_of(there, back),
        "nsd": float((np.concatenate([there, back]) <= tolerance).mean()),
        "empty": empty,
    }
