"""Overlap and surface distances of masks, per image and class; the background is never a class (docs/data.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType

import numpy as np
import torch
from monai.metrics import compute_dice, compute_iou, get_mask_edges, get_surface_distance
from torch import Tensor


def dice_per_image(pred: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Dice of each image and class over the valid pixels; 1 where both masks are empty there.

    Args:
        pred, truth: bool [B, K, H, W].
        valid: bool [B, H, W], False on padding.

    Returns:
        float64 [B, K], in 0..1.
    """
    pred, truth = pred & valid[:, None], truth & valid[:, None]
    overlap, total = _area(pred & truth), _area(pred) + _area(truth)
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)


def score_images(
    pred: Tensor, truth: Tensor, sizes: Tensor, spacing: tuple[float, float] = (1.0, 1.0)
) -> list[dict[str, int | float | str]]:
    """Score every image and class on its unpadded area, the top left ``sizes[b]`` of the array.

    HD95 is the larger of the two directed 95th percentiles of surface distances, ASD the mean over the surface pixels
    of both masks. Surfaces are the pixels that an erosion removes; a mask cut by the image border has one there.
    Distances run between pixel centres. Both masks empty: Dice and IoU 1, distances 0. One empty: Dice and IoU 0,
    distances the diagonal of the image. Nothing is ever NaN or infinite.

    Args:
        pred, truth: bool [B, K, H, W].
        sizes: int [B, 2], valid height and width in pixels.
        spacing: height and width of a pixel, in the unit the distances are wanted in; (1, 1) gives pixels of the
            working resolution.

    Returns:
        B * K records, image by image and class by class within: ``class`` (1..K), ``dice``, ``iou``, ``hd95``, ``asd``,
        and ``empty``, which names the empty mask: ``both``, ``truth``, ``prediction`` or "" for neither.
    """
    rows, columns = (torch.arange(side, device=pred.device) for side in pred.shape[-2:])
    height, width = sizes.to(pred.device)[:, :, None, None].unbind(1)
    valid = ((rows[:, None] < height) & (columns < width))[:, None]
    pred, truth = pred & valid, truth & valid
    dice = compute_dice(pred, truth, include_background=True, ignore_empty=False).tolist()
    iou = compute_iou(pred, truth, include_background=True, ignore_empty=False).tolist()
    pred_array, truth_array, extents = pred.cpu().numpy(), truth.cpu().numpy(), sizes.tolist()

    records: list[dict[str, int | float | str]] = []
    for image, label in product(range(pred.shape[0]), range(pred.shape[1])):
        h, w = extents[image]
        a, b = pred_array[image, label, :h, :w], truth_array[image, label, :h, :w]
        empty = which_is_empty(a, b)
        if empty:
            hd95 = asd = EMPTY_DIAGONALS[empty] * math.hypot(h * spacing[0], w * spacing[1])
        else:
            distances = surface_distances(a, b, spacing)
            hd95, asd = hd95_of(*distances), asd_of(*distances)
        records.append(
            {"class": label + 1, "dice": dice[image][label], "iou": iou[image][label]}
            | {"hd95": hd95, "asd": asd, "empty": empty}
        )
    return records


def which_is_empty(pred: np.ndarray, truth: np.ndarray) -> str:
    """Name the empty one of two masks, bool of one shape: ``both``, ``truth``, ``prediction`` or "" for neither."""
    return _EMPTY[bool(truth.any()), bool(pred.any())]


def surface_distances(
    pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float], *, crop: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface element of one mask to the other's surface: prediction to truth, and back.

    The steps of MONAI's ``compute_hausdorff_distance``, ``compute_average_surface_distance`` and
    ``compute_surface_dice``, with edges and distances found once for all: a third of the time, and none of the
    deprecation warnings the first two raise in 1.6.

    Args:
        pred, truth: bool, of two or three axes, neither empty.
        spacing: of the axes; its unit is that of the distances.
        crop: look at no more than holds both masks, which changes nothing but the time it takes.

    Returns:
        float32, one each surface element of the prediction, and of the truth.
    """
    pred_edge, truth_edge = get_mask_edges(pred, truth, crop=crop)
    there = get_surface_distance(pred_edge, truth_edge, spacing=spacing)
    back = get_surface_distance(truth_edge, pred_edge, spacing=spacing)
    return there, back


def hd95_of(there: np.ndarray, back: np.ndarray) -> float:
    """The larger of the two directed 95th percentiles."""
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def asd_of(there: np.ndarray, back: np.ndarray) -> float:
    """The mean over the surface elements of both masks."""
    return float(np.concatenate([there, back]).mean(dtype=np.float64))


# By (truth, prediction) not empty.
_EMPTY: Mapping[tuple[bool, bool], str] = MappingProxyType(
    {(False, False): "both", (False, True): "truth", (True, False): "prediction", (True, True): ""}
)
EMPTY_DIAGONALS: Mapping[str, float] = MappingProxyType({"both": 0.0, "truth": 1.0, "prediction": 1.0})
"""By which mask is empty: diagonals of the image that surface distances are said to be."""


def _area(masks: Tensor) -> Tensor:
    return masks.sum(dim=(-2, -1), dtype=torch.float64)
