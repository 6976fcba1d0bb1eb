"""Samples of a source into site folders: all of them, or none."""

from __future__ import annotations

import csv
import io
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fedsca_pipeline.data.importers.layout import Importer
from fedsca_pipeline.data.importers.pictures import Picture, UnusableError, blaming
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.data.site_folder.discovery import SITES_READY, settle_sites
from fedsca_pipeline.data.site_folder.pairing import Broken, list_faults
from fedsca_pipeline.errors import DataError, RefusedImportError
from fedsca_pipeline.files import write_bytes

IMPORTED = "import.csv"


def import_sites(
    raw: Path,
    importer: Importer,
    source: Path,
    *,
    quarantine: bool = False,
    private: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, Any]]:
    """Write the samples of ``source`` as site folders below ``raw``.

    Images stay as they are, masks become PNG or NIfTI of classes; one sample at a time is in memory. Every site comes
    with a ``site.yml`` of subjects and notes. All are built beside their place and renamed into it: a killed call
    leaves no half site. Nothing of the source is changed, nothing outside it is read.

    Args:
        raw: the folder of the sites.
        importer: the layout.
        source: where the data set was unpacked.
        quarantine: leave out what is broken, and list it, instead of stopping.
        private: where to list, of an importer whose file names may name patients, what files its stems stand for
            (left out: ``private`` beside ``raw``).
        progress: is told after each image how many of how many are done.

    Returns:
        Per site ``images``, ``subjects``, ``pixels`` of each class by name, and ``broken``, a list of ``file``
        (relative to the source), ``reason`` and ``cure``.

    Raises:
        DataError: no such source, nothing of the layout in it, or a site that is there already.
        RefusedImportError: broken files without ``quarantine``, or nothing else. The message names the first ones.
    """
    if not source.is_dir():
        raise DataError(f"source: {source} is not a folder; unpack the data set there, or name where it is")
    settle_sites(raw)
    samples = [replace(sample, site=_site_name(sample.site)) for sample in importer.find(source)]
    if importer.regroup is None:
        _refuse_existing(raw, {sample.site for sample in samples})
    legend = _write_names(private or raw.parent / "private", source, samples) if importer.discreet else ""
    workshop = raw / ".import_sites.partial"
    try:
        # A killed command may have left its workshop behind.
        shutil.rmtree(workshop, ignore_errors=True)
        summary = _write(workshop, importer, samples, source, progress)
        broken = {name: [Broken(**entry) for entry in site["broken"]] for name, site in summary.items()}
        left = any(site["images"] for site in summary.values())
        if any(broken.values()) and not (quarantine and left):
            raise RefusedImportError(_refusal(source, broken, quarantine) + legend, summary)
        _refuse_existing(raw, {path.name for path in workshop.iterdir()})
        workshop.rename(raw / SITES_READY)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    settle_sites(raw)
    return summary


def _refusal(source: Path, broken: Mapping[str, Sequence[Broken]], quarantine: bool) -> str:
    count = sum(map(len, broken.values()))
    listed = "".join(
        list_faults(entries, "", f"{site} in 02_intermediate/import.json") for site, entries in broken.items()
    )
    leave_out = "or leave them out with preprocessing.on_bad_sample=quarantine"
    cure = "; nothing else is there" if quarantine else f", {leave_out}"
    return f"{source}: {count} broken file{'s' * (count > 1)}:{listed}\nMend them{cure}"


def _refuse_existing(raw: Path, sites: set[str]) -> None:
    if there := sorted(site for site in sites if (raw / site).exists()):
        raise DataError(
            f"{raw}: {', '.join(there)} {'is' if len(there) == 1 else 'are'} there already; take them away to import "
            "them anew, or import into another place with data_root=<folder>"
        )


@dataclass
class _Site:
    """What has been written of one site."""

    subjects: dict[str, str] = field(default_factory=dict)
    """By stem."""
    pixels: Counter[int] = field(default_factory=Counter)
    broken: list[dict[str, str]] = field(default_factory=list)


def _write(
    workshop: Path, importer: Importer, samples: Sequence[Sample], source: Path, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    sites: dict[str, _Site] = defaultdict(_Site)
    workshop.mkdir(parents=True)
    for done, sample in enumerate(samples, start=1):
        try:
            picture = _read(importer, sample, source)
            name = _site_name(importer.regroup(picture.image)) if importer.regroup else sample.site
            site, stem = sites[name], _plain(sample.stem)
            if stem in site.subjects:
                raise UnusableError(
                    sample.images[0], BrokenSampleError(f"another image of {name} has the stem {stem!r}", "rename one")
                )
        except UnusableError as unusable:
            sites[sample.site].broken.append(_described(importer, sample, unusable, source).as_dict())
        else:
            _place(workshop / name, stem, picture)
            site.subjects[stem] = _plain(sample.subject)
            numbers, counts = np.unique(picture.mask, return_counts=True)
            site.pixels.update(dict(zip(map(int, numbers), map(int, counts), strict=True)))
        progress(done, len(samples))
    for name, site in sites.items():
        if site.subjects:
            _write_site_file(workshop / name, importer, site.subjects)
    classes = ("background", *importer.classes)
    return {
        name: {
            "images": len(site.subjects),
            "subjects": len(set(site.subjects.values())),
            "pixels": {label: site.pixels[number] for number, label in enumerate(classes)},
            "broken": site.broken,
        }
        for name, site in sorted(sites.items())
    }


def _described(importer: Importer, sample: Sample, unusable: UnusableError, source: Path) -> Broken:
    if importer.discreet:
        return Broken(f"image {sample.stem}", unusable.error.unquoted, unusable.error.cure)
    return Broken.of(unusable.file.relative_to(source).as_posix(), unusable.error)


def _write_names(private: Path, source: Path, samples: Sequence[Sample]) -> str:
    """List what the stems of images stand for, for the owner of the data alone; return where, for a message."""
    private.mkdir(parents=True, exist_ok=True)
    private.chmod(0o700)
    stream = io.StringIO()
    rows = [(sample.site, sample.stem, sample.images[0].relative_to(source).as_posix()) for sample in samples]
    csv.writer(stream).writerows([("site", "image", "first file"), *rows])
    write_bytes(private / IMPORTED, stream.getvalue().encode(errors="surrogateescape"))
    return f"\nImages stand for files of the source as {private / IMPORTED} lists them."


def _read(importer: Importer, sample: Sample, source: Path) -> Picture:
    if sample.fault is not None:
        raise UnusableError(sample.images[0], BrokenSampleError(*sample.fault))
    inside = source.resolve()
    for file in (*sample.images, *sample.masks):
        with blaming(file):
            if not file.resolve().is_relative_to(inside):
                raise BrokenSampleError("a link that leads out of the source", "copy the file itself there")
    return importer.picture(sample)


def _place(folder: Path, stem: str, picture: Picture) -> None:
    images, masks = folder / "images", folder / "masks"
    for kind in (images, masks):
        kind.mkdir(parents=True, exist_ok=True)
    for ending, file in picture.copies.items():
        target = images / f"{stem}{ending}"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if isinstance(picture.image, Volume):
        if not picture.copies:
            write_nifti(images / f"{stem}.nii.gz", picture.image.voxels, picture.image.affine)
        write_nifti(masks / f"{stem}.nii.gz", picture.mask, picture.image.affine)
    else:
        if not picture.copies:
            Image.fromarray(picture.image).save(images / f"{stem}.png")
        Image.fromarray(picture.mask).save(masks / f"{stem}.png")


def _write_site_file(folder: Path, importer: Importer, subjects: Mapping[str, str]) -> None:
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(importer.classes, start=1))
    content: dict[str, Any] = {
        "notes": f"{importer.title}. Classes: {classes}. Terms: {importer.licence}",
        # Classes are final: a mask of nothing but 0 and 255 is not to be guessed about.
        "label_map": {number: number for number in range(len(importer.classes) + 1)},
        "subjects": dict(subjects),
    }
    write_bytes(folder / "site.yml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def _site_name(name: str) -> str:
    """Make a name of ASCII letters, digits, ``_`` and ``-`` that starts with a letter or digit; accents are dropped."""
    ascii_letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return _trimmed(re.sub(r"[^A-Za-z0-9_-]+", "-", ascii_letters), name)


def _plain(name: str) -> str:
    """Make a name of letters of any script, digits, ``_`` and ``-`` that starts with a letter or digit."""
    return _trimmed(re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", name)), name)


def _trimmed(plain: str, name: str) -> str:
    if not (trimmed := plain.strip("_-")):
        raise DataError(f"{name!r}: no letter or digit of a name is left; rename it")
    return trimmed
