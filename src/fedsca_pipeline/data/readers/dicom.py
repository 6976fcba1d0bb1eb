"""DICOM files to arrays: frames, series and multi-frame files, and segmentations (SEG) on the grid of their image.

pydicom decodes, through its plug-ins; highdicom gives the positions of frames. No error, warning or log line from here
contains a value of a data set, since any value may name the patient.
"""

from __future__ import annotations

import logging
import math
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsca_pipeline.data.readers.common import (
    COPY_AGAIN,
    LITTER,
    MAX_PIXELS,
    UNREADABLE,
    BrokenSampleError,
    check_not_empty,
)
from fedsca_pipeline.data.readers.decoding import in_child
from fedsca_pipeline.data.readers.volume import Volume, check_voxels

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID


@dataclass(frozen=True)
class DicomHeader:
    """The header of a file; ``patient`` is issuer and PatientID, empty without a PatientID."""

    patient: str
    frames: int


def read_header(path: Path) -> DicomHeader | None:
    """Return patient and number of frames of a file; None if it cannot be read as DICOM."""
    try:
        with _discreet():
            header = _dataset(path, pixels=False)
            return DicomHeader(_patient(header), _frames(header))
    except BrokenSampleError:
        return None


def read_pixel_spacing(path: Path) -> tuple[float, float] | None:
    """Return the mm from row to row and from column to column in a file of one frame; None if it does not tell.

    The spacing on the detector of a projection (ImagerPixelSpacing) is not that in the patient, and is not used.

    Raises:
        BrokenSampleError: the file cannot be read as DICOM.
    """
    with _discreet():
        spacing = _dataset(path, pixels=False).get("PixelSpacing") or ()
        known = [float(step) for step in spacing]
        return (known[0], known[1]) if len(known) == 2 and all(0 < step < math.inf for step in known) else None


@dataclass(frozen=True)
class Relations:
    """A file's identifiers, and those of the files that it refers to.

    ``patient`` is issuer and PatientID, empty without a PatientID; ``instance`` and ``series`` are the file's
    identifiers. ``placed``: its one frame has a position in space. For a segmentation, ``segments`` are the labels by
    number, and ``sources`` the identifiers of the series and instances that it was drawn on; for other files both are
    empty.
    """

    patient: str
    instance: str
    series: str
    is_image: bool
    frames: int
    placed: bool
    segments: Mapping[int, str]
    sources: frozenset[str]


def read_relations(path: Path) -> Relations:
    """Return a file's relations to the other files of an export; no pixels are decoded.

    Raises:
        BrokenSampleError: the file cannot be read as DICOM.
    """
    with _discreet():
        header = _dataset(path, pixels=False)
        is_segmentation = header.get("SOPClassUID") in _SEGMENTATIONS
        series = header.get("ReferencedSeriesSequence") or () if is_segmentation else ()
        instances = (item for one in series for item in one.get("ReferencedInstanceSequence") or ())
        return Relations(
            _patient(header),
            str(header.SOPInstanceUID),
            str(header.SeriesInstanceUID),
            bool(header.get("Rows")) and not is_segmentation,
            _frames(header),
            "ImagePositionPatient" in header and "ImageOrientationPatient" in header,
            _segment_labels(header) if is_segmentation else {},
            frozenset(
                {str(one.SeriesInstanceUID) for one in series}
                | {str(item.ReferencedSOPInstanceUID) for item in instances}
            ),
        )


@in_child
def read_frame(path: Path) -> np.ndarray:
    """Read a file of one frame: grey [H, W] or RGB [H, W, 3].

    Grey values are rescaled (slope and intercept, or the file's modality table) to floats; without a rescale they keep
    their integers. MONOCHROME1, where the lowest value is white, is inverted over the range of its bits. Palettes and
    YBR become RGB.

    Raises:
        BrokenSampleError: unreadable, no image, of several frames, cut off, larger than ``MAX_PIXELS``, or marked as
            showing annotations burned into its pixels.
    """
    with _discreet():
        dataset = _image(path, pixels=True)
        if _frames(dataset) > 1:
            raise BrokenSampleError("a file of several frames", "read it as a volume")
        return _values(_frame(dataset), dataset, dataset)


def read_series(folder: Path) -> Volume:
    """Read a folder of single-frame files of one series, see ``read_series_files``. Hidden files are skipped.

    Raises:
        BrokenSampleError: as ``read_series_files``; the folder is empty, or holds a folder or a link out of it.
    """
    with _discreet():
        return read_series_files(files_of_series(folder))


@in_child
def read_series_files(files: Sequence[Path]) -> Volume:
    """Read the single-frame files of one series: voxels [X, Y, Z] = [column, row, slice].

    Values are those of ``read_frame``, in grey. Slices are sorted by their position along the normal, whatever the
    files' names.

    Raises:
        BrokenSampleError: a file is as in ``read_frame``; the files are of several series, sizes, orientations or
            frames of reference, in colour or without a position; slices are missing, doubled or unevenly spaced.
    """
    with _discreet():
        headers = [_numbered(index, file, pixels=False) for index, file in enumerate(files)]
        _check_one_series(headers)
        rows, columns = _size(headers[0])
        check_voxels((columns, rows, len(headers)))
        order, affine = _stack([_plane(header) for header in headers], headers[0])
        # Slices are contiguous in memory, so that each is written in one piece.
        slices = np.empty((len(headers), rows, columns), np.result_type(*map(_kind, headers)))
        for place, index in enumerate(order):
            dataset = _numbered(index, files[index], pixels=True)
            slices[place] = _values(_frame(dataset), dataset, dataset)
        return Volume(slices.T, affine, _frame_of_reference(headers[0]))


@in_child
def read_multiframe(path: Path) -> Volume:
    """Read a file of one or more evenly spaced frames: voxels [X, Y, Z] = [column, row, slice].

    Raises:
        BrokenSampleError: as ``read_series``; frames without a position (a film) are no volume.
    """
    with _discreet():
        dataset = _image(path, pixels=True)
        count = _frames(dataset)
        rows, columns = _size(dataset)
        _check_grey(dataset)
        check_voxels((columns, rows, count))
        if count == 1 and "PerFrameFunctionalGroupsSequence" not in dataset:
            return _volume_of_one(dataset)
        if "PerFrameFunctionalGroupsSequence" not in dataset:
            raise BrokenSampleError(
                f"{count} frames without positions in space, as a film has",
                "save each frame as an image, with its own mask",
            )
        planes = [_plane(dataset, frame) for frame in range(count)]
        order, affine = _stack(planes, dataset)
        rescales = [_rescale(dataset, frame) for frame in range(count)]
        slices = np.empty((count, rows, columns), np.result_type(*(_kind(dataset, item) for item in rescales)))
        places = {index: place for place, index in enumerate(order)}
        for index, stored in enumerate(_decoded(dataset)):
            slices[places[index]] = _values(stored, dataset, rescales[index])
        return Volume(slices.T, affine, _frame_of_reference(dataset))


@in_child
def read_segmentation(path: Path, image: Volume, values: Mapping[int, int] | None = None) -> Volume:
    """Read a DICOM SEG on the grid of ``image``: uint16 [X, Y, Z], the number of each voxel's segment.

    ``values`` maps segment numbers to other values; unnamed segments become 0. Frames are placed by their position in
    space, so order, orientation and omitted empty frames do not matter. Where segments overlap, the higher value wins.

    Raises:
        BrokenSampleError: unreadable, no SEG, fractional, of another frame of reference, or not on the image's grid.
    """
    with _discreet():
        labels = _SegmentationFrames(path, values)
        labels.check_reference(image.frame_of_reference)
        voxels = np.zeros(image.shape, np.uint16)
        to_index = np.linalg.inv(image.affine)
        for frame in range(len(labels)):
            _lay(voxels, labels.labels(frame), to_index @ labels.affine(frame))
        return Volume(voxels, image.affine, image.frame_of_reference)


@in_child
def read_frame_segmentation(path: Path, image: Path, values: Mapping[int, int] | None = None) -> np.ndarray:
    """Read the DICOM SEG of a single frame: uint16 [H, W], as ``read_segmentation``.

    If the image has a position, segments at other positions are left out. If it has none (ultrasound, endoscopy), the
    SEG must name it as its source and have its size.

    Raises:
        BrokenSampleError: as of ``read_segmentation``, or the SEG is of another image.
    """
    with _discreet():
        header = _image(image, pixels=False)
        rows, columns = _size(header)
        labels = _SegmentationFrames(path, values)
        if "ImagePositionPatient" in header and "ImageOrientationPatient" in header:
            labels.check_reference(header.get("FrameOfReferenceUID"))
            _, affine = _stack([_plane(header)], header)
            to_index = np.linalg.inv(affine)
            voxels = np.zeros((columns, rows, 1), np.uint16)
            for frame in range(len(labels)):
                _lay(voxels, labels.labels(frame), to_index @ labels.affine(frame), elsewhere="left out")
            return voxels[:, :, 0].T
        labels.check_source(header.get("SOPInstanceUID"))
        found = np.zeros((rows, columns), np.uint16)
        for frame in range(len(labels)):
            pixels = labels.labels(frame)
            if pixels.shape != found.shape:
                raise BrokenSampleError(
                    f"is {pixels.shape[0]} x {pixels.shape[1]} pixels, its image is {rows} x {columns}",
                    "export the segmentation on the image's grid",
                )
            np.maximum(found, pixels, out=found)
        return found


class _SegmentationFrames:
    """The frames of a SEG file, read one at a time."""

    def __init__(self, path: Path, values: Mapping[int, int] | None = None) -> None:
        from highdicom.seg import SegmentationTypeValues, segread

        header = _dataset(path, pixels=False)
        if header.get("SOPClassUID") not in _SEGMENTATIONS:
            raise BrokenSampleError(
                "a DICOM mask that is no segmentation (SEG)", "export the mask as DICOM SEG, NIfTI or PNG"
            )
        if header.get("SegmentationType") == SegmentationTypeValues.FRACTIONAL.value:
            raise BrokenSampleError("a fractional segmentation", "export it as binary or as a label map")
        rows, columns = _size(header)
        check_voxels((rows, columns))
        self._label_map = header.get("SegmentationType") == SegmentationTypeValues.LABELMAP.value
        self._seg = segread(path)
        self._shape = (rows, columns)
        self._values = np.arange(2**16, dtype=np.uint16)
        if values is not None:
            self._values[:] = 0
            self._values[list(values)] = list(values.values())

    def __len__(self) -> int:
        return int(self._seg.number_of_frames)

    def labels(self, frame: int) -> np.ndarray:
        """Return the values of a frame's segments, uint16 [H, W]; 0 is background."""
        stored = self._seg.get_stored_frame(frame, as_index=True)
        if stored.shape != self._shape:
            raise ValueError("a frame of another size than the header says")
        if self._label_map:
            values: np.ndarray = self._values[stored]
        else:
            values = (stored != 0).astype(np.uint16) * self._values[self._segment_number(frame)]
        return values

    def affine(self, frame: int) -> np.ndarray:
        """Return the affine from (column, row, 0, 1) of a frame to mm, RAS+."""
        return _plane(self._seg, frame)

    def check_reference(self, frame_of_reference: object) -> None:
        """Check that segmentation and image have one frame of reference, if both name theirs."""
        own = self._seg.get("FrameOfReferenceUID")
        if own and frame_of_reference and str(own) != str(frame_of_reference):
            raise BrokenSampleError(
                "lies in another frame of reference than its image", "export the segmentation of this very image"
            )

    def check_source(self, instance: object) -> None:
        """Check that the segmentation was drawn on this instance, and on no other."""
        if {str(uid) for _, _, uid in self._seg.get_source_image_uids()} != {str(instance)}:
            raise BrokenSampleError(
                "was not drawn on its image alone", "export the segmentation of this very image, one file an image"
            )

    def _segment_number(self, frame: int) -> int:
        groups = (self._seg.PerFrameFunctionalGroupsSequence[frame], *self._seg.SharedFunctionalGroupsSequence)
        found = [group.SegmentIdentificationSequence[0] for group in groups if "SegmentIdentificationSequence" in group]
        return int(found[0].ReferencedSegmentNumber)


def _lay(voxels: np.ndarray, labels: np.ndarray, to_index: np.ndarray, elsewhere: str = "refused") -> None:
    """Write a frame's labels [H, W] into ``voxels``, by the affine from (column, row, 0, 1); the higher label stays."""
    rows, columns = np.nonzero(labels)
    if not len(rows):
        return
    exact = to_index[:3] @ np.stack([columns, rows, np.zeros_like(rows), np.ones_like(rows)])
    places = np.rint(exact).astype(np.int64)
    limits = np.array(voxels.shape)[:, None]
    beyond = ((places < 0) | (places >= limits)).any(axis=0)
    if elsewhere == "left out":
        exact, places, rows, columns = exact[:, ~beyond], places[:, ~beyond], rows[~beyond], columns[~beyond]
    if (elsewhere == "refused" and beyond.any()) or (np.abs(exact - places) > _OFF_GRID).any():
        raise BrokenSampleError(
            "does not lie on its image's grid", "export the segmentation on the image's grid, of this very image"
        )
    np.maximum.at(voxels, tuple(places), labels[rows, columns])


def _volume_of_one(dataset: Dataset) -> Volume:
    _, affine = _stack([_plane(dataset)], dataset)
    values = _values(_frame(dataset), dataset, dataset)
    return Volume(values.T[..., None], affine, _frame_of_reference(dataset))


def _frame_of_reference(dataset: Dataset) -> str | None:
    return str(dataset.get("FrameOfReferenceUID") or "") or None


def _stack(planes: Sequence[np.ndarray], header: Dataset) -> tuple[list[int], np.ndarray]:
    """Return the planes' order along their normal, and the affine from (column, row, place, 1) to mm, RAS+."""
    from highdicom.spatial import get_volume_positions

    first = planes[0]
    steps = np.linalg.norm(first[:3, :2], axis=0)
    if any(np.abs(plane[:3, :2] - first[:3, :2]).max() > _TURNED * steps.min() for plane in planes):
        raise BrokenSampleError(
            "slices of several orientations or pixel spacings", "keep one stack of slices in the folder"
        )
    affine = first.copy()
    if len(planes) == 1:
        affine[:3, 2] = _normal(first) * _thickness(header)
        return [0], affine
    spacing, _ = get_volume_positions(
        image_positions=[plane[:3, 3].tolist() for plane in planes],
        image_orientation=[*(first[:3, 0] / steps[0]), *(first[:3, 1] / steps[1])],
    )
    if spacing is None:
        raise _uneven(planes)
    order = sorted(range(len(planes)), key=lambda index: float(planes[index][:3, 3] @ _normal(first)))
    affine[:3, 3] = planes[order[0]][:3, 3]
    affine[:3, 2] = (planes[order[-1]][:3, 3] - planes[order[0]][:3, 3]) / (len(planes) - 1)
    return order, affine


def _uneven(planes: Sequence[np.ndarray]) -> BrokenSampleError:
    heights = np.sort([plane[:3, 3] @ _normal(plane) for plane in planes])
    steps = np.diff(heights)
    usual = float(np.quantile(steps, 0.5, method="lower"))
    if (steps < _SAME_PLACE).any():
        return BrokenSampleError(
            "several slices at one position (copies, time points or echoes)", "keep one slice of each position"
        )
    if steps.max() > _GAP * usual:
        return BrokenSampleError(
            f"slices are missing: {usual:.3g} mm apart elsewhere, {steps.max():.3g} mm at the widest gap",
            "export the whole series",
        )
    if steps.max() > (1 + _UNEVEN) * steps.min():
        return BrokenSampleError(
            f"unevenly spaced slices, {steps.min():.3g} to {steps.max():.3g} mm apart",
            "resample the series to one spacing",
        )
    return BrokenSampleError(
        "slices that are not stacked at a right angle (a tilted gantry)", "resample the series to a straight stack"
    )


def _plane(dataset: Dataset, frame: int | None = None) -> np.ndarray:
    """Return the affine from (column, row, 0, 1) of a frame, numbered from 0, to mm, RAS+."""
    from highdicom.spatial import PixelToReferenceTransformer

    if frame is None and not {"ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"} <= set(dataset.dir()):
        raise BrokenSampleError(
            "has no position, orientation or pixel spacing", "export the series with its geometry, or as PNG images"
        )
    if not dataset.get("FrameOfReferenceUID"):
        raise BrokenSampleError(
            "has no frame of reference, so it has no place in space",
            "export it again with FrameOfReferenceUID (0020,0052), or as NIfTI or PNG",
        )
    number = None if frame is None else frame + 1
    affine = np.array(PixelToReferenceTransformer.for_image(dataset, frame_number=number).affine, np.float64)
    if not np.isfinite(affine).all() or not (np.linalg.norm(affine[:3, :2], axis=0) > 0).all():
        raise BrokenSampleError("has no usable geometry", "export it again with spacing and orientation")
    turned: np.ndarray = _LPS_TO_RAS @ affine
    return turned


def _normal(plane: np.ndarray) -> np.ndarray:
    normal = np.cross(plane[:3, 0], plane[:3, 1])
    unit: np.ndarray = normal / np.linalg.norm(normal)
    return unit


def _thickness(header: Dataset) -> float:
    """Return the spacing in mm of a single slice, by its header. Default: 1."""
    stated = (header.get("SpacingBetweenSlices"), header.get("SliceThickness"))
    return next((abs(float(value)) for value in stated if value and math.isfinite(float(value))), 1.0)


def _check_one_series(headers: Sequence[Dataset]) -> None:
    kinds: dict[str, set[object]] = {
        "series": {str(header.get("SeriesInstanceUID")) for header in headers},
        "patients": {str(header.get("PatientID")) for header in headers},
        "sizes": {_size(header) for header in headers},
        "frames of reference": {str(header.get("FrameOfReferenceUID")) for header in headers},
    }
    for what, values in kinds.items():
        if len(values) > 1:
            raise BrokenSampleError(f"its files are of {len(values)} {what}", "keep one series in a folder")
    for header in headers:
        _check_grey(header)
    if any(_frames(header) > 1 for header in headers):
        raise BrokenSampleError(
            "a file of several frames in a series", "move it out of the folder: it is a volume of its own"
        )


def _check_grey(dataset: Dataset) -> None:
    if int(dataset.get("SamplesPerPixel") or 1) > 1 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise BrokenSampleError("a volume in colour", "save each frame as an image, with its own mask")


def files_of_series(folder: Path) -> list[Path]:
    """Return a series folder's visible files in name order, without litter (``LITTER``)."""
    inside = folder.resolve()
    files = sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in LITTER
    )
    if not files:
        raise BrokenSampleError("an empty folder", "put the files of one DICOM series into it, or delete it")
    if any(path.is_dir() for path in files):
        raise BrokenSampleError("a folder within the folder of a series", "give each series a folder of its own")
    if not all(path.resolve().is_relative_to(inside) for path in files):
        raise BrokenSampleError("a link that leads out of the folder", "copy the file itself there")
    return files


def _numbered(index: int, path: Path, *, pixels: bool) -> Dataset:
    """Read a file of a series; an error names it by its place, since its name may name the patient."""
    try:
        with _discreet():
            return _image(path, pixels=pixels)
    except BrokenSampleError as error:
        raise BrokenSampleError(f"file {index + 1} of the folder, by name: {error.reason}", error.cure) from None


def _image(path: Path, *, pixels: bool) -> Dataset:
    """Read a file and check its header, before anything is decoded."""
    dataset = _dataset(path, pixels=pixels)
    rows, columns = _size(dataset)
    if rows * columns > MAX_PIXELS:
        raise BrokenSampleError(f"its header promises more than {MAX_PIXELS:,} pixels", COPY_AGAIN)
    if str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        raise BrokenSampleError(
            "is marked as showing annotations burned into its pixels, which may name the patient",
            "blank them, and set BurnedInAnnotation (0028,0301) to NO",
        )
    return dataset


def _dataset(path: Path, *, pixels: bool) -> Dataset:
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

    check_not_empty(path)
    meta = read_file_meta_info(path)
    if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise BrokenSampleError("a DICOMDIR, the table of contents of a disc, not an image", "delete it")
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        # pydicom would inflate the whole file, and a few bytes can hold gigabytes.
        raise BrokenSampleError("a deflated DICOM file", "export it uncompressed, or with its pixels compressed")
    return dcmread(path, stop_before_pixels=not pixels)


def _segment_labels(header: Dataset) -> dict[int, str]:
    """Return labels by number, without the background, 0, which a label map may list."""
    labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in header.SegmentSequence}
    return {number: label for number, label in labels.items() if number}


def _patient(dataset: Dataset) -> str:
    patient = str(dataset.get("PatientID") or "").strip()
    issuer = str(dataset.get("IssuerOfPatientID") or "").strip()
    return f"{issuer}\0{patient}" if patient else ""


def _size(dataset: Dataset) -> tuple[int, int]:
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if rows < 1 or columns < 1:
        raise BrokenSampleError("a DICOM file that holds no image", "delete it, or put an image in its place")
    return rows, columns


def _frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _decoded(dataset: Dataset) -> Iterator[np.ndarray]:
    """Yield the frames as stored, YBR as RGB."""
    from pydicom.pixels import iter_pixels

    _check_streams(dataset)
    return iter_pixels(dataset, decoding_plugin=_decoder(dataset.file_meta.TransferSyntaxUID))


def _frame(dataset: Dataset) -> np.ndarray:
    for stored in _decoded(dataset):
        return stored
    raise ValueError("no frame")


def _decoder(syntax: UID) -> str:
    """Return the plug-in that decodes; pydicom's default may be one that crashes on damaged files."""
    from pydicom.pixels import get_decoder

    if not syntax.is_encapsulated:
        return ""
    available = get_decoder(syntax).available_plugins
    if (found := next((name for name in _PLUGINS if name in available), None)) is None:
        raise BrokenSampleError(
            f"compressed with {syntax.name}, for which no decoder is installed",
            "install it (docs/dicom.md), or export the file uncompressed",
        )
    return found


def _check_streams(dataset: Dataset) -> None:
    """Check that compressed frames state the header's size, since decoders allocate what a frame states."""
    from pydicom.encaps import generate_frames

    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated or "PixelData" not in dataset:
        return
    size = _size(dataset)
    for frame in generate_frames(dataset.PixelData, number_of_frames=_frames(dataset)):
        if (stated := _stated_size(frame)) is not None and stated != size:
            raise BrokenSampleError(
                f"its compressed pixels are {stated[0]} x {stated[1]} (rows x columns), its header says "
                f"{size[0]} x {size[1]}",
                COPY_AGAIN,
            )


def _stated_size(frame: bytes) -> tuple[int, int] | None:
    """Return the rows and columns that a JPEG, JPEG-LS or JPEG 2000 code stream states; None for other streams."""
    if (start := frame.find(_JPEG_2000)) >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    if not frame.startswith(_JPEG):
        return None
    place = len(_JPEG)
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker in _JPEG_SIZES:
            rows, columns = struct.unpack_from(">2H", frame, place + 5)
            return rows, columns
        # A fill byte, or a marker with its length.
        place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", frame, place + 2)[0]
    raise ValueError("a JPEG stream that states no size")


def _values(stored: np.ndarray, dataset: Dataset, rescale: Dataset) -> np.ndarray:
    """Return the values of stored pixels; ``rescale`` holds slope and intercept, or the modality table."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    if stored.ndim == 3:
        return stored
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        return apply_color_lut(stored, dataset)[..., :3]
    kind = _kind(dataset, rescale)
    values = apply_modality_lut(stored, rescale) if _is_rescaled(rescale) else stored
    if dataset.get("PhotometricInterpretation") != "MONOCHROME1":
        return values.astype(kind)
    ends = np.array(_stored_range(dataset), stored.dtype)
    low, high = (apply_modality_lut(ends, rescale) if _is_rescaled(rescale) else ends).astype(np.float64)
    inverted: np.ndarray = (low + high - values).astype(kind)
    return inverted


def _kind(dataset: Dataset, rescale: Dataset | None = None) -> np.dtype:
    """Return the number type of a grey frame's values: the stored type, or floats that hold its bits."""
    bits = int(dataset.BitsAllocated)
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset or _is_rescaled(rescale or dataset):
        return np.dtype(np.float32 if bits <= 16 else np.float64)
    return np.dtype(f"{'i' if dataset.get('PixelRepresentation') else 'u'}{max(bits, 8) // 8}")


def _is_rescaled(dataset: Dataset) -> bool:
    if "ModalityLUTSequence" in dataset:
        return True
    slope, intercept = (dataset.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope in (None, "") or intercept in (None, ""):
        return False
    if not math.isfinite(float(slope)) or not math.isfinite(float(intercept)) or float(slope) == 0:
        raise BrokenSampleError("its rescale slope or intercept is no usable number", COPY_AGAIN)
    return (float(slope), float(intercept)) != (1.0, 0.0)


def _rescale(dataset: Dataset, frame: int) -> Dataset:
    """Return the item that holds the rescale of a frame of a multi-frame file."""
    groups = (dataset.PerFrameFunctionalGroupsSequence[frame], *dataset.get("SharedFunctionalGroupsSequence", ()))
    found = (group.get("PixelValueTransformationSequence") for group in groups)
    return next((sequence[0] for sequence in found if sequence), dataset)


def _stored_range(dataset: Dataset) -> tuple[int, int]:
    bits = int(dataset.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.get("PixelRepresentation") else (0, 2**bits - 1)


@contextmanager
def _discreet() -> Iterator[None]:
    """Suppress a file's values, which pydicom and highdicom put into warnings, log and errors."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        with _SILENCE:
            yield
    except InvalidDicomError:
        raise BrokenSampleError("is no DICOM file", "take it out, or copy or export it again") from None
    # A missing element is a missing attribute.
    except (*UNREADABLE, BytesLengthException, AttributeError) as error:
        raise BrokenSampleError(f"cannot be read as DICOM ({type(error).__name__})", COPY_AGAIN) from None


class _Silence:
    """Suppresses warnings, and log lines of the libraries, while any thread is within.

    Warnings are filtered for the whole process: the first thread that enters disables them, the last that leaves
    enables them.
    """

    def __init__(self, *loggers: str) -> None:
        self._loggers = loggers
        self._lock = threading.Lock()
        self._within = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                for logger in map(logging.getLogger, self._loggers):
                    self._undo.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._undo.close()


_SILENCE = _Silence("pydicom", "highdicom", "pylibjpeg", "libjpeg", "openjpeg")
# In this order. Without gdcm, which crashed the process on damaged files, and pylibjpeg-rle, which panicked.
_PLUGINS = ("pydicom", "pylibjpeg", "pyjpegls", "pillow")
_LPS_TO_RAS: Any = np.diag([-1.0, -1.0, 1.0, 1.0])
# Segmentation Storage and Label Map Segmentation Storage.
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
# In pixels: the largest distance of a segment's pixel from a voxel's centre.
_OFF_GRID = 0.1
# In pixels, over one step: the largest difference of two slices' axes.
_TURNED = 1e-3
# Relative, as in highdicom.
_UNEVEN = 0.01
_GAP = 1.5
_SAME_PLACE = 1e-3
_JPEG, _JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
# Start of frame: SOF0 to SOF15 without the other markers in between, and JPEG-LS.
_JPEG_SIZES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
