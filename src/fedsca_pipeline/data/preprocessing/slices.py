"""A volume to upright slices, and slices back to a volume. To the rest of the project a slice is an image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fedsca_pipeline.config import NormaliseConfig, VolumeConfig
from fedsca_pipeline.data.preprocessing.geometry import fit_image, fit_mask, intensity_range, to_levels
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume

PLANES: tuple[str, str, str] = ("RIP", "AIL", "SPL")
"""Directions of slices, rows and columns for a cut along axis 0, 1 or 2 of RAS+: sagittal, coronal, axial slices.

Slices appear as a radiologist sees them, the patient's right on the left. They are numbered to the right, to the front
or upwards.
"""


class VolumeSlices:
    """The slices of one volume along an axis of the patient, prepared for the model one by one.

    Intensities are scaled over the whole volume, each modality separately. A slice keeps its aspect in mm, even if its
    voxels are not square.

    Args:
        volume: the image, in any orientation; an oblique one is cut along the nearest axis of its grid.
        config: axis and channels.
        intensities: how raw values map to 0..255.
        side: the longer side of a prepared slice, in pixels.

    Raises:
        BrokenSampleError: the volume lacks a modality that the configuration names, or has several and it names none.
    """

    def __init__(self, volume: Volume, config: VolumeConfig, intensities: NormaliseConfig, side: int) -> None:
        self.volume, self._config, self._side = volume, config, side
        self._planes = [cut(voxels, volume.affine, config.axis) for voxels in _modalities(volume, config)]
        ranges = [intensity_range(planes, intensities) for planes in self._planes]
        self._ranges = [(low, high) for low, high, _ in ranges]
        self.warnings: list[str] = [warning for _, _, warnings in ranges for warning in warnings]
        slice_, height, width = plane_spacing(volume.affine, config.axis)
        self.spacing: tuple[float, float, float] = (slice_, height, width)

    def __len__(self) -> int:
        return len(self._planes[0])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a slice on the volume's grid, in voxels."""
        height, width = self._planes[0].shape[1:]
        return height, width

    def image(self, index: int) -> np.ndarray:
        """Return the channels of a slice, resized, uint8 [3, height, width]."""
        if self._config.channels == 3:
            low, high = self._ranges[0]
            last = len(self) - 1
            near = (max(index - 1, 0), index, min(index + 1, last))
            levels = [to_levels(self._planes[0][place], low, high) for place in near]
        else:
            pairs = zip(self._planes, self._ranges, strict=True)
            levels = [to_levels(planes[index], low, high) for planes, (low, high) in pairs]
        if len(levels) == 1:
            return fit_image(levels[0], self._side, self.spacing[1:])
        # The second of two modalities also fills the third channel.
        return fit_image(np.stack([*levels, levels[-1]][:3], axis=-1), self._side, self.spacing[1:])

    def masks(self, labels: np.ndarray, side: int | None = None) -> list[np.ndarray]:
        """Return the resized slices, uint8 [height, width] each, of classes uint8 [X, Y, Z] on the volume's grid.

        ``side`` is their longer side in pixels. Default: that of the images.
        """
        planes = cut(labels, self.volume.affine, self._config.axis)
        return [fit_mask(np.ascontiguousarray(plane), side or self._side, self.spacing[1:]) for plane in planes]

    def restack(self, planes: Sequence[np.ndarray]) -> np.ndarray:
        """Return [X, Y, Z] from all slices [H, W] on the volume's grid."""
        return restack(np.stack(planes), self.volume.affine, self._config.axis)


def cut(voxels: np.ndarray, affine: np.ndarray, axis: int) -> np.ndarray:
    """Return voxels [X, Y, Z, ...] as slices [N, H, W, ...] along ``axis`` of RAS+, without a copy; see ``PLANES``."""
    from nibabel.orientations import apply_orientation

    planes: np.ndarray = apply_orientation(voxels, _to_planes(affine, axis))
    return planes


def restack(planes: np.ndarray, affine: np.ndarray, axis: int) -> np.ndarray:
    """Return voxels [X, Y, Z, ...] on the grid of ``affine`` from slices [N, H, W, ...]: the inverse of ``cut``."""
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    back = ornt_transform(axcodes2ornt(PLANES[axis]), io_orientation(affine))
    return np.ascontiguousarray(apply_orientation(planes, back))


def plane_spacing(affine: np.ndarray, axis: int) -> tuple[float, float, float]:
    """Return mm from slice to slice, from row to row and from column to column."""
    spacing = np.empty(3)
    spacing[_to_planes(affine, axis)[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    slice_, row, column = map(float, spacing)
    return slice_, row, column


def choose_slices(foreground: Sequence[bool], share: float, seed: int, site: str, image: str) -> list[int]:
    """Return the slices of a training volume to train on, in order.

    These are all slices with foreground, and ``share`` of the others, drawn from seed, site and image. A larger share
    contains a smaller one. There is at least one slice.
    """
    empty = [index for index, any_ in enumerate(foreground) if not any_]
    count = round(share * len(empty))
    if len(empty) == len(foreground):
        count = max(count, 1)
    drawn = sorted(empty, key=lambda index: hashlib.sha256(f"{seed}\0{site}\0{image}\0{index}".encode()).digest())
    return sorted({*range(len(foreground))} - {*empty} | {*drawn[:count]})


def _to_planes(affine: np.ndarray, axis: int) -> np.ndarray:
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    turn: np.ndarray = ornt_transform(io_orientation(affine), axcodes2ornt(PLANES[axis]))
    return turn


def _modalities(volume: Volume, config: VolumeConfig) -> list[np.ndarray]:
    """Return [X, Y, Z] of each modality that the configuration names."""
    voxels = volume.voxels if volume.voxels.ndim == 4 else volume.voxels[..., None]
    count = voxels.shape[3]
    if config.modalities is None and count > 1:
        raise BrokenSampleError(
            f"has {count} modalities", "name one to three of them, from 0, in preprocessing.volume.modalities"
        )
    chosen = config.modalities or [0]
    if max(chosen) >= count:
        raise BrokenSampleError(
            f"has {count} modalities, numbered from 0; preprocessing.volume.modalities names {max(chosen)}",
            "name others, or export all volumes with the same modalities",
        )
    return [voxels[..., index] for index in chosen]
