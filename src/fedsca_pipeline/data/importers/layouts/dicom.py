"""A PACS export: DICOM files in any folders under any names, images with the segmentations (SEG) that refer to them.

Where there is no segmentation at all, the NIfTI that lies in the folder of a series, or is called as it, is its mask;
where there is one, NIfTI files are passed over, with a warning.

A series of single frames that lie in space becomes a volume, every other file an image of its own. Which segmentation
belongs to what, and who is one patient, the files say themselves; segments are told apart by their labels, since their
numbers differ from file to file. As names of files and folders may name patients, no message holds any.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.masks import Label, stored_values, two_values
from fedsca_pipeline.data.importers.pictures import Picture, UnusableError, blaming
from fedsca_pipeline.data.importers.pseudonyms import is_dicom
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import visible_files
from fedsca_pipeline.data.readers.common import BrokenSampleError, split_name
from fedsca_pipeline.data.readers.dicom import (
    Relations,
    read_frame,
    read_frame_segmentation,
    read_multiframe,
    read_relations,
    read_segmentation,
    read_series_files,
)
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.site_folder.discovery import is_own_file
from fedsca_pipeline.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_DIVIDER = "|"
_MOST = 254
_NIFTI = (".nii", ".nii.gz")
_NO_MASK = (
    "no segmentation (SEG) refers to it",
    "export the one drawn on it with the series, contours (RTSTRUCT) as SEG; or leave out what has none",
)


@dataclass(frozen=True)
class _Export:
    """The DICOM files of a source: those that can be read, each once, and those that cannot, with what is wrong."""

    files: Mapping[Path, Relations]
    unreadable: Mapping[Path, BrokenSampleError]

    @classmethod
    def of(cls, source: Path, watch: Watch) -> _Export:
        files: dict[Path, Relations] = {}
        unreadable: dict[Path, BrokenSampleError] = {}
        instances = set()
        for path in watch(visible_files(source)):
            # A DICOMDIR lists what lies beside it.
            if path.name == "DICOMDIR" or not is_own_file(path, source) or not is_dicom(path, source):
                continue
            try:
                found = read_relations(path)
            except BrokenSampleError as error:
                unreadable[path] = error
                continue
            # Exports have copies of one instance in several folders.
            if found.instance not in instances:
                instances.add(found.instance)
                files[path] = found
        return cls(files, unreadable)

    @property
    def segments(self) -> Counter[str]:
        """How many segmentations have a segment of this label."""
        return Counter(label for found in self.files.values() for label in set(found.segments.values()))


def configure(source: Path, options: Mapping[str, str], watch: Watch) -> Importer:
    """Look at the headers of the source's files, and make the importer of their segments.

    Raises:
        ConfigError: ``segments`` names one that no file has.
        DataError: no segmentation is there.
    """
    export = _Export.of(source, watch)
    there, drawn = export.segments, _drawn(source)
    if not there and drawn:
        return _with_nifti(export, drawn, options)
    if not there:
        raise DataError(
            f"{source}: {len(export.files)} DICOM files, and none is a segmentation (SEG); export the segmentations "
            "with the images, contours (RTSTRUCT) as SEG, or lay a NIfTI mask into each series' folder"
        )
    if drawn:
        passed_over = sum(map(len, drawn.values()))
        logger.warning("%d NIfTI files are passed over: the masks are the segmentations (SEG)", passed_over)
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
    return Importer(
        title="DICOM of a PACS",
        licence="your own",
        classes=tuple(classes),
        patterns=_PATTERNS,
        refine=partial(_related, export=export, site=str(options.get("site", "dicom"))),
        read=partial(_read, segments=segments, ordered="segments" in options or len(classes) == 1),
        discreet=True,
    )


def _drawn(source: Path) -> dict[Path, list[Path]]:
    """Return the NIfTI files of a source by the folder that each is called as, or else lies in."""
    found: dict[Path, list[Path]] = defaultdict(list)
    for path in visible_files(source):
        stem, suffix = split_name(path.name)
        if suffix in _NIFTI and is_own_file(path, source):
            named = path.parent / stem
            found[named if named.is_dir() else path.parent].append(path)
    return found


def _with_nifti(export: _Export, drawn: Mapping[Path, list[Path]], options: Mapping[str, str]) -> Importer:
    """Return the importer of series with NIfTI masks, whose numbers from 1 on are ``segments``, or of one class."""
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
    _: Path, __: list[Sample], *, export: _Export, drawn: Mapping[Path, list[Path]], site: str
) -> Iterator[Sample]:
    """Yield an image a series, or file, with the NIfTI of its folder, which holds nothing else."""
    images = list(_images(export.files))
    inhabitants = Counter(folder for _, _, files in images for folder in {file.parent for file in files})
    taken: set[Path] = set()
    for uid, _, files in images:
        folders = {file.parent for file in files}
        masks = [mask for folder in folders for mask in drawn.get(folder, ())]
        taken.update(masks)
        patient = export.files[files[0]].patient
        fault = None
        if len(masks) != 1 or len(folders) > 1 or inhabitants[files[0].parent] > 1:
            fault = (
                f"{len(masks)} NIfTI masks, {len(folders)} folders, {inhabitants[files[0].parent]} images in the first",
                "give each series a folder of its own with one mask in it, or beside it under the folder's name",
            )
        yield Sample(site, _digest(uid), _digest(patient), tuple(files), tuple(masks), fault or _nameless(patient))
    for mask in (mask for masks in drawn.values() for mask in masks):
        if mask not in taken:
            fault = "a NIfTI in whose folder, or in that of its name, no series is", "lay it to its series"
            yield Sample(site, _digest(str(mask)), "", (mask,), (), fault)
    yield from _unreadable(export, site)


def _nameless(patient: str) -> tuple[str, str] | None:
    return None if patient else ("holds no PatientID, so nobody knows which images show one patient", "enter one")


def _unreadable(export: _Export, site: str) -> Iterator[Sample]:
    for path, error in export.unreadable.items():
        yield Sample(site, _digest(str(path)), "", (path,), (), (error.unquoted, error.cure))


def _related(_: Path, __: list[Sample], *, export: _Export, site: str) -> Iterator[Sample]:
    """Yield an image a series of placed frames, or a file, with the segmentations that refer to it."""
    masks: dict[str, list[Path]] = defaultdict(list)
    for path, found in export.files.items():
        for uid in found.sources if found.segments else ():
            masks[uid].append(path)
    taken: set[Path] = set()
    for uid, known_as, files in _images(export.files):
        own = list(dict.fromkeys(mask for key in known_as for mask in masks.get(key, ())))
        taken.update(own)
        patient = export.files[files[0]].patient
        fault = _nameless(patient) or (None if own else _NO_MASK)
        yield Sample(site, _digest(uid), _digest(patient), tuple(files), tuple(own), fault)
    for path, found in export.files.items():
        if found.segments and path not in taken:
            fault = "a segmentation of an image that is not there", "export that series too"
            yield Sample(site, _digest(found.instance), "", (path,), (), fault)
    yield from _unreadable(export, site)


def _images(files: Mapping[Path, Relations]) -> Iterator[tuple[str, tuple[str, ...], list[Path]]]:
    """Yield of each image its identifier, those by which a segmentation may refer to it, and its files.

    It is a series of several placed single frames, or a file; one that is its whole series goes by both names.
    """
    series: dict[str, list[Path]] = defaultdict(list)
    for path, found in files.items():
        if found.is_image:
            series[found.series].append(path)
    for uid, members in series.items():
        if len(members) > 1 and all(files[path].frames == 1 and files[path].placed for path in members):
            yield uid, (uid,), members
            continue
        for path in members:
            own = files[path].instance
            yield own, (own, uid) if len(members) == 1 else (own,), [path]


def _read(sample: Sample, _: Label | None, *, segments: Mapping[Path, Mapping[int, int]], ordered: bool) -> Picture:
    """Read an image and its segmentations; where they overlap, and are ``ordered``, the higher class is on top."""
    first = sample.images[0]
    with blaming(first):
        image = _image(sample.images)
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
    return _picture(sample, image, mask)


def _read_beside(sample: Sample, label: Label) -> Picture:
    """Read a series and its NIfTI mask, which lies on the series' grid in whatever order of axes."""
    with blaming(sample.images[0]):
        image = _image(sample.images)
    with blaming(sample.masks[0]):
        return _picture(sample, image, label(sample.masks, image))


def _picture(sample: Sample, image: np.ndarray | Volume, mask: np.ndarray) -> Picture:
    if len(sample.images) > 1:
        return Picture(image, mask, {f"/{place:05d}.dcm": file for place, file in enumerate(sample.images)})
    return Picture(image, mask, {".dcm": sample.images[0]})


def _joined(sample: Sample, image: np.ndarray | Volume, segments: Mapping[Path, Mapping[int, int]]) -> np.ndarray:
    """Return uint8 classes; the highest of those that a pixel has."""
    mask = np.zeros(image.shape if isinstance(image, Volume) else image.shape[:2], np.uint8)
    for path in sample.masks:
        with blaming(path):
            if isinstance(image, Volume):
                labels = read_segmentation(path, image, segments[path]).voxels
            else:
                labels = read_frame_segmentation(path, sample.images[0], segments[path])
            mask = np.maximum(mask, labels.astype(np.uint8))
    return mask


def _image(files: Sequence[Path]) -> np.ndarray | Volume:
    if len(files) > 1:
        return read_series_files(files)
    return read_multiframe(files[0]) if read_relations(files[0]).frames > 1 else read_frame(files[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


_PATTERNS = (Patterns("**/{file}", "", site="dicom", stem="{file}", subject="{file}", empty_without_mask=True),)

IMPORTER = Importer(
    title="DICOM of a PACS",
    licence="your own",
    classes=(),
    patterns=_PATTERNS,
    options=("site", "segments"),
    configure=configure,
    discreet=True,
)
