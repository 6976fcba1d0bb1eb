"""One site's facts, however broken it is: what preprocessing would find, and would do, under the present parameters.

What a site tells of its images to be compared with others is their names, hashes and features, never pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsca_pipeline.config import DataReportConfig, PreprocessingConfig
from fedsca_pipeline.data.importers.pseudonyms import SiteSource, open_site
from fedsca_pipeline.data.preprocessing.report import site_report
from fedsca_pipeline.data.preprocessing.samples import Planes, Sample, read_samples
from fedsca_pipeline.data.preprocessing.selection import settle
from fedsca_pipeline.data.preprocessing.split import SPLITS
from fedsca_pipeline.data.site_folder.pairing import Broken, Pair, pair_files
from fedsca_pipeline.data.site_folder.site_file import SiteFile
from fedsca_pipeline.data_report.hashes import Group, near_duplicates, perceptual_hash
from fedsca_pipeline.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_HISTOGRAM_BINS = 64
# Between these the histogram is drawn: one hot pixel would flatten all the rest.
_HISTOGRAM_RANGE = (0.1, 99.9)
_QUANTILES = (1, 25, 50, 75, 99)
_SIZES_LISTED = 8
# Groups of near duplicates that are shown, and images of each.
_GROUPS_SHOWN, _MEMBERS_SHOWN = 12, 6


@dataclass(frozen=True)
class Picture:
    """An image as training sees it, to be drawn: its name, pixels uint8 [3, H, W] and classes uint8 [H, W].

    ``slice`` is the one that stands for a volume, None of a flat image; ``split`` is "" where none could be drawn.
    """

    image: str
    slice: int | None
    split: str
    pixels: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class Embedded:
    """Images for the foundation: ``names``, uint8 [N, 3, S, S], and bool [N, S, S] that is True off the padding."""

    names: list[str]
    images: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """What was found at one site.

    ``facts`` is JSON-able: the fields of the site's data report, ``refusals`` (why the site cannot train, with the
    cure; empty where it can) and those of docs/data_report.md. ``pictures`` are some images, ``duplicates`` those of
    the first groups of near duplicates, by name.
    """

    facts: dict[str, Any]
    pictures: list[Picture]
    duplicates: dict[str, Picture]
    embedded: Embedded


@dataclass(frozen=True)
class _Files:
    """What could be made of a site folder before any image is read."""

    source: SiteSource
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
    private: Path | None = None,
) -> Inspection:
    """Look at one site as preprocessing would, without stopping at what is broken, and without writing anything.

    But of a site whose names are hidden the private folder is made, as by preprocessing (``pseudonyms.open_site``).

    Args:
        raw: the folder of all sites.
        site: the site's folder in it.
        config: what preprocessing is asked to do; ``on_bad_sample: fail`` makes a broken file a refusal.
        seed: the run's, of the split and of the images that are shown.
        previous_manifest: the stored one, which the split follows as it would in preprocessing; None if there is none.
        options: how much is shown.
        progress: called with the number of images read, and of all.
        private: the site's own folder of pseudonyms; left out, ``private/<site>`` beside ``raw``.
    """
    files = _files(raw, site, private)
    site_file = files.source.site_file
    samples, hashes = [], []
    for sample, planes in read_samples(files.source.folder, files.pairs, site_file, config, files.broken):
        samples.append(sample)
        hashes.append(perceptual_hash(_plane(planes, _middle(sample))[0]))
        progress(len(samples), len(files.pairs))
    progress(len(files.pairs), len(files.pairs))
    settled = settle(site, samples, files.broken, site_file, config, seed, previous_manifest)
    # Where there is nothing to read, what settling says of no images is beside the point.
    refusals = files.refusals + (settled.refusals if files.pairs or files.broken else [])
    kept, hashes = [samples[row] for row in settled.rows], [hashes[row] for row in settled.rows]
    images = [
        {
            "image": sample.pair.image,
            "split": settled.splits.get(sample.pair.image, ""),
            "hash": hash_,
            "subject": subject_hash(sample.subject),
        }
        for sample, hash_ in zip(kept, hashes, strict=True)
    ]
    groups = _near_duplicates(images, options.near_duplicate_bits)
    facts = {
        **site_report(raw, site, files.found, kept, files.broken, settled, site_file, config, seed),
        "refusals": [_plain(refusal, raw / site) for refusal in refusals],
        "class_names": list(config.names),
        "class_images": [sum(label in sample.classes for sample in kept) for label in range(1, config.classes + 1)],
        "splits": _splits(kept, settled.splits),
        "size_counts": _size_counts(kept),
        "intensity_values": _intensities(kept),
        "subject_rule": site_file.split_rule is not None,
        # Pseudonyms are salted by each site, so that no other site's can be the same.
        "subjects_named": site_file.split_rule is not None and files.source.names is None,
        "grouped_names": _grouped_names(kept, site_file),
        "torn_subjects": _torn_subjects(kept, previous_manifest),
        "near_duplicates": [_described(group, images) for group in groups],
        "images": images,
    }
    order = np.random.default_rng([seed, *site.encode()]).permutation(len(kept))
    shown, embedded = order[: options.thumbnails], order[: options.embedded_images * options.embedding]
    close = {member for group in groups[:_GROUPS_SHOWN] for member in group.members[:_MEMBERS_SHOWN]}

    def pictures(rows: Iterable[int], choose: Callable[[Sample], int]) -> dict[int, Picture]:
        rows = sorted(int(row) for row in rows)
        read = _pictures([kept[row] for row in rows], choose, files, config, settled.splits)
        return dict(zip(rows, read, strict=True))

    telling = pictures({*shown, *embedded}, _telling)
    return Inspection(
        facts,
        [telling[row] for row in sorted(shown)],
        {picture.image: picture for picture in pictures(close, _middle).values()},
        _padded([telling[row] for row in sorted(embedded)], config.image_size),
    )


def subject_hash(subject: str) -> str:
    """Return 16 hex digits by which sites find subjects of one name; capitals and outer blanks do not count."""
    return hashlib.sha256(f"subject\0{subject.strip().casefold()}".encode()).hexdigest()[:16]


def _pictures(
    samples: Sequence[Sample],
    choose: Callable[[Sample], int],
    files: _Files,
    config: PreprocessingConfig,
    splits: Mapping[str, str],
) -> Iterator[Picture]:
    """Read a few images a second time, so that no more of them have to be held; ``choose`` takes a volume's slice."""
    source = files.source
    pairs = [sample.pair for sample in samples]
    for sample, planes in read_samples(source.folder, pairs, source.site_file, config, []):
        place, name = choose(sample), sample.pair.image
        pixels, classes = _plane(planes, place)
        yield Picture(name, place if sample.is_volume else None, splits.get(name, ""), np.array(pixels), classes)


def _padded(pictures: Sequence[Picture], side: int) -> Embedded:
    images = np.zeros((len(pictures), 3, side, side), np.uint8)
    valid = np.zeros((len(pictures), side, side), bool)
    for row, picture in enumerate(pictures):
        height, width = picture.classes.shape
        images[row, :, :height, :width] = picture.pixels
        valid[row, :height, :width] = True
    return Embedded([picture.image for picture in pictures], images, valid)


def _middle(sample: Sample) -> int:
    """Return the slice that stands for a volume where copies are looked for; 0 of a flat image."""
    return len(sample.planes) // 2


def _telling(sample: Sample) -> int:
    """Return the slice that stands for a volume to the eye: in the middle of those that show a class, if any does."""
    shown = [place for place, classes in enumerate(sample.planes) if classes]
    return shown[len(shown) // 2] if shown else _middle(sample)


def _plane(planes: Planes, place: int) -> tuple[np.ndarray, np.ndarray]:
    return next(islice(planes, place, None))


def _files(raw: Path, site: str, private: Path | None) -> _Files:
    """Open the site and pair its files; what stops preprocessing here is a refusal."""
    try:
        source = open_site(raw, site, private or raw.parent / "private" / site)
    except DataError as error:
        # Without its site.yml nobody knows whether the site's names may be shown.
        return _Files(SiteSource(raw / site, raw / site, SiteFile()), [], [], 0, [f"{error}. No file was looked at"])
    try:
        pairs, broken = pair_files(source.folder, source.home)
    except DataError as error:
        return _Files(source, [], [], 0, [str(error)])
    found = len(pairs) + sum(entry.file.startswith("images/") for entry in broken)
    return _Files(source, pairs, broken, found, [])


def _plain(refusal: str, folder: Path) -> str:
    """Return a refusal without whose it is, every broken file (a report says both anyway) and where the site lies."""
    lines = [line.rstrip(":") for line in refusal.splitlines() if not line.startswith("  ")]
    text = ". ".join(lines).removeprefix(f"{folder}: ").removeprefix(f"site {folder.name}: ")
    return text.replace(f"{folder}/", f"{folder.name}/")


def _near_duplicates(images: Sequence[dict[str, Any]], threshold: int) -> list[Group]:
    """Group near duplicates of different subjects, by places in ``images``; those across splits come first."""
    rows = [row for row, image in enumerate(images) if image["hash"] is not None]
    found = near_duplicates([images[row]["hash"] for row in rows], [images[row]["subject"] for row in rows], threshold)
    groups = [Group(tuple(rows[place] for place in group.members), group.distance) for group in found]
    return sorted(groups, key=lambda group: not across_splits([images[row]["split"] for row in group.members]))


def across_splits(splits: Sequence[str]) -> bool:
    """Whether images in these splits stand on two sides: training (used or not), validation, test."""
    return len({"train" if split == "unused" else split for split in splits}) > 1


def _described(group: Group, images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    members = [{key: images[row][key] for key in ("image", "split")} for row in group.members]
    return {
        "bits": group.distance,
        "across_splits": across_splits([member["split"] for member in members]),
        "images": members,
    }


def _splits(samples: Sequence[Sample], splits: dict[str, str]) -> dict[str, dict[str, int]]:
    """Count images, subjects and empty masks of each split that has any."""
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
    """Return the commonest raw sizes, rows and columns, with the number of images."""
    common = Counter(sample.original for sample in samples).most_common(_SIZES_LISTED)
    return [{"height": height, "width": width, "images": images} for (height, width), images in common]


def _intensities(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Return quantiles and a histogram of raw intensities, all images weighing the same; None without images."""
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
    """Return what looks like patients in the file names of a site that names none: ``p07_1``, ``p07_2``.

    That is the case where the stems' first parts, up to a ``_``, ``-`` or blank, are at most half as many as the
    images.
    """
    if site_file.group is not None or site_file.subjects is not None or not samples:
        return None
    first = Counter(re.split(r"[_\- ]", sample.pair.stem, maxsplit=1)[0] for sample in samples)
    if not 1 < len(first) <= len(samples) / 2:
        return None
    return {"parts": len(first), "images": len(samples), "rule": r"^([^_\- ]+)[_\- ]"}


def _torn_subjects(samples: Sequence[Sample], previous_manifest: pd.DataFrame | None) -> list[dict[str, Any]]:
    """List subjects, by the present ``site.yml``, whose images stand in two splits of the stored manifest."""
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
