"""A site folder (``images/``, ``masks/``, ``site.yml``) whose names must stay hidden, or that holds DICOM files.

Images and masks pair by stem. An image may be a DICOM file, a folder with the files of one DICOM series, or any format
of a raw site; a mask a DICOM segmentation (SEG), or any format of a raw site. The label rule of ``site.yml`` is applied
here. An image's subject is that of ``site.yml``, else the PatientID of its DICOM file, else the image itself.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.masks import Image, Label, at_shape
from fedsca_pipeline.data.importers.pictures import Picture, blaming, read_dicom
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.preprocessing.labels import by_number, by_threshold, read_classes, read_volume_classes
from fedsca_pipeline.data.readers.common import LITTER, BrokenSampleError, litter, split_name
from fedsca_pipeline.data.readers.dicom import (
    files_of_series,
    read_frame_segmentation,
    read_header,
    read_segmentation,
    read_series_files,
)
from fedsca_pipeline.data.readers.images import READERS, read_image
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.readers.volumes import VOLUME_READERS, is_volume, read_volume
from fedsca_pipeline.data.site_folder.discovery import leads_out
from fedsca_pipeline.data.site_folder.identifiers import KINDS, is_dicom, visible_entries
from fedsca_pipeline.data.site_folder.label_rule import LabelRule
from fedsca_pipeline.data.site_folder.site_file import SiteFile, read_site_file
from fedsca_pipeline.errors import DataError, counted

_DIVIDER = "|"
_MOST = 254


def configure(source: Path, options: Mapping[str, str], _: Watch) -> Importer:
    """Return the importer of the site folder ``source``.

    Raises:
        DataError: a folder is missing or empty, or ``site.yml`` is wrong.
    """
    return importer_of(source, options, names="classes")


def importer_of(source: Path, options: Mapping[str, str], names: str) -> Importer:
    """Return the importer of a site folder; the option ``names`` lists its classes, divided by ``|``."""
    for kind in KINDS:
        if not visible_entries(source / kind):
            raise DataError(f"source: no files in its folder {kind}; put the site's {kind} there, one file an image")
    site_file = read_site_file(source, terse=True)
    classes = tuple(str(options.get(names, "foreground")).split(_DIVIDER))
    return replace(
        IMPORTER,
        classes=classes,
        refine=partial(_pairs, site_file=site_file, site=str(options.get("site", source.resolve().name))),
        read=partial(_read, rule=site_file.label_rule, classes=len(classes), option=names),
        configure=None,
        notes=site_file.notes,
        spacing=site_file.spacing,
    )


def _pairs(source: Path, _: list[Sample], *, site_file: SiteFile, site: str) -> Iterator[Sample]:
    """Yield a sample for each stem; a stem without one image and one mask is broken."""
    found: dict[str, dict[str, list[Path]]] = {kind: defaultdict(list) for kind in KINDS}
    for kind in KINDS:
        for path in visible_entries(source / kind):
            if error := _unusable(path, source):
                yield Sample(site, f"{kind}/{path.name}", "", (path,), (), error)
            else:
                found[kind][_stem(path)].append(path)
    for stem in sorted({*found["images"], *found["masks"]}):
        images, masks = found["images"][stem], found["masks"][stem]
        fault, subject = None, ""
        if not images:
            fault = BrokenSampleError("mask without an image", "add the image, or delete the mask")
        elif not masks:
            fault = BrokenSampleError("image without a mask", "add a mask (all zero if it shows none), or delete it")
        elif len(images) > 1 or len(masks) > 1:
            fault = BrokenSampleError(
                f"{counted(len(images), 'image')} and {counted(len(masks), 'mask')} share the stem",
                "keep one of each, or rename the others",
            )
        else:
            try:
                subject = _subject(images[0], stem, site_file)
            except BrokenSampleError as error:
                fault = error
        yield Sample(site, stem, subject, tuple((images or masks)[:1]), tuple(masks), fault)


def _unusable(path: Path, source: Path) -> BrokenSampleError | None:
    if leads_out(path, source):
        return BrokenSampleError("a link that leads out of the site folder", "copy the file itself there")
    if path.is_dir():
        wrong = BrokenSampleError("a folder that is no DICOM series", "move its files up, or delete it")
        return None if is_dicom(path, source) else wrong
    if not path.is_file():
        return BrokenSampleError("a broken link, a pipe or a device, not a file", "put the file itself there")
    if path.name.lower() in LITTER:
        return litter()
    if split_name(path.name)[1] in _KNOWN or is_dicom(path, source):
        return None
    # The suffix may be part of a name.
    return BrokenSampleError("a file of unknown format", f"convert it to one of {', '.join(sorted(_KNOWN))}")


def _stem(path: Path) -> str:
    """Return what pairs an image with its mask; the whole name of a folder, or of a file without a known suffix."""
    stem, suffix = split_name(path.name)
    return stem if suffix in _KNOWN and not path.is_dir() else unicodedata.normalize("NFC", path.name)


def _subject(image: Path, stem: str, site_file: SiteFile) -> str:
    if site_file.split_rule is not None:
        try:
            return f"rule\0{site_file.subject(stem)}"
        except BrokenSampleError:
            raise BrokenSampleError(
                "site.yml's rule (group or subjects) finds no subject for it", "fix the rule, or the file's name"
            ) from None
    file = files_of_series(image)[0] if image.is_dir() else image
    header = read_header(file) if image.is_dir() or _is_dicom_file(image) else None
    if header is None:
        return f"image\0{stem}"
    if not header.patient:
        raise BrokenSampleError(
            "holds no PatientID, so the images of one patient cannot stay in one split",
            "enter a PatientID, or name the subjects in site.yml by group or subjects",
        )
    return f"patient\0{header.patient}"


def _read(sample: Sample, _: Label | None, *, rule: LabelRule, classes: int, option: str) -> Picture:
    (file,), (mask,) = sample.images, sample.masks
    with blaming(file):
        image = _image(file)
    with blaming(mask):
        labels = _classes(mask, file, image, rule)
        if not isinstance(image, Volume):
            at_shape(labels, image.shape[:2])
        if (most := int(labels.max())) > classes:
            raise BrokenSampleError(
                f"shows class {most}, but import_options.{option} names {classes}",
                f"name them all, import_options.{option}=<class 1>{_DIVIDER}<class 2>, or map it in site.yml",
            )
    return Picture(image, labels)


def _image(file: Path) -> Image:
    if file.is_dir():
        return read_series_files(files_of_series(file))
    if _is_dicom_file(file):
        return read_dicom([file])
    return read_volume(file) if is_volume(file.name) else read_image(file)


def _classes(mask: Path, file: Path, image: Image, rule: LabelRule) -> np.ndarray:
    """Return a mask as uint8 classes by the site's label rule, which maps the segment numbers of a SEG."""
    if _is_dicom_file(mask):
        if isinstance(image, Volume):
            values = read_segmentation(mask, image).voxels
        elif _is_dicom_file(file):
            values = read_frame_segmentation(mask, file)
        else:
            raise BrokenSampleError(
                "a DICOM mask, but its image is no DICOM file", "export the mask as PNG or TIFF on the image's grid"
            )
        if rule.threshold is not None:
            flat, _ = by_threshold(values.reshape(len(values), -1), rule.threshold)
            return flat.reshape(values.shape)
        return by_number(values, rule.numbers, _MOST)[0]
    if is_volume(mask.name) != isinstance(image, Volume):
        raise BrokenSampleError(
            "of image and mask one is a volume, the other flat", "export both as volumes, or both slice by slice"
        )
    if isinstance(image, Volume):
        return read_volume_classes(mask, image, rule, _MOST)[0]
    return read_classes(mask, rule, _MOST)[0]


def _is_dicom_file(path: Path) -> bool:
    """Return whether a file in ``images/`` or ``masks/`` is DICOM."""
    return not path.is_dir() and is_dicom(path, path.parents[1])


_KNOWN = frozenset({*READERS, *VOLUME_READERS, ".dcm"})

IMPORTER = Importer(
    title="A site folder",
    licence="your own",
    classes=(),
    patterns=(Patterns("**/{file}", "", site="site", stem="{file}", subject="{file}", empty_without_mask=True),),
    options=("site", "classes"),
    configure=configure,
    hides_names=True,
)
