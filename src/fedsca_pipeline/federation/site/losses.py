"""The local loss of docs/method.md: Dice plus cross-entropy on the unpadded area."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsca_pipeline.model.batch import CPU


class SegmentationLoss(Protocol):
    """``(logits [B,C,H,W], masks [B,H,W] integer, valid [B,H,W] bool) -> scalar``."""

    def __call__(self, logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
        """Return the scalar loss."""
        ...


def build_loss(head: str, dice_weight: float) -> SegmentationLoss:
    """Return the loss of a head, ``sigmoid`` or ``softmax``.

    ``loss = dice_weight * Dice + (1 - dice_weight) * cross-entropy``. Dice is computed over the whole batch, so that an
    image without foreground still has a useful gradient, and without the background channel. Pixels outside ``valid``
    are ignored.
    """
    parts = _PARTS[head]
    first = 0 if head == "sigmoid" else 1

    def loss(logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
        logits = logits.float()
        area = valid.unsqueeze(1)
        probabilities, truth, cross_entropy = parts(logits, masks.long(), valid)
        overlap = _dice_loss((probabilities * area)[:, first:], (truth * area)[:, first:])
        total: Tensor = dice_weight * overlap + (1 - dice_weight) * cross_entropy
        return total

    return loss


def over_known_classes(
    loss: SegmentationLoss, head: str, known: Sequence[int], classes: int, device: torch.device = CPU
) -> SegmentationLoss:
    """Return the loss of a site whose masks annotate only the ``known`` of the classes 1..``classes``.

    It is the loss of a model that has only the known classes: softmax, Dice and cross-entropy leave out the other
    channels, and the gradient of their logits is exactly 0. Masks must hold known classes only. If all classes are
    known, it is ``loss`` itself. It takes tensors on ``device``.
    """
    if len(known) == classes:
        return loss
    background = [0] if head == "softmax" else []
    # On the device from the start: a step that copied them would wait for the copy.
    channels = torch.tensor([*background, *(label - 1 + len(background) for label in known)], device=device)
    numbers = torch.zeros(classes + 1, dtype=torch.long)
    numbers[list(known)] = torch.arange(1, len(known) + 1)
    numbers = numbers.to(device)

    def partial(logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
        return loss(logits.index_select(1, channels), numbers[masks.long()], valid)

    return partial


def _dice_loss(probabilities: Tensor, truth: Tensor) -> Tensor:
    """Return the mean over channels of 1 - Dice over the batch, as MONAI's ``DiceLoss(batch=True)`` does to the bit."""
    axes = (0, 2, 3)
    overlap = (probabilities * truth).sum(dim=axes)
    only_predicted, only_true = probabilities.sum(dim=axes) - overlap, truth.sum(dim=axes) - overlap
    dice = (2 * overlap + _SMOOTH) / (2 * (overlap + 0.5 * only_predicted + 0.5 * only_true) + _SMOOTH)
    return (1 - dice).mean()


def _sigmoid_parts(logits: Tensor, masks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    classes = torch.arange(1, logits.shape[1] + 1, device=masks.device).view(1, -1, 1, 1)
    truth = (masks.unsqueeze(1) == classes).to(logits.dtype)
    area = valid.unsqueeze(1).expand_as(truth)
    per_pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return logits.sigmoid(), truth, (per_pixel * area).sum() / area.sum().clamp(min=1)


def _softmax_parts(logits: Tensor, masks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Not F.one_hot, which reads the largest label first.
    truth = (masks.unsqueeze(-1) == torch.arange(logits.shape[1], device=masks.device)).movedim(-1, 1).to(logits.dtype)
    per_pixel = F.cross_entropy(logits, masks, reduction="none")
    return logits.softmax(dim=1), truth, (per_pixel * valid).sum() / valid.sum().clamp(min=1)


_SMOOTH = 1e-5
_PARTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "sigmoid": _sigmoid_parts,
    "softmax": _softmax_parts,
}
