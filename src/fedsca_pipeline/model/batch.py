"""A batch of images, their masks and their valid areas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B images of one size S x S.

    Attributes:
        inputs: [B, ...], images in 0..255 [B, 3, S, S], or the features that the frozen encoder prefix computed.
        masks: uint8 [B, S, S], 0 = background, 1..K.
        valid: bool [B, S, S], False on padding.
    """

    inputs: Tensor
    masks: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``. Copies to CUDA go through pinned memory and do not block."""
        tensors = [self.inputs, self.masks, self.valid]
        if device.type == "cuda":
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))
