"""Images and volumes to label maps, on their own grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.heads import predict_masks


def segment_slices(
    network: SegmentationModel,
    slices: VolumeSlices,
    side: int,
    threshold: float,
    known: Sequence[int] | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """Return the label map of a volume, segmented slice by slice. Where classes overlap, the highest number wins.

    Args:
        network: on any device.
        slices: the volume's slices, resized to ``side``.
        side: S, the network's image size.
        threshold: as in ``heads.predict_masks``.
        known: classes that may be predicted; None: all.
        batch_size: slices at a time.

    Returns:
        uint8 [X, Y, Z], 0 = background, 1..K, on the volume's own grid.

    Raises:
        WeightsError: the network computes values that are not finite.
    """
    logits = slice_logits(network, slices, side, batch_size)
    return slices.restack([labels_of(plane, network.head, threshold, known) for plane in logits])


def slice_logits(network: SegmentationModel, slices: VolumeSlices, side: int, batch_size: int) -> Iterator[Tensor]:
    """Yield the logits of each slice, as ``full_logits`` does; arguments as of ``segment_slices``."""
    for start in range(0, len(slices), batch_size):
        fitted = [slices.image(index) for index in range(start, min(start + batch_size, len(slices)))]
        yield from full_logits(network, fitted, [slices.size] * len(fitted), side)


@torch.inference_mode()
def full_logits(
    network: SegmentationModel, fitted: Sequence[np.ndarray], sizes: Sequence[tuple[int, ...]], side: int
) -> Iterator[Tensor]:
    """Yield the logits of each image at its own size, from one forward pass.

    Args:
        network: on any device.
        fitted: the resized images, uint8 [3, h, w], neither side above S.
        sizes: the images' own heights and widths.
        side: S, the network's image size.

    Yields:
        float [1, C, H, W] on the network's device. Logits, not masks, are resized.

    Raises:
        WeightsError: the network computes values that are not finite.
    """
    device = next(network.parameters()).device
    pixels = torch.zeros(len(fitted), 3, side, side, dtype=torch.uint8)
    valid = torch.zeros(len(fitted), 1, side, side, dtype=torch.bool)
    for index, image in enumerate(fitted):
        height, width = image.shape[1:]
        pixels[index, :, :height, :width] = torch.from_numpy(image.copy())
        valid[index, :, :height, :width] = True
    logits = network(network.normalise(pixels.to(device), valid.to(device)))
    for index, (image, size) in enumerate(zip(fitted, sizes, strict=True)):
        height, width = image.shape[1:]
        own = logits[index : index + 1, :, :height, :width]
        if not own.isfinite().all():
            raise WeightsError(
                "the model computes NaN or infinity, which would look like an empty mask; its weights or its "
                "foundation are damaged: load another copy, or train again"
            )
        yield nn.functional.interpolate(own, size=tuple(size), mode="bilinear", align_corners=False)


@torch.inference_mode()
def labels_of(logits: Tensor, head: str, threshold: float, known: Sequence[int] | None) -> np.ndarray:
    """Return the label map uint8 [H, W] of one image's logits [1, C, H, W]; see ``heads.predict_masks``."""
    masks = predict_masks(logits, head, threshold, known)
    numbers = torch.arange(1, masks.shape[1] + 1, device=logits.device, dtype=torch.uint8).view(-1, 1, 1)
    labels: np.ndarray = (masks * numbers).amax(dim=1)[0].cpu().numpy()
    return labels
