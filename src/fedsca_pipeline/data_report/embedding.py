"""Features of images from the frozen foundation: one vector per image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from fedsca_pipeline.compute import autocast
from fedsca_pipeline.model.foundation import SegmentationModel

_BATCH = 8


def embed_images(
    model: SegmentationModel,
    images: np.ndarray,
    valid: np.ndarray,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the encoder's features, averaged over each image's valid area.

    Args:
        model: the foundation, on ``device``.
        images: uint8 [N, 3, S, S].
        valid: bool [N, S, S], False on padding.
        device: the model's device.
        progress: called with the number of images of each finished batch.

    Returns:
        float32 [N, D]; [0, 1] without images.
    """
    found = []
    with torch.inference_mode(), autocast(device):
        for start in range(0, len(images), _BATCH):
            pixels = torch.from_numpy(images[start : start + _BATCH]).to(device)
            area = torch.from_numpy(valid[start : start + _BATCH]).to(device).unsqueeze(1)
            features = model.embed(model.normalise(pixels, area)).float()
            height, width = features.shape[2:]
            weights = F.adaptive_avg_pool2d(area.float(), (height, width))
            found.append(((features * weights).sum((2, 3)) / weights.sum((2, 3))).cpu().numpy())
            progress(len(pixels))
    return np.concatenate(found) if found else np.zeros((0, 1), np.float32)
