"""Three-dimensional images and masks: files to voxels with a geometry in mm, and masks back to NIfTI.

A further format is one more entry of ``VOLUME_READERS``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsca_pipeline.data.readers.common import (
    DICOM,
    UNREADABLE,
    BrokenSampleError,
    check_not_empty,
    finite_values,
    no_reader,
    split_name,
    unreadable,
    whole_numbers,
)
from fedsca_pipeline.data.readers.decoding import in_child
from fedsca_pipeline.data.readers.volume import ALWAYS, Volume, check_grid, check_voxels, most_voxels

if TYPE_CHECKING:
    import nibabel


def is_volume(name: str) -> bool:
    """Return whether a file of this name, or path, is read as a volume."""
    return split_name(name)[1] in VOLUME_READERS


def read_volume(path: Path) -> Volume:
    """Return an image volume from NIfTI, NRRD, MetaImage or DICOM; a folder is a DICOM series.

    A two-dimensional file is a volume of one slice, and a fourth axis of length 1 is dropped.

    >>> import tempfile
    >>> from fedsca_pipeline.data.readers.volume import write_nifti
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "ct.nii.gz")
    ...     write_nifti(path, np.zeros((4, 5, 3), np.int16), affine=np.diag([0.5, 0.5, 2.0, 1.0]))
    ...     volume = read_volume(path)
    >>> volume.shape, volume.spacing
    ((4, 5, 3), (0.5, 0.5, 2.0))

    Raises:
        BrokenSampleError: unreadable, of no known format, above ``MAX_VOXELS``, of colours, with more than four axes,
            without a geometry, or with NaN or infinite values.
    """
    if path.is_dir() or split_name(path.name)[1] == DICOM:
        volume = _checked(_read_dicom(path))
    else:
        _check_suffix(path)
        volume = decode_volume(path)
    finite_values(volume.voxels)
    return volume


def read_volume_mask(path: Path, image: Volume, *, whole: bool = True) -> np.ndarray:
    """Read the mask of ``image`` as integers [X, Y, Z] on its grid, before any label map; not ``whole``: as stored.

    A mask with the image's voxels in another order of axes, as converters from DICOM to NIfTI write it, is turned.

    Raises:
        BrokenSampleError: as of ``read_volume``, not of whole numbers if ``whole``, or not on the image's grid: another
            shape, or a corner more than a tenth of the smallest spacing away.
    """
    _check_suffix(path)
    volume = decode_volume(path, image)
    if volume.voxels.ndim != 3:
        raise BrokenSampleError(
            f"a mask of {volume.voxels.shape[3]} modalities", "save one label map: one whole number a voxel"
        )
    volume = _turned(volume, image.affine)
    check_grid(volume, image)
    return whole_numbers(volume.voxels) if whole else finite_values(volume.voxels)


def _turned(volume: Volume, affine: np.ndarray) -> Volume:
    """Return a volume with its axes in the order and directions of ``affine``'s; nothing is resampled."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

    turn = ornt_transform(io_orientation(volume.affine), io_orientation(affine))
    voxels = apply_orientation(volume.voxels, turn)
    return replace(volume, voxels=voxels, affine=volume.affine @ inv_ornt_aff(turn, volume.shape))


@in_child
def decode_volume(path: Path, image: Volume | None = None) -> Volume:
    """Return the volume in a file with a suffix of ``VOLUME_READERS``; ``image``: the file is a mask on its grid.

    Raises:
        BrokenSampleError: as ``read_volume``.
    """
    most = most_voxels(path.stat().st_size) if image is None else max(ALWAYS, math.prod(image.shape))
    try:
        check_not_empty(path)
        volume = VOLUME_READERS[split_name(path.name)[1]](path, most)
    except UNREADABLE as error:
        raise unreadable(error) from error
    return _checked(volume)


def _check_suffix(path: Path) -> None:
    if (suffix := split_name(path.name)[1]) not in VOLUME_READERS:
        raise no_reader(suffix, VOLUME_READERS)


def _checked(volume: Volume) -> Volume:
    voxels, affine = volume.voxels, np.asarray(volume.affine, np.float64)
    check_voxels(voxels.shape)
    if voxels.dtype.kind not in "buif":
        raise BrokenSampleError(f"holds voxels of type {voxels.dtype}", "save one plain number a voxel")
    if not _usable(affine):
        raise BrokenSampleError(
            "its header gives no usable geometry (an affine that is singular or not finite)",
            "export it again with spacing and orientation",
        )
    if voxels.ndim == 2:
        voxels = voxels[..., None]
    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    return replace(volume, voxels=voxels, affine=affine)


def _read_nifti(path: Path, most: int) -> Volume:
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError

    check_compression(path)
    try:
        image = load_nifti(path)
        shape = tuple(image.shape)
        # Vectors in NIfTI: a fifth axis after a time axis of length 1.
        check_voxels(shape[:3] + shape[4:] if len(shape) == 5 and shape[3] == 1 else shape, most)
        mm = _NIFTI_UNITS[image.header.get_xyzt_units()[0]]
        voxels = np.asanyarray(image.dataobj)
    except (ImageFileError, HeaderDataError, HeaderTypeError) as error:
        raise unreadable(error) from error
    affine = np.diag([mm, mm, mm, 1.0]) @ image.affine
    return Volume(voxels[:, :, :, 0] if voxels.ndim == 5 else voxels, affine, alerts=nifti_alerts(image))


def check_compression(path: Path) -> None:
    """Check that a NIfTI is compressed if, and only if, its name says so.

    Raises:
        BrokenSampleError: the name and the file's first bytes contradict each other.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    compressed = split_name(path.name)[1] == ".nii.gz"
    if not compressed and start.startswith(_GZIP):
        raise BrokenSampleError("is compressed, though its name ends in .nii", "let its name end in .nii.gz")
    if compressed and start in _NIFTI_STARTS:
        raise BrokenSampleError("is not compressed, though its name ends in .nii.gz", "let its name end in .nii")


def load_nifti(path: Path) -> nibabel.Nifti1Image:
    """Return a NIfTI whose voxels are not read yet.

    Raises:
        BrokenSampleError: a surface (CIFTI), which has the same suffix.
        ImageFileError, HeaderDataError: nibabel cannot read the header.
    """
    import nibabel

    image = nibabel.load(path)
    # Nifti2Image is one, too.
    if not isinstance(image, nibabel.Nifti1Image):
        raise BrokenSampleError(f"a {type(image).__name__}, not voxels", "export a volume as NIfTI")
    return image


def nifti_alerts(image: nibabel.Nifti1Image) -> tuple[str, ...]:
    """Return where a header's sform, which nibabel and this project use, contradicts its pixdim or its qform."""
    from nibabel.orientations import aff2axcodes
    from nibabel.spatialimages import HeaderDataError

    header, alerts = image.header, []
    sform, code = header.get_sform(coded=True)
    if not code or not _usable(sform):
        return ()
    mm = _NIFTI_UNITS[header.get_xyzt_units()[0]]
    stated = mm * np.array(header.get_zooms()[:3])
    used = mm * np.linalg.norm(sform[:3, : len(stated)], axis=0)
    if not np.allclose(used, stated, rtol=_ALIKE, atol=0):
        alerts.append(
            f"its header has two spacings: {_mm(used)} by its sform, which is used for slices and metrics, and "
            f"{_mm(stated)} by its pixdim; correct the header if the sform is wrong"
        )
    with suppress(HeaderDataError):
        qform, code = header.get_qform(coded=True)
        if code and _usable(qform) and (axes := aff2axcodes(sform)) != (others := aff2axcodes(qform)):
            alerts.append(
                f"its header has two orientations: {''.join(axes)} by its sform, which is used, and {''.join(others)} "
                "by its qform, so sides may be exchanged; correct the header if the sform is wrong"
            )
    return tuple(alerts)


def _usable(affine: np.ndarray) -> bool:
    """Return whether an affine is finite and not flat."""
    # The volume of a voxel as a share of the box its edges would span: 1 for right angles, 0 where it is flat.
    box = math.prod(np.linalg.norm(affine[:3, :3], axis=0))
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > _FLAT * box > 0)


def _mm(spacing: np.ndarray) -> str:
    return " x ".join(f"{step:.4g}" for step in spacing) + " mm"


def _read_nrrd(path: Path, most: int) -> Volume:
    """Read a NRRD, with modalities first or last."""
    import nrrd

    try:
        header = nrrd.read_header(str(path))
        if "data file" in header or "datafile" in header:
            raise _detached(header.get("data file", header.get("datafile")))
        check_voxels(header["sizes"], most)
        voxels, _ = nrrd.read(str(path))
    except nrrd.NRRDError as error:
        raise unreadable(error) from error
    return Volume(*_nrrd_geometry(voxels, header))


def _nrrd_geometry(voxels: np.ndarray, header: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels with modalities last, and the affine in RAS+."""
    space = header.get("space", "left-posterior-superior").lower()
    units = set(header.get("space units", ())) - {"mm", ""}
    if space not in _NRRD_SPACES or units or "space directions" not in header:
        raise BrokenSampleError(
            f"no NRRD geometry in mm: space {space}, units {', '.join(sorted(units)) or 'mm'}, directions "
            f"{'given' if 'space directions' in header else 'missing'}",
            "export it from a viewer with spacing and orientation, in RAS, LAS or LPS",
        )
    directions = np.array(
        [[math.nan] * 3 if row is None else row for row in header["space directions"]], dtype=np.float64
    )
    spatial = np.isfinite(directions).all(axis=1)
    if spatial.sum() != 3 or (~spatial).sum() > 1:
        raise BrokenSampleError(f"has {spatial.sum()} axes in space", "save three axes in space and one of modalities")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions[spatial].T, header.get("space origin", np.zeros(3))
    if not spatial.all():
        voxels = np.moveaxis(voxels, int(np.flatnonzero(~spatial)[0]), -1)
    return voxels, np.diag([*_NRRD_SPACES[space], 1.0]) @ affine


def _read_meta_image(path: Path, most: int) -> Volume:
    import SimpleITK

    header = _meta_image_header(path)
    if header["ElementDataFile"] != "LOCAL":
        raise _detached(header["ElementDataFile"])
    sides = [int(side) for side in header["DimSize"].split()]
    channels = int(header.get("ElementNumberOfChannels", 1))
    if len(sides) > 3:
        raise BrokenSampleError(f"a MetaImage of {len(sides)} axes", "save the modalities as channels, or as NIfTI")
    check_voxels([*sides, channels] if channels > 1 else sides, most)
    image = SimpleITK.ReadImage(str(path), imageIO="MetaImageIO")
    # Axes come slowest first, and channels last; ITK's axes are left-posterior-superior.
    voxels = SimpleITK.GetArrayFromImage(image)
    voxels = voxels.transpose([*range(len(sides))[::-1], *range(len(sides), voxels.ndim)])
    affine, size = np.eye(4), len(sides)
    direction, spacing, origin = image.GetDirection(), image.GetSpacing(), image.GetOrigin()
    affine[:size, :size], affine[:size, 3] = np.reshape(direction, (size, size)) * spacing, origin
    return Volume(voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _meta_image_header(path: Path) -> dict[str, str]:
    """Return the text header of a MetaImage; its last entry names the file of the voxels."""
    with path.open("rb") as stream:
        head = stream.read(_META_HEADER)
    text, end, name = head.partition(b"ElementDataFile")
    if not end or b"DimSize" not in text:
        raise ValueError("no MetaImage header")
    lines = text + end + name.partition(b"\n")[0]
    return dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", lines.decode("latin-1"), flags=re.MULTILINE))


def _read_dicom(path: Path) -> Volume:
    from fedsca_pipeline.data.readers.dicom import read_multiframe, read_series

    return read_series(path) if path.is_dir() else read_multiframe(path)


def _detached(data: Any) -> BrokenSampleError:
    return BrokenSampleError(
        "a header with its voxels in another file", "save header and voxels as one file", quoted=str(data)
    )


_FLAT = 1e-3
_GZIP = b"\x1f\x8b"
# The size of its header, 348 or 540 bytes, begins a NIfTI, in either order of bytes.
_NIFTI_STARTS = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))
# Relative difference of two spacings that rounding explains.
_ALIKE = 0.01
_META_HEADER = 2**16
# mm per unit; files without a unit are in mm, as in viewers.
_NIFTI_UNITS: Mapping[str, float] = MappingProxyType({"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001})
# Signs that turn the axes of a named space to RAS+.
_NRRD_SPACES: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "right-anterior-superior": (1.0, 1.0, 1.0),
        "ras": (1.0, 1.0, 1.0),
        "left-anterior-superior": (-1.0, 1.0, 1.0),
        "las": (-1.0, 1.0, 1.0),
        "left-posterior-superior": (-1.0, -1.0, 1.0),
        "lps": (-1.0, -1.0, 1.0),
    }
)


VOLUME_READERS: Mapping[str, Callable[[Path, int], Volume]] = MappingProxyType(
    {".nii": _read_nifti, ".nii.gz": _read_nifti, ".nrrd": _read_nrrd, ".mha": _read_meta_image}
)
"""Suffix to a function of a path and the most voxels, which may raise any of ``UNREADABLE``."""
