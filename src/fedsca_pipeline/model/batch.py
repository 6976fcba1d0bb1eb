"""A batch of images, their masks and their valid areas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")


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
        """Return the batch on ``device``; see :func:`to_device`."""
        return Batch(*(to_device(tensor, device) for tensor in (self.inputs, self.masks, self.valid)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. A copy to CUDA goes through pinned memory and does not block."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.is_cpu else tensor).to(device, non_blocking=True)
