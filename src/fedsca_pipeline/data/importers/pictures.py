"""A sample's files to the image and mask that are written to a site folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsca_pipeline.data.importers.masks import Image, Label
from fedsca_pipeline.data.readers.common import UNREADABLE, BrokenSampleError, finite_values, unreadable
from fedsca_pipeline.data.readers.decoding import in_child
from fedsca_pipeline.data.readers.images import orientations_of, read_image
from fedsca_pipeline.data.readers.volume import Volume, check_voxels, write_nifti
from fedsca_pipeline.data.readers.volumes import check_compression, is_volume, load_nifti, nifti_alerts, read_volume

if TYPE_CHECKING:
    from fedsca_pipeline.data.importers.sample import Sample


@dataclass(frozen=True)
class Picture:
    """An image and its mask, uint8 classes of its shape: [H, W], or [X, Y, Z] for a volume.

    ``original`` is a file that holds the image and nothing else, which can be copied; None: the image is written.
    """

    image: Image
    mask: np.ndarray
    original: Path | None = None


class UnusableError(Exception):
    """A sample cannot be imported: which file of it, and why."""

    def __init__(self, file: Path, error: BrokenSampleError) -> None:
        super().__init__(str(error))
        self.file, self.error = file, error


@contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Name the file that a BrokenSampleError of the block is about.

    Raises:
        UnusableError: in its place.
    """
    try:
        yield
    except BrokenSampleError as error:
        raise UnusableError(file, error) from error


def read_picture(sample: Sample, label: Label) -> Picture:
    """Read the one image file of a sample, and its mask by ``label``.

    Raises:
        UnusableError: the file, and what is wrong with it.
    """
    (file,) = sample.images
    with blaming(file):
        image = read_volume(file) if is_volume(file.name) else read_image(file)
    with blaming(sample.masks[0] if sample.masks else file):
        mask = label(sample.masks, image)
    # The mask is written upright and without a tag, so its image must be, too.
    upright = isinstance(image, Volume) or orientations_of([file]) == [1]
    return Picture(image, mask, file if upright else None)


def read_dicom(files: Sequence[Path]) -> Image:
    """Read one DICOM image: a single frame, a multi-frame file, or the files of one series.

    Raises:
        BrokenSampleError: as ``read_frame``, ``read_multiframe`` and ``read_series_files``.
    """
    from fedsca_pipeline.data.readers.dicom import read_frame, read_header, read_multiframe, read_series_files

    if len(files) > 1:
        return read_series_files(files)
    header = read_header(files[0])
    return read_multiframe(files[0]) if header is not None and header.frames > 1 else read_frame(files[0])


@in_child
def read_nifti(file: Path, frame: int | None = None) -> Volume:
    """Read a NIfTI, or one frame of it, in the number type of the file, which ``read_volume`` does not keep.

    Of a file that is not compressed, only the frame is read.

    Raises:
        BrokenSampleError: unreadable, no such frame, not of three axes (a frame), not in mm, or NaN or infinite values.
    """
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError

    check_compression(file)
    try:
        image = load_nifti(file)
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
    return Volume(finite_values(_storable(voxels)), image.affine, alerts=nifti_alerts(image))


def write_image(folder: Path, stem: str, image: Image) -> None:
    """Write an image into ``folder`` with its values and geometry, and nothing else.

    A volume becomes NIfTI. Pixels become PNG of 8 or 16 bit; those that PNG does not hold (negative or fractional
    values, 16 bit colour) become TIFF.

    Raises:
        BrokenSampleError: the image holds integers beyond 32 bit.
    """
    if isinstance(image, Volume):
        write_nifti(folder / f"{stem}.nii.gz", _storable(image.voxels), image.affine)
    elif image.dtype == np.uint8 or (image.dtype == np.uint16 and image.ndim == 2):
        from PIL import Image as Pillow

        Pillow.fromarray(image).save(folder / f"{stem}.png")
    else:
        import tifffile

        kind = "minisblack" if image.ndim == 2 else "rgb"
        tifffile.imwrite(
            folder / f"{stem}.tif", image, photometric=kind, compression="deflate", metadata=None, software=False
        )


def _storable(voxels: np.ndarray) -> np.ndarray:
    """Return voxels in a number type that viewers of NIfTI read: bool as uint8, 64 bit integers as 32 bit ones.

    Raises:
        BrokenSampleError: they do not fit, or are no plain numbers.
    """
    if voxels.dtype == bool:
        return voxels.astype(np.uint8)
    if voxels.dtype.kind not in "uif":
        raise BrokenSampleError(f"holds voxels of type {voxels.dtype}", "save one plain number a voxel")
    if voxels.dtype not in (np.int64, np.uint64):
        return voxels
    if not (voxels == voxels.astype(np.int32)).all():
        raise BrokenSampleError("holds integers beyond 32 bit", "export it with a smaller number type")
    return voxels.astype(np.int32)
