"""Inspect one site, even a broken one: what preprocessing would find and do under the present parameters.

For the comparison with other sites a site gives names, hashes and features of its images, never pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsca_pipeline.config import DataReportConfig, PreprocessingConfig
from fedsca_pipeline.data.preprocessing.report import site_report
from fedsca_pipeline.data.preprocessing.samples import Planes, Sample, read_samples
from fedsca_pipeline.data.preprocessing.selection import select_samples
from fedsca_pipeline.data.preprocessing.split import SPLITS
from fedsca_pipeline.data.site_folder.identifiers import open_site
from fedsca_pipeline.data.site_folder.pairing import Broken, Pair, pair_files
from fedsca_pipeline.data.site_folder.site_file import SiteFile
from fedsca_pipeline.data_report.hashes import Group, near_duplicates, perceptual_hash
from fedsca_pipeline.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_HISTOGRAM_BINS = 64
# Percentiles between which the histogram is drawn: a single outlier would flatten the rest.
_HISTOGRAM_RANGE = (0.1, 99.9)
_QUANTILES = (1, 25, 50, 75, 99)
_SIZES_LISTED = 8
# Most groups of near duplicates to show, and most images of each.
_GROUPS_SHOWN, _MEMBERS_SHOWN = 12, 6


@dataclass(frozen=True)
class Picture:
    """An image to draw, as training sees it.

    Attributes:
        image: its name.
        slice: the slice that represents a volume; None for an image that is not a volume.
        split: its split; "" if none could be drawn.
        pixels: uint8 [3, H, W].
        classes: uint8 [H, W].
    """

    image: str
    slice: int | None
    split: str
    pixels: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class Embedded:
    """Images for the foundation: ``images`` uint8 [N, 3, S, S], and ``valid`` bool [N, S, S], False on padding."""

    names: list[str]
    images: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """The findings at one site.

    Attributes:
        facts: JSON-able: the fields of the site's preprocessing report, ``refusals`` (why the site cannot train, and
            the cure; empty if it can), and the fields of docs/data_report.md.
        pictures: some images.
        duplicates: the images of the first groups of near duplicates, by name.
        embedded: the images from which the foundation computes features.
    """

    facts: dict[str, Any]
    pictures: list[Picture]
    duplicates: dict[str, Picture]
    embedded: Embedded


@dataclass(frozen=True)
class _Files:
    """A site folder's files, before any image is read."""

    folder: Path
    site_file: SiteFile
    pairs: list[Pair]
    broken: list[Broken]
    found: int
    refusals: list[str]


def inspect_site(
    raw: Path,
    site: str,
    config: PreprocessingConfig,
    seed: int,
    previous_manifest: pd.DataFrame | None,
    options: DataReportConfig,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Inspection:
    """Return the findings at one site: what preprocessing would find, but without stopping at broken files.

    Nothing is written.

    Args:
        raw: the folder of all sites.
        site: the site's folder in ``raw``.
        config: the parameters of preprocessing; with ``on_bad_sample: fail`` a broken file is a refusal.
        seed: the run's seed, for the split and the choice of images to show.
        previous_manifest: the stored manifest, whose split is followed as in preprocessing; None if there is none.
        options: how much to show.
        progress: called with the number of images read and the number of all images.
    """
    files = _files(raw / site)
    site_file = files.site_file
    samples, hashes = _read(files, config, progress)
    selection = select_samples(site, samples, files.broken, site_file, config, seed, previous_manifest)
    # If there was nothing to read, refusals for a lack of images only repeat the reason.
    refusals = files.refusals + (selection.refusals if files.pairs or files.broken else [])
    used = [samples[row] for row in selection.rows]
    images = [
        {
            "image": samples[row].pair.image,
            "split": selection.splits.get(samples[row].pair.image, ""),
            "hash": hashes[row],
            "subject": subject_hash(samples[row].subject),
        }
        for row in selection.rows
    ]
    groups = _near_duplicates(images, options.near_duplicate_bits)
    facts = {
        **site_report(raw, site, files.found, used, files.broken, selection, site_file, config, seed),
        "refusals": [_plain(refusal, raw / site) for refusal in refusals],
        **_own_facts(used, images, groups, files, config, selection.splits, previous_manifest),
    }
    order = np.random.default_rng([seed, *site.encode()]).permutation(len(used))
    thumbnails, embedded = order[: options.thumbnails], order[: options.embedded_images * options.embedding]
    duplicates = {member for group in groups[:_GROUPS_SHOWN] for member in group.members[:_MEMBERS_SHOWN]}
    read = partial(_pictures, used, files=files, config=config, splits=selection.splits)
    pictures, copies = read({*thumbnails, *embedded}, _clearest), read(duplicates, _middle)
    return Inspection(
        facts,
        [pictures[row] for row in sorted(thumbnails)],
        {picture.image: picture for picture in copies.values()},
        _padded([pictures[row] for row in sorted(embedded)], config.image_size),
    )


def subject_hash(subject: str) -> str:
    """Return 16 hex digits to compare subjects' names between sites; case and surrounding blanks do not matter.

    >>> subject_hash("P07 ") == subject_hash("p07")
    True
    """
    return hashlib.sha256(f"subject\0{subject.strip().casefold()}".encode()).hexdigest()[:16]


def _read(
    files: _Files, config: PreprocessingConfig, progress: Callable[[int, int], None]
) -> tuple[list[Sample], list[str | None]]:
    """Return all samples of a site and their perceptual hashes; broken files are added to ``files.broken``."""
    samples, hashes = [], []
    for sample, planes in read_samples(files.folder, files.pairs, files.site_file, config, files.broken):
        samples.append(sample)
        hashes.append(perceptual_hash(_plane(planes, _middle(sample))[0]))
        progress(len(samples), len(files.pairs))
    progress(len(files.pairs), len(files.pairs))
    return samples, hashes


def _own_facts(
    used: Sequence[Sample],
    images: list[dict[str, Any]],
    groups: Sequence[Group],
    files: _Files,
    config: PreprocessingConfig,
    splits: Mapping[str, str],
    previous_manifest: pd.DataFrame | None,
) -> dict[str, Any]:
    """Return the facts that preprocessing's report does not have (docs/data_report.md)."""
    has_rule = files.site_file.split_rule is not None
    return {
        "class_names": list(config.names),
        "class_images": [sum(label in sample.classes for sample in used) for label in range(1, config.classes + 1)],
        "splits": _splits(used, splits),
        "size_counts": _size_counts(used),
        "intensity_values": _intensities(used),
        "subject_rule": has_rule,
        # Each site has a salt of its own, so the hashes of one patient differ between sites.
        "subjects_named": has_rule and not files.site_file.hashed_names,
        "grouped_names": _grouped_names(used, files.site_file),
        "torn_subjects": _torn_subjects(used, previous_manifest),
        "near_duplicates": [_described(group, images) for group in groups],
        "images": images,
    }


def _pictures(
    samples: Sequence[Sample],
    rows: Iterable[int],
    choose_slice: Callable[[Sample], int],
    files: _Files,
    config: PreprocessingConfig,
    splits: Mapping[str, str],
) -> dict[int, Picture]:
    """Return pictures of some samples by row, read a second time: all of them would not fit into memory at once."""
    rows = sorted(int(row) for row in rows)
    pairs = [samples[row].pair for row in rows]
    found = {}
    reread = read_samples(files.folder, pairs, files.site_file, config, [])
    for row, (sample, planes) in zip(rows, reread, strict=True):
        index, name = choose_slice(sample), sample.pair.image
        pixels, classes = _plane(planes, index)
        found[row] = Picture(name, index if sample.is_volume else None, splits.get(name, ""), np.array(pixels), classes)
    return found


def _padded(pictures: Sequence[Picture], side: int) -> Embedded:
    images = np.zeros((len(pictures), 3, side, side), np.uint8)
    valid = np.zeros((len(pictures), side, side), bool)
    for row, picture in enumerate(pictures):
        height, width = picture.classes.shape
        images[row, :, :height, :width] = picture.pixels
        valid[row, :height, :width] = True
    return Embedded([picture.image for picture in pictures], images, valid)


def _middle(sample: Sample) -> int:
    """Return the slice that represents a volume in the search for duplicates; 0 for other images."""
    return len(sample.planes) // 2


def _clearest(sample: Sample) -> int:
    """Return the slice to show of a volume: the middle one of those with a class, if there are any."""
    foreground = [index for index, classes in enumerate(sample.planes) if classes]
    return foreground[len(foreground) // 2] if foreground else _middle(sample)


def _plane(planes: Planes, index: int) -> tuple[np.ndarray, np.ndarray]:
    return next(islice(planes, index, None))


def _files(folder: Path) -> _Files:
    """Return the site's files in pairs; an error that would stop preprocessing becomes a refusal."""
    try:
        site_file = open_site(folder)
    except DataError as error:
        # The site may ask for hidden names, so no name is shown.
        return _Files(folder, SiteFile(), [], [], 0, [f"{error}. No file was read"])
    try:
        pairs, broken = pair_files(folder)
    except DataError as error:
        return _Files(folder, site_file, [], [], 0, [str(error)])
    found = len(pairs) + sum(entry.file.startswith("images/") for entry in broken)
    return _Files(folder, site_file, pairs, broken, found, [])


def _plain(refusal: str, folder: Path) -> str:
    """Return a refusal in one line, without the site's name, its path, and the list of broken files."""
    lines = [line.rstrip(":") for line in refusal.splitlines() if not line.startswith("  ")]
    text = ". ".join(lines).removeprefix(f"{folder}: ").removeprefix(f"site {folder.name}: ")
    return text.replace(f"{folder}/", f"{folder.name}/")


def _near_duplicates(images: Sequence[dict[str, Any]], threshold: int) -> list[Group]:
    """Return groups of near duplicates of different subjects, as rows of ``images``; those across splits come first."""
    rows = [row for row, image in enumerate(images) if image["hash"] is not None]
    found = near_duplicates([images[row]["hash"] for row in rows], [images[row]["subject"] for row in rows], threshold)
    groups = [Group(tuple(rows[member] for member in group.members), group.distance) for group in found]
    return sorted(groups, key=lambda group: not across_splits([images[row]["split"] for row in group.members]))


def across_splits(splits: Sequence[str]) -> bool:
    """Return whether these splits differ, where ``unused`` counts as ``train``.

    >>> across_splits(["train", "unused"]), across_splits(["train", "test"])
    (False, True)
    """
    return len({"train" if split == "unused" else split for split in splits}) > 1


def _described(group: Group, images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    members = [{key: images[row][key] for key in ("image", "split")} for row in group.members]
    return {
        "bits": group.distance,
        "across_splits": across_splits([member["split"] for member in members]),
        "images": members,
    }


def _splits(samples: Sequence[Sample], splits: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Return the numbers of images, subjects and empty masks of each split that has images."""
    members = defaultdict(list)
    for sample in samples:
        members[splits.get(sample.pair.image, "")].append(sample)
    return {
        split: {
            "images": len(members[split]),
            "subjects": len({sample.subject for sample in members[split]}),
            "empty_masks": sum(not sample.class_pixels[1:].any() for sample in members[split]),
        }
        for split in (*SPLITS, "unused")
        if members[split]
    }


def _size_counts(samples: Sequence[Sample]) -> list[dict[str, int]]:
    """Return the most common raw sizes, in rows and columns, with the number of images."""
    common = Counter(sample.original for sample in samples).most_common(_SIZES_LISTED)
    return [{"height": height, "width": width, "images": images} for (height, width), images in common]


def _intensities(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Return quantiles and a histogram of raw intensities, with equal weight per image; None without images."""
    if not samples:
        return None
    values = np.concatenate([sample.values for sample in samples]).astype(np.float64)
    low, high = np.percentile(values, _HISTOGRAM_RANGE)
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS, range=(low, high))
    return {
        "quantiles": dict(zip(map(str, _QUANTILES), np.percentile(values, _QUANTILES).tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "shares": (counts / len(values)).tolist()},
    }


def _grouped_names(samples: Sequence[Sample], site_file: SiteFile) -> dict[str, Any] | None:
    """Return signs of several images per patient in the file names (``p07_1``, ``p07_2``) of a site without a rule.

    The sign: the stems' first parts, up to a ``_``, ``-`` or blank, are at most half as many as the images.
    """
    if site_file.group is not None or site_file.subjects is not None or not samples:
        return None
    first = Counter(re.split(r"[_\- ]", sample.pair.stem, maxsplit=1)[0] for sample in samples)
    if not 1 < len(first) <= len(samples) / 2:
        return None
    return {"parts": len(first), "images": len(samples), "rule": r"^([^_\- ]+)[_\- ]"}


def _torn_subjects(samples: Sequence[Sample], previous_manifest: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Return the subjects, by the present ``site.yml``, whose images are in two splits of the stored manifest."""
    if previous_manifest is None:
        return []
    stored = dict(zip(previous_manifest["image"], previous_manifest["split"], strict=True))
    members = defaultdict(list)
    for sample in samples:
        if sample.pair.image in stored:
            members[sample.subject].append({"image": sample.pair.image, "split": stored[sample.pair.image]})
    return [
        {"subject": subject_hash(subject), "images": images}
        for subject, images in members.items()
        if across_splits([image["split"] for image in images])
    ]
