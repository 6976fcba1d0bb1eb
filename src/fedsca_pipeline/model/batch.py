"""A batch of images, masks and valid areas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """``inputs`` [B, ...]: images in 0..255 [B,3,S,S], or the features that a site's ``embed`` made of them.

    ``masks`` uint8 [B,S,S], ``valid`` bool [B,S,S]: False on padding.
    """

    inputs: Tensor
    masks: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``; to CUDA by way of pinned memory, without waiting."""
        tensors = (self.inputs, self.masks, self.valid)
        if device.type == "cuda":
            tensors = tuple(t if t.is_cuda else t.pin_memory() for t in tensors)
        return Batch(*(t.to(device, non_blocking=True) for t in tensors))
