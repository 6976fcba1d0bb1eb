"""DICOM: a PACS export, or a site folder (``images/`` and ``masks/``) that holds DICOM files.

A PACS export has DICOM files in any folders under any names, images with the segmentations (SEG) that refer to them. A
series of single frames with positions becomes a volume, every other file is an image. The files themselves say which
segmentation belongs to which image, and which images show one patient. Segments are classes by their labels, since
their numbers differ from file to file. If no file is a segmentation, a NIfTI in the folder of a series, or with the
folder's name, is its mask; otherwise NIfTI files are skipped, with a warning.

Names of files and folders may name patients, so no message contains any.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.importers.dicom_export import Export, images_of
from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.layouts import site_folder
from fedsca_pipeline.data.importers.masks import Label, stored_values, two_values
from fedsca_pipeline.data.importers.pictures import Picture, UnusableError, blaming, read_dicom
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import visible_files
from fedsca_pipeline.data.readers.common import BrokenSampleError, split_name
from fedsca_pipeline.data.readers.dicom import read_frame_segmentation, read_segmentation
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.site_folder.discovery import is_own_file
from fedsca_pipeline.data.site_folder.identifiers import KINDS
from fedsca_pipeline.errors import ConfigError, DataError, counted

logger = logging.getLogger(__name__)

_DIVIDER = "|"
_MOST = 254
_NIFTI = (".nii", ".nii.gz")
_NO_MASK = BrokenSampleError(
    "no segmentation (SEG) refers to it",
    "export the one drawn on it with the series, contours (RTSTRUCT) as SEG; or leave out images without one",
)
_NO_PATIENT = BrokenSampleError(
    "holds no PatientID, so the images of one patient cannot stay in one split", "enter a PatientID"
)


def configure(source: Path, options: Mapping[str, str], watch: Watch) -> Importer:
    """Return the importer of the segments that the headers of the source's files name.

    A site folder is read by ``site_folder``, with ``segments`` as the names of its classes.

    Raises:
        ConfigError: ``segments`` names one that no file has.
        DataError: the source holds no segmentation.
    """
    if all((source / kind).is_dir() for kind in KINDS):
        return site_folder.importer_of(source, options, names="segments")
    export = Export.of(source, watch)
    there, drawn = export.segments, _drawn(source)
    if not there and drawn:
        return _with_nifti(export, drawn, options)
    if not there:
        raise DataError(
            f"{source}: {counted(len(export.files), 'DICOM file')}, and none is a segmentation (SEG); export the "
            "segmentations with the images, contours (RTSTRUCT) as SEG, or put a NIfTI mask into each series' folder"
        )
    if drawn:
        skipped = sum(map(len, drawn.values()))
        logger.warning("%s skipped: the masks are the segmentations (SEG)", counted(skipped, "NIfTI file"))
    chosen = str(options["segments"]).split(_DIVIDER) if "segments" in options else sorted(there)
    if missing := sorted(set(chosen) - set(there)):
        raise ConfigError(
            f"import_options.segments: no segment is labelled {missing[0]!r}; there are {_DIVIDER.join(sorted(there))}"
        )
    classes = {label: number for number, label in enumerate(dict.fromkeys(chosen), start=1)}
    if len(classes) > _MOST:
        raise ConfigError(f"import_options.segments: {len(classes)} segments; name the {_MOST} or fewer that matter")
    segments = {
        path: {number: classes.get(label, 0) for number, label in found.segments.items()}
        for path, found in export.files.items()
        if found.segments
    }
    return replace(
        IMPORTER,
        classes=tuple(classes),
        refine=partial(_related, export=export, site=str(options.get("site", "dicom"))),
        read=partial(_read, segments=segments, ordered="segments" in options or len(classes) == 1),
        configure=None,
    )


def _drawn(source: Path) -> dict[Path, list[Path]]:
    """Return the NIfTI files of a source by the folder whose name each has, or else the folder that holds it."""
    found: dict[Path, list[Path]] = defaultdict(list)
    composed = {
        (path.parent, unicodedata.normalize("NFC", path.name)): path for path in source.rglob("*") if path.is_dir()
    }
    for path in visible_files(source):
        stem, suffix = split_name(path.name)
        if suffix in _NIFTI and is_own_file(path, source):
            found[composed.get((path.parent, stem), path.parent)].append(path)
    return found


def _with_nifti(export: Export, drawn: Mapping[Path, list[Path]], options: Mapping[str, str]) -> Importer:
    """Return the importer of series with NIfTI masks: ``segments`` name their numbers from 1 on. Default: one class."""
    names = str(options["segments"]).split(_DIVIDER) if "segments" in options else ["foreground"]
    label = stored_values({number: number for number in range(len(names) + 1)}) if len(names) > 1 else two_values()
    return replace(
        IMPORTER,
        classes=tuple(names),
        refine=partial(_beside, export=export, drawn=drawn, site=str(options.get("site", "dicom"))),
        read=_read_beside,
        label=label,
        configure=None,
    )


def _beside(
    _: Path, __: list[Sample], *, export: Export, drawn: Mapping[Path, list[Path]], site: str
) -> Iterator[Sample]:
    """Yield an image per series, or file, with the NIfTI of its folder, which holds no other image."""
    images = list(images_of(export.files))
    inhabitants = Counter(folder for _, _, files in images for folder in {file.parent for file in files})
    taken: set[Path] = set()
    for uid, _identifiers, files in images:
        folders = {file.parent for file in files}
        masks = [mask for folder in folders for mask in drawn.get(folder, ())]
        taken.update(masks)
        patient = export.files[files[0]].patient
        fault = None
        if len(masks) != 1 or len(folders) > 1 or inhabitants[files[0].parent] > 1:
            fault = BrokenSampleError(
                f"{counted(len(masks), 'NIfTI mask')}, {counted(len(folders), 'folder')}, "
                f"{counted(inhabitants[files[0].parent], 'image')} in the first",
                "give each series a folder of its own with one mask in it, or beside it under the folder's name",
            )
        elif not patient:
            fault = _NO_PATIENT
        yield Sample(site, uid, patient, tuple(files), tuple(masks), fault)
    for mask in (mask for masks in drawn.values() for mask in masks):
        if mask not in taken:
            fault = BrokenSampleError(
                "a NIfTI without a series in its folder, or in the folder of its name", "move it to its series"
            )
            yield Sample(site, str(mask), "", (mask,), (), fault)
    yield from _unreadable(export, site)


def _unreadable(export: Export, site: str) -> Iterator[Sample]:
    for path, error in export.unreadable.items():
        yield Sample(site, str(path), "", (path,), (), error)


def _related(_: Path, __: list[Sample], *, export: Export, site: str) -> Iterator[Sample]:
    """Yield an image per series of placed frames, or file, with the segmentations that refer to it."""
    masks: dict[str, list[Path]] = defaultdict(list)
    for path, found in export.files.items():
        for uid in found.sources if found.segments else ():
            masks[uid].append(path)
    taken: set[Path] = set()
    for uid, known_as, files in images_of(export.files):
        own = list(dict.fromkeys(mask for key in known_as for mask in masks.get(key, ())))
        taken.update(own)
        patient = export.files[files[0]].patient
        fault = _NO_PATIENT if not patient else None if own else _NO_MASK
        yield Sample(site, uid, patient, tuple(files), tuple(own), fault)
    for path, found in export.files.items():
        if found.segments and path not in taken:
            fault = BrokenSampleError("a segmentation of an image that is not there", "export that series too")
            yield Sample(site, found.instance, "", (path,), (), fault)
    yield from _unreadable(export, site)


def _read(sample: Sample, _: Label | None, *, segments: Mapping[Path, Mapping[int, int]], ordered: bool) -> Picture:
    """Read an image and its segmentations.

    Where segments overlap and are ``ordered``, the higher class is on top; without an order the sample is refused.
    """
    with blaming(sample.images[0]):
        image = read_dicom(sample.images)
    mask = _joined(sample, image, segments)
    if not ordered:
        # Numbers that fall as classes rise, so that the lowest class is on top.
        turned = {path: {number: -value % 256 for number, value in own.items()} for path, own in segments.items()}
        if (mask != -_joined(sample, image, turned)).any():
            raise UnusableError(
                sample.masks[0],
                BrokenSampleError(
                    "its segments overlap",
                    f"name all in import_options.segments=<label>{_DIVIDER}<label>, the one on top last",
                ),
            )
    return Picture(image, mask)


def _read_beside(sample: Sample, label: Label) -> Picture:
    """Read a series and its NIfTI mask on the series' grid, whatever the order of its axes."""
    with blaming(sample.images[0]):
        image = read_dicom(sample.images)
    with blaming(sample.masks[0]):
        return Picture(image, label(sample.masks, image))


def _joined(sample: Sample, image: np.ndarray | Volume, segments: Mapping[Path, Mapping[int, int]]) -> np.ndarray:
    """Return uint8 classes; a pixel of several segments has the highest class."""
    mask = np.zeros(image.shape if isinstance(image, Volume) else image.shape[:2], np.uint8)
    for path in sample.masks:
        with blaming(path):
            if isinstance(image, Volume):
                labels = read_segmentation(path, image, segments[path]).voxels
            else:
                labels = read_frame_segmentation(path, sample.images[0], segments[path])
            mask = np.maximum(mask, labels.astype(np.uint8))
    return mask


_PATTERNS = (Patterns("**/{file}", "", site="dicom", stem="{file}", subject="{file}", empty_without_mask=True),)

IMPORTER = Importer(
    title="DICOM",
    licence="your own",
    classes=(),
    patterns=_PATTERNS,
    options=("site", "segments"),
    configure=configure,
    hides_names=True,
)
