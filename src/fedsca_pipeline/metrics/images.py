"""Overlap and surface distances of masks, per image and class. The background is never a class (docs/metrics.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree
from torch import Tensor


def dice_per_image(pred: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the Dice of each image and class over the valid pixels; 1 if both masks are empty there.

    Dice is 2 |A and B| / (|A| + |B|) (Dice, *Ecology* 26, 1945).

    Args:
        pred, truth: bool [B, K, H, W].
        valid: bool [B, H, W], False on padding.

    Returns:
        float64 [B, K], in 0..1.

    >>> pred = torch.tensor([[[[True, True, False, False]]]])
    >>> truth = torch.tensor([[[[False, True, True, False]]]])
    >>> valid = torch.ones(1, 1, 4, dtype=torch.bool)
    >>> dice_per_image(pred, truth, valid)
    tensor([[0.5000]], dtype=torch.float64)
    >>> dice_per_image(pred, truth, torch.zeros_like(valid))  # no valid pixel
    tensor([[1.]], dtype=torch.float64)
    """
    pred, truth = pred & valid[:, None], truth & valid[:, None]
    overlap, total = _area(pred & truth), _area(pred) + _area(truth)
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)


def dice_of(pred: Tensor, truth: Tensor) -> Tensor:
    """Return the Dice of each image and class, float32 [B, K]; 1 if both masks, bool [B, K, ...], are empty.

    >>> dice_of(torch.tensor([[[True, True, False]]]), torch.tensor([[[True, False, False]]]))
    tensor([[0.6667]])
    """
    total = _count(pred) + _count(truth)
    return torch.where(total > 0, 2.0 * _count(pred & truth) / total, 1.0)


def score_images(
    pred: Tensor, truth: Tensor, sizes: Tensor, spacing: tuple[float, float] = (1.0, 1.0)
) -> list[dict[str, Any]]:
    """Return the scores of every image and class on the image's unpadded area, the top left ``sizes[b]`` of the array.

    HD95 is the larger of the two directed 95th percentiles of surface distances; ASD is the mean distance over the
    surface pixels of both masks. A mask's surface are the pixels that an erosion removes, so a mask that is cut by the
    image border has a surface there. Distances are between pixel centres. Both masks empty: Dice and IoU 1, distances
    0. One mask empty: Dice and IoU 0, distances the image's diagonal. No score is NaN or infinite.

    Args:
        pred, truth: bool [B, K, H, W].
        sizes: int [B, 2], valid height and width in pixels.
        spacing: height and width of a pixel, in the unit of the distances; (1, 1) gives pixels of the working
            resolution.

    Returns:
        B * K records, image by image, class by class: ``class`` (1..K), ``dice``, ``iou``, ``hd95``, ``asd``, and
        ``empty``, which names the empty mask: ``both``, ``truth``, ``prediction`` or "" for neither.

    >>> pred, truth = torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    >>> pred[..., 0, 0] = truth[..., 3, 0] = True
    >>> score_images(pred, truth, torch.tensor([[4, 4]]))
    [{'class': 1, 'dice': 0.0, 'iou': 0.0, 'hd95': 3.0, 'asd': 3.0, 'empty': ''}]
    >>> score_images(pred, truth, torch.tensor([[3, 4]]))  # row 3 is padding: the truth is empty
    [{'class': 1, 'dice': 0.0, 'iou': 0.0, 'hd95': 5.0, 'asd': 5.0, 'empty': 'truth'}]
    """
    rows, columns = (torch.arange(side, device=pred.device) for side in pred.shape[-2:])
    height, width = sizes.to(pred.device)[:, :, None, None].unbind(1)
    valid = ((rows[:, None] < height) & (columns < width))[:, None]
    pred, truth = pred & valid, truth & valid
    dice, iou = dice_of(pred, truth).tolist(), _iou_of(pred, truth).tolist()
    pred_array, truth_array, extents = pred.cpu().numpy(), truth.cpu().numpy(), sizes.tolist()

    records: list[dict[str, Any]] = []
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
    """Return which of two masks, bool of one shape, is empty: ``both``, ``truth``, ``prediction`` or "" for neither.

    >>> which_is_empty(np.array([True, False]), np.array([False, False]))
    'truth'
    """
    return _EMPTY[bool(truth.any()), bool(pred.any())]


def surface_distances(pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance from each surface element of either mask to the other mask's surface.

    These are the steps of MONAI's ``compute_hausdorff_distance``, ``compute_average_surface_distance`` and
    ``compute_surface_dice``, and their values to the bit, but edges and distances are computed once for all three.

    Args:
        pred, truth: bool, of two or three axes, neither empty.
        spacing: size of an element along each axis, in the unit of the distances.

    Returns:
        float32 [surface elements of the prediction], from prediction to truth, and float32 [surface elements of the
        truth], from truth to prediction.

    >>> pred, truth = np.zeros((2, 1, 5), bool)
    >>> pred[0, :2] = truth[0, 4] = True
    >>> to_truth, to_pred = surface_distances(pred, truth, (1.0, 0.5))
    >>> to_truth.tolist(), to_pred.tolist()
    ([2.0, 1.5], [1.5])
    >>> asd_of(to_truth, to_pred)
    1.6666666666666667
    """
    # Beyond the box around both masks there is no surface.
    (box,) = find_objects((pred | truth).astype(np.uint8))
    edges = (mask[box] & ~binary_erosion(mask[box]) for mask in (pred, truth))
    pred_surface, truth_surface = (np.argwhere(edge) * np.asarray(spacing, np.float64) for edge in edges)
    to_truth = KDTree(truth_surface, leafsize=_LEAF).query(pred_surface)[0].astype(np.float32)
    to_pred = KDTree(pred_surface, leafsize=_LEAF).query(truth_surface)[0].astype(np.float32)
    return to_truth, to_pred


def hd95_of(to_truth: np.ndarray, to_pred: np.ndarray) -> float:
    """Return HD95, the larger 95th percentile of the two directions of ``surface_distances``.

    >>> hd95_of(np.array([1.0, 1.0]), np.array([3.0]))
    3.0
    """
    return float(max(np.percentile(to_truth, 95), np.percentile(to_pred, 95)))


def asd_of(to_truth: np.ndarray, to_pred: np.ndarray) -> float:
    """Return ASD, the mean of ``surface_distances`` over the surface elements of both masks.

    >>> asd_of(np.array([1.0, 1.0]), np.array([4.0]))
    2.0
    """
    return float(np.concatenate([to_truth, to_pred]).mean(dtype=np.float64))


# One query asks for all points: larger leaves than scipy's are faster then.
_LEAF = 32
# Key: whether the truth and the prediction have any pixel.
_EMPTY: Mapping[tuple[bool, bool], str] = MappingProxyType(
    {(False, False): "both", (False, True): "truth", (True, False): "prediction", (True, True): ""}
)
EMPTY_DIAGONALS: Mapping[str, float] = MappingProxyType({"both": 0.0, "truth": 1.0, "prediction": 1.0})
"""Surface distance if a mask is empty, in diagonals of the image; key: which mask is empty."""


def _iou_of(pred: Tensor, truth: Tensor) -> Tensor:
    union = _count(pred | truth)
    return torch.where(union > 0, _count(pred & truth) / union, 1.0)


def _count(masks: Tensor) -> Tensor:
    return masks.flatten(2).sum(dim=2)


def _area(masks: Tensor) -> Tensor:
    return masks.sum(dim=(-2, -1), dtype=torch.float64)
