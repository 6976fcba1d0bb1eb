"""Samples of a source to site folders: all of them, or none (``build_sites``, then ``place_built_sites``)."""

from __future__ import annotations

import logging
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from PIL import Image

from fedsca_pipeline.data.importers.layout import Importer
from fedsca_pipeline.data.importers.pictures import Picture, UnusableError, blaming, write_image
from fedsca_pipeline.data.importers.pseudonyms import NAMES, Pseudonyms
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import visible_files
from fedsca_pipeline.data.readers.common import BrokenSampleError, check_not_empty, split_name
from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.data.site_folder.discovery import SITES_READY, place_finished_sites
from fedsca_pipeline.data.site_folder.pairing import SUFFIXES, Broken, by_fault, list_faults, shown
from fedsca_pipeline.errors import DataError, RefusedImportError, counted
from fedsca_pipeline.files import write_bytes

logger = logging.getLogger(__name__)

# Most folders named of those that are passed over.
_FOLDERS_LISTED = 20
# Hidden, so no command takes it for a site.
_WORKSHOP = ".import_sites.partial"


def build_sites(
    raw: Path,
    importer: Importer,
    source: Path,
    *,
    quarantine: bool = False,
    private: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, Any]]:
    """Write the samples of ``source`` as site folders, which ``place_built_sites`` then moves to ``raw``.

    Image files are copied, masks become PNG or NIfTI of classes, and each site gets a ``site.yml`` of subjects and
    notes. An importer that hides names writes images anew, without what a file holds beside its pixels, and gives
    images and subjects salted-hash names. One sample at a time is in memory. The sites are built in a hidden folder
    below ``raw``, so a killed call leaves no half site. The source is only read, and nothing outside it is. The log
    names the folders with images that are passed over.

    Args:
        raw: the folder of the sites.
        importer: the layout.
        source: the folder of the unpacked data set.
        quarantine: leave out broken files and list them, instead of stopping.
        private: the folder of each site's salt and ``names.csv``, for an importer that hides names. Default:
            ``private`` beside ``raw``.
        progress: receives the number of samples done and of all, after each.

    Returns:
        Per site ``images``, ``subjects``, ``pixels`` of each class by name, ``broken``, a list of ``file`` (relative to
        the source, or the image's hashed name), ``reason`` and ``cure``, and ``alerts``, where headers contradict
        themselves.

    Raises:
        DataError: the source is missing, holds nothing of the layout, or a site exists already.
        RefusedImportError: broken files without ``quarantine``, or nothing else. The message names the first ones.
    """
    samples = _find(raw, importer, source)
    private = private or raw.parent / "private"
    workshop = raw / _WORKSHOP
    # A killed command may have left its workshop behind.
    shutil.rmtree(workshop, ignore_errors=True)
    with ExitStack() as on_failure:
        on_failure.callback(shutil.rmtree, workshop, ignore_errors=True)
        sites = _write(workshop, importer, samples, source, private, progress)
        for name, site in sites.items():
            if site.names is not None and not (raw / name).exists():
                site.names.write_table()
        summary = {name: site.summary(importer.classes) for name, site in sites.items()}
        if any(site.broken for site in sites.values()) and not (
            quarantine and any(site.subjects for site in sites.values())
        ):
            raise RefusedImportError(_refusal(importer, source, sites, private, quarantine), summary)
        _refuse_existing(raw, {path.name for path in workshop.iterdir()})
        on_failure.pop_all()
    return summary


def place_built_sites(raw: Path) -> None:
    """Move the sites of ``build_sites`` to ``raw``: all of them, even if the call is killed (at the next command).

    Raises:
        DataError: no sites were built.
    """
    workshop = raw / _WORKSHOP
    if not workshop.is_dir():
        raise DataError(f"{raw}: there are no imported sites to move into place; run the whole pipeline import_sites")
    workshop.rename(raw / SITES_READY)
    place_finished_sites(raw)


def _passed_over(source: Path, samples: Sequence[Sample], *, name: bool) -> list[str]:
    """Return a line for each folder with images that are in no sample: their number, and the first.

    If they may not be ``name``d, one line has the number of all.
    """
    used = {file for sample in samples for file in (*sample.images, *sample.masks)}
    folders: dict[Path, list[str]] = defaultdict(list)
    for path in visible_files(source):
        if path not in used and split_name(path.name)[1] in SUFFIXES:
            folders[path.parent.relative_to(source)].append(path.name)
    lines = [
        f"{shown(folder.as_posix())}: {counted(len(files), 'image file')}, such as {shown(files[0])}"
        for folder, files in folders.items()
    ]
    if not name and folders:
        return [f"{counted(sum(map(len, folders.values())), 'image file')} in {counted(len(folders), 'folder')}"]
    if rest := list(folders.values())[_FOLDERS_LISTED:]:
        more = f"{counted(sum(map(len, rest)), 'image file')} in {counted(len(rest), 'more folder')}"
        lines[_FOLDERS_LISTED:] = [more]
    return lines


def _find(raw: Path, importer: Importer, source: Path) -> list[Sample]:
    """Return the samples of ``source`` with the names of their sites below ``raw``; log what is no sample.

    Raises:
        DataError: the source is missing, holds nothing of the layout, or a site exists already.
    """
    if not source.is_dir():
        raise DataError(f"source: {source} is not a folder; unpack the data set there, or name where it is")
    place_finished_sites(raw)
    samples = [replace(sample, site=_site_name(sample.site)) for sample in importer.find(source)]
    for line in _passed_over(source, samples, name=not importer.hides_names):
        logger.warning("passed over: %s", line)
    if importer.regroup is None:
        _refuse_existing(raw, {sample.site for sample in samples})
    return samples


@dataclass
class _Site:
    """What has been written of one site. ``names``: of an importer that hides names; None: names are the source's."""

    names: Pseudonyms | None
    subjects: dict[str, str] = field(default_factory=dict)
    """By stem."""
    pixels: Counter[int] = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)
    doubted: list[Broken] = field(default_factory=list)
    """Images that were written, and what their files contradict themselves about."""

    def stem(self, sample: Sample, source: Path) -> str:
        """Return the name of a sample's files in the site folder."""
        if self.names is None:
            return _plain(sample.stem)
        return self.names.image(sample.stem, sample.images[0].relative_to(source).as_posix())

    def subject(self, sample: Sample) -> str:
        """Return the name of a sample's subject."""
        return _plain(sample.subject) if self.names is None else self.names.subject(sample.subject)

    def blame(self, sample: Sample, unusable: UnusableError, source: Path) -> None:
        """List a sample that cannot be used; of a site that hides names, without what the source says."""
        error = unusable.error
        if self.names is None:
            self.broken.append(Broken.of(unusable.file.relative_to(source).as_posix(), error))
        else:
            self.broken.append(Broken(f"image {self.stem(sample, source)}", error.unquoted, error.cure))

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the site's entry in what ``build_sites`` returns."""
        return {
            "images": len(self.subjects),
            "subjects": len(set(self.subjects.values())),
            "pixels": {label: self.pixels[number] for number, label in enumerate(("background", *classes))},
            "broken": [entry.as_dict() for entry in self.broken],
            "alerts": [f"{alike.file}: {alike.reason}" for alike in by_fault(self.doubted)],
        }


def _write(
    workshop: Path,
    importer: Importer,
    samples: Sequence[Sample],
    source: Path,
    private: Path,
    progress: Callable[[int, int], None],
) -> dict[str, _Site]:
    """Write all samples into ``workshop``; return the sites by name, in order."""
    sites: dict[str, _Site] = {}

    def site_of(name: str) -> _Site:
        if name not in sites:
            sites[name] = _Site(Pseudonyms(private / name) if importer.hides_names else None)
        return sites[name]

    workshop.mkdir(parents=True)
    for done, sample in enumerate(samples, start=1):
        try:
            picture = _read(importer, sample, source)
            # ``regroup`` is for layouts of pixels, not of volumes.
            pixels = cast("np.ndarray", picture.image)
            name = _site_name(importer.regroup(pixels)) if importer.regroup else sample.site
            site = site_of(name)
            stem = site.stem(sample, source)
            with blaming(sample.images[0]):
                if stem in site.subjects:
                    raise BrokenSampleError(f"another image of {name} has the stem {stem!r}", "rename one")
                _place(workshop / name, stem, picture, rewrite=importer.hides_names)
        except UnusableError as unusable:
            site_of(sample.site).blame(sample, unusable, source)
        else:
            site.subjects[stem] = site.subject(sample)
            if isinstance(picture.image, Volume):
                site.doubted += [Broken(f"image {stem}", alert, "") for alert in picture.image.alerts]
            numbers, counts = np.unique(picture.mask, return_counts=True)
            site.pixels.update(dict(zip(map(int, numbers), map(int, counts), strict=True)))
        progress(done, len(samples))
    for name, site in sites.items():
        if site.subjects:
            _write_site_file(workshop / name, importer, site)
    return dict(sorted(sites.items()))


def _read(importer: Importer, sample: Sample, source: Path) -> Picture:
    if sample.fault is not None:
        raise UnusableError(sample.images[0], sample.fault)
    inside = source.resolve()
    for file in (*sample.images, *sample.masks):
        with blaming(file):
            if not file.resolve().is_relative_to(inside):
                raise BrokenSampleError("a link that leads out of the source", "copy the file itself there")
            if file.is_file():
                check_not_empty(file)
    return importer.picture(sample)


def _place(folder: Path, stem: str, picture: Picture, *, rewrite: bool) -> None:
    """Write one image and its mask; ``rewrite``: no file is copied, since files hold more than pixels.

    Raises:
        BrokenSampleError: no format holds the image's values.
    """
    images, masks = folder / "images", folder / "masks"
    for kind in (images, masks):
        kind.mkdir(parents=True, exist_ok=True)
    if picture.original is None or rewrite:
        write_image(images, stem, picture.image)
    else:
        shutil.copyfile(picture.original, images / f"{stem}{split_name(picture.original.name)[1]}")
    if isinstance(picture.image, Volume):
        write_nifti(masks / f"{stem}.nii.gz", picture.mask, picture.image.affine)
    else:
        Image.fromarray(picture.mask).save(masks / f"{stem}.png")


def _write_site_file(folder: Path, importer: Importer, site: _Site) -> None:
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(importer.classes, start=1))
    written = f"{importer.title}. Classes: {classes}. Terms: {importer.licence}"
    content: dict[str, Any] = {
        "notes": f"{importer.notes} {written}".strip(),
        # Classes are final: a mask of nothing but 0 and 255 needs no guess.
        "label_map": {number: number for number in range(len(importer.classes) + 1)},
        "subjects": site.subjects,
    }
    if importer.spacing is not None:
        content["spacing"] = list(importer.spacing)
    if site.names is not None:
        content["hashed_names"] = True
    write_bytes(folder / "site.yml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def _refusal(importer: Importer, source: Path, sites: Mapping[str, _Site], private: Path, quarantine: bool) -> str:
    count = sum(len(site.broken) for site in sites.values())
    listed = "".join(
        list_faults(site.broken, "", f"{name} in 02_intermediate/import.json") for name, site in sites.items()
    )
    leave_out = ", or leave them out with preprocessing.on_bad_sample=quarantine"
    cure = "; nothing else is there" if quarantine else leave_out
    message = f"{counted(count, 'broken file')}:{listed}\nFix them{cure}"
    if not importer.hides_names:
        return f"{source}: {message}"
    tables = ", ".join(str(private / name / NAMES) for name, site in sites.items() if site.broken)
    return f"source: {message}\nImages stand for files of the source as {tables} lists them."


def _refuse_existing(raw: Path, sites: set[str]) -> None:
    if there := sorted(site for site in sites if (raw / site).exists()):
        raise DataError(
            f"{raw}: {', '.join(there)} {'is' if len(there) == 1 else 'are'} there already; delete them to import "
            "them again, or import into another place with data_root=<folder>"
        )


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
