"""A sample's files to what is written of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsca_pipeline.data.importers.masks import Image, Label
from fedsca_pipeline.data.readers.common import UNREADABLE, BrokenSampleError, finite_values, split_name, unreadable
from fedsca_pipeline.data.readers.images import read_image
from fedsca_pipeline.data.readers.volume import Volume, check_voxels
from fedsca_pipeline.data.readers.volumes import IMAGE_READERS, read_volume

if TYPE_CHECKING:
    from fedsca_pipeline.data.importers.sample import Sample


@dataclass(frozen=True)
class Picture:
    """An image and its mask, uint8 classes of its shape: [H, W], or [X, Y, Z] for a volume.

    ``copies`` are the files that are the image as it is, by how their names go on after the stem (``.png``, or
    ``/00000.dcm`` of a folder); without any, ``image`` is written: uint8 [H, W] or [H, W, 3] as PNG, a volume as NIfTI
    in the type of its voxels.
    """

    image: Image
    mask: np.ndarray
    copies: Mapping[str, Path] = field(default_factory=dict)


class UnusableError(Exception):
    """A sample cannot be imported: which file of it, and why."""

    def __init__(self, file: Path, error: BrokenSampleError) -> None:
        super().__init__(str(error))
        self.file, self.error = file, error


@contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Name the file that the block's BrokenSampleError is about.

    Raises:
        UnusableError: in place of it.
    """
    try:
        yield
    except BrokenSampleError as error:
        raise UnusableError(file, error) from error


def read_picture(sample: Sample, label: Label) -> Picture:
    """Read the one image file of a sample, which is copied, and its mask by ``label``.

    Raises:
        UnusableError: the file, and what is wrong with it.
    """
    (file,) = sample.images
    with blaming(file):
        image = read_volume(file) if split_name(file.name)[1] in IMAGE_READERS else read_image(file)
    with blaming(sample.masks[0] if sample.masks else file):
        return Picture(image, label(sample.masks, image), {split_name(file.name)[1]: file})


def read_nifti(file: Path, frame: int | None = None) -> Volume:
    """Read a NIfTI, or one frame of it, in the number type of the file, which ``read_volume`` does not keep.

    Of a file that is not compressed, only the frame is read.

    Raises:
        BrokenSampleError: unreadable, no such frame, not of three axes (a frame), not in mm, or NaN or infinite values.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError

    try:
        image = nibabel.load(file)
        check_voxels(image.shape)
        if (unit := image.header.get_xyzt_units()[0]) not in ("mm", "unknown"):
            raise BrokenSampleError(f"its header is in {unit}", "export it in mm")
        if len(image.shape) != (3 if frame is None else 4) or (frame or 0) not in range(image.shape[-1]):
            wanted = "three axes" if frame is None else f"a fourth axis that has a frame {frame}"
            raise BrokenSampleError(
                f"its shape is {image.shape}", f"take the file of this data set, which has {wanted}"
            )
        voxels = np.asanyarray(image.dataobj if frame is None else image.dataobj[..., frame])
    except (ImageFileError, HeaderDataError, HeaderTypeError, *UNREADABLE) as error:
        raise unreadable(error) from error
    return Volume(finite_values(_storable(voxels)), image.affine)


def _storable(voxels: np.ndarray) -> np.ndarray:
    """Return 64 bit integers, which viewers do not read, as 32 bit ones.

    Raises:
        BrokenSampleError: they do not fit, or are no plain numbers.
    """
    if voxels.dtype.kind not in "uif":
        raise BrokenSampleError(f"holds voxels of type {voxels.dtype}", "save one plain number a voxel")
    if voxels.dtype not in (np.int64, np.uint64):
        return voxels
    if not (voxels == voxels.astype(np.int32)).all():
        raise BrokenSampleError("holds integers beyond 32 bit", "export it with a smaller number type")
    return voxels.astype(np.int32)
