"""From logits to masks, for the sigmoid and the softmax head; label maps to masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fedsca_pipeline.errors import ConfigError, suggestion


def predict_masks(logits: Tensor, head: str, threshold: float, known: Sequence[int] | None = None) -> Tensor:
    """Return one boolean mask per foreground class.

    Args:
        logits: [B, C, H, W], floating.
        head: ``sigmoid``: C foreground channels; a pixel belongs to each class whose probability exceeds
            ``threshold``, so classes may overlap. ``softmax``: channel 0 is the background and the largest channel
            wins (the lowest one at a tie).
        threshold: probability in (0, 1); the softmax head does not use it.
        known: classes, of 1..K, that may be predicted; the masks of the others are empty. None: all.

    Returns:
        bool [B, K, H, W], K = C for sigmoid and C - 1 for softmax.

    Raises:
        ConfigError: the head is unknown.

    >>> logits = torch.tensor([2.0, -1.0, 0.1]).view(1, 3, 1, 1)
    >>> predict_masks(logits, "sigmoid", 0.5).flatten().tolist()
    [True, False, True]
    >>> predict_masks(logits, "softmax", 0.5).flatten().tolist()  # the background wins
    [False, False]
    >>> predict_masks(logits, "sigmoid", 0.5, known=[1]).flatten().tolist()
    [True, False, False]
    """
    if head not in _HEADS:
        raise ConfigError(f"foundation.head: {head!r} is unknown{suggestion(head, _HEADS)}")
    return _HEADS[head](logits if known is None else known_logits(logits, head, known), threshold)


def known_logits(logits: Tensor, head: str, known: Sequence[int]) -> Tensor:
    """Return logits [B, C, H, W] with minus infinity (probability 0) in the channels of classes that are not known.

    An untrained channel would win pixels by chance. If all classes are known, the same tensor is returned.
    """
    first = 1 if head == "softmax" else 0
    unknown = [channel for channel in range(first, logits.shape[1]) if channel - first + 1 not in known]
    if not unknown:
        return logits
    return logits.index_fill(1, torch.tensor(unknown, device=logits.device), -torch.inf)


def class_probabilities(logits: Tensor, head: str, known: Sequence[int] | None = None) -> Tensor:
    """Return the probability of each foreground class, [B, K, H, W] in 0..1; arguments as of ``predict_masks``.

    >>> class_probabilities(torch.tensor([0.0, 0.0]).view(1, 2, 1, 1), "softmax").flatten().tolist()
    [0.5]
    """
    if known is not None:
        logits = known_logits(logits, head, known)
    return logits.softmax(dim=1)[:, 1:] if head == "softmax" else logits.sigmoid()


def truth_masks(masks: Tensor, classes: int) -> Tensor:
    """Return bool [B, K, H, W], class 1 first, for label maps uint8 [B, H, W] of 0 = background, 1..K.

    >>> truth_masks(torch.tensor([[[0, 2]]], dtype=torch.uint8), 2).tolist()
    [[[[False, False]], [[False, True]]]]
    """
    return masks[:, None] == torch.arange(1, classes + 1, dtype=masks.dtype, device=masks.device)[:, None, None]


def _sigmoid_masks(logits: Tensor, threshold: float) -> Tensor:
    # The threshold moves to the logits: a sigmoid in half precision saturates, or rounds to 0.5.
    return logits > torch.logit(torch.tensor(threshold, dtype=torch.float64)).item()


def _softmax_masks(logits: Tensor, _threshold: float) -> Tensor:
    return truth_masks(logits.argmax(dim=1), logits.shape[1] - 1)


_HEADS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {"sigmoid": _sigmoid_masks, "softmax": _softmax_masks}
)
