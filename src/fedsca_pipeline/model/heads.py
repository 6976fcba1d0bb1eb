"""From logits to masks, for a sigmoid or a softmax head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fedsca_pipeline.errors import ConfigError


def predict_masks(logits: Tensor, head: str, threshold: float, known: Sequence[int] | None = None) -> Tensor:
    """Turn logits into one boolean mask per foreground class.

    Args:
        logits: [B, C, H, W], floating.
        head: ``sigmoid``: C foreground channels, each in where its probability exceeds ``threshold``; classes may
            overlap. ``softmax``: channel 0 is the background, the largest channel wins (the lowest one at a tie).
        threshold: probability in (0, 1); the softmax head does not use it.
        known: classes, of 1..K, that may be predicted; the masks of the others are empty. None: all.

    Returns:
        bool [B, K, H, W], K = C for sigmoid and C - 1 for softmax.

    Raises:
        ConfigError: the head is unknown.
    """
    if head not in _HEADS:
        raise ConfigError(f"foundation.head: {head!r} is unknown; choose one of {', '.join(_HEADS)}")
    return _HEADS[head](logits if known is None else known_logits(logits, head, known), threshold)


def known_logits(logits: Tensor, head: str, known: Sequence[int]) -> Tensor:
    """Return logits [B, C, H, W] with minus infinity, probability 0, in the channels of classes that are not known.

    A channel that nothing has trained would win pixels by chance. All known: the logits themselves.
    """
    first = 1 if head == "softmax" else 0
    unknown = [channel for channel in range(first, logits.shape[1]) if channel - first + 1 not in known]
    if not unknown:
        return logits
    return logits.index_fill(1, torch.tensor(unknown, device=logits.device), -torch.inf)


def truth_masks(masks: Tensor, classes: int) -> Tensor:
    """Split a label map uint8 [B, H, W] of 0 = background, 1..K into bool [B, K, H, W], class 1 first."""
    return masks[:, None] == _labels(classes, masks)


def _sigmoid_masks(logits: Tensor, threshold: float) -> Tensor:
    # The threshold is moved to the logits: exact where a sigmoid in half precision saturates or rounds to 0.5.
    return logits > torch.logit(torch.tensor(threshold, dtype=torch.float64)).item()


def _softmax_masks(logits: Tensor, _threshold: float) -> Tensor:
    return truth_masks(logits.argmax(dim=1), logits.shape[1] - 1)


_HEADS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {"sigmoid": _sigmoid_masks, "softmax": _softmax_masks}
)


def _labels(classes: int, like: Tensor) -> Tensor:
    return torch.arange(1, classes + 1, dtype=like.dtype, device=like.device)[:, None, None]
