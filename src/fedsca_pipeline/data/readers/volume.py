"""A volume in memory: voxels, affine and the checks of its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.files import atomic_path

MAX_VOXELS = 2**29
"""Most values of a volume over all modalities, 512 x 512 x 2048; a header that states more counts as damaged."""


ALWAYS = 2**25
"""Voxels that a file of any size may hold: an empty mask compresses to almost nothing."""


@dataclass(frozen=True)
class Volume:
    """A three-dimensional image.

    ``voxels`` is [X, Y, Z], or [X, Y, Z, M] of M modalities, in the file's values after its own scaling; ``affine``
    float64 [4, 4] takes a voxel's index to mm in the patient's right, anterior and superior direction (RAS+), as in
    nibabel. ``frame_of_reference`` is DICOM's identifier of the affine's origin; it never leaves memory. ``alerts`` say
    where a file contradicts itself about its geometry, and what of it is used.
    """

    voxels: np.ndarray
    affine: np.ndarray
    frame_of_reference: str | None = None
    alerts: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of voxels along X, Y and Z."""
        x, y, z = self.voxels.shape[:3]
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm from one voxel to the next along X, Y and Z."""
        x, y, z = (float(step) for step in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z


def check_grid(mask: Volume, image: Volume) -> None:
    """Check that a mask lies on its image's grid.

    Raises:
        BrokenSampleError: its shape differs, or a corner is more than a tenth of the smallest spacing away.
    """
    if mask.shape != image.shape:
        raise BrokenSampleError(
            f"is {_by(mask.shape)} voxels, its image is {_by(image.shape)}", "export the mask on the image's grid"
        )
    if (away := _largest_distance(mask.affine, image.affine, image.shape)) > _TOLERANCE * min(image.spacing):
        raise BrokenSampleError(
            f"lies elsewhere than its image: their affines differ by up to {away:.3g} mm",
            "export the mask on the image's grid",
        )


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write voxels [X, Y, Z] with their affine (mm, RAS+) to ``path``, a ``.nii`` or ``.nii.gz``, atomically."""
    import nibabel

    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def check_voxels(shape: Sequence[int], most: int = MAX_VOXELS) -> None:
    """Check, before memory is allocated, that an array of this shape can be a volume.

    Raises:
        BrokenSampleError: it has no voxels, more than ``most``, or not two to four axes.
    """
    sides = [int(side) for side in shape]
    if min(sides, default=0) < 1:
        raise BrokenSampleError(f"has no voxels ({_by(sides)})", "export the file again")
    if math.prod(sides) > most:
        raise BrokenSampleError(
            f"its header promises {_by(sides)} voxels, more than {most:,}{' of such a file' * (most < MAX_VOXELS)}",
            "cut it into parts, or export it again",
        )
    if not 2 <= len(sides) <= 4:
        raise BrokenSampleError(
            f"has {len(sides)} axes ({_by(sides)})", "save three axes, or four with the modalities as the last"
        )


def most_voxels(size: int) -> int:
    """Return the most voxels that a file of ``size`` bytes may hold, so that a compressed bomb is refused."""
    return min(MAX_VOXELS, max(ALWAYS, _VOXELS_A_BYTE * size))


def _largest_distance(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Return the largest distance in mm of a grid's corners between two affines."""
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)
    difference = one - other
    return float(np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max())


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


_TOLERANCE = 0.1
# Skull-stripped heads, which compress best, hold about ten voxels per byte of their file.
_VOXELS_A_BYTE = 100
