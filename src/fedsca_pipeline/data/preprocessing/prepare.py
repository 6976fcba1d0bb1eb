"""One site from raw folder to manifest, arrays and data report (docs/data.md). Nothing raw is modified."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.importers.pseudonyms import open_site
from fedsca_pipeline.data.preprocessing.array_writer import ArraysFile, ArraysWriter
from fedsca_pipeline.data.preprocessing.samples import Sample, read_samples
from fedsca_pipeline.data.preprocessing.slices import choose_slices
from fedsca_pipeline.data.preprocessing.split import SPLITS, draw_split, split_targets
from fedsca_pipeline.data.readers.images import split_name
from fedsca_pipeline.data.site_folder.discovery import fingerprint_site
from fedsca_pipeline.data.site_folder.pairing import Broken, list_faults, pair_files
from fedsca_pipeline.data.site_folder.site_file import HiddenSiteFile, SiteFile
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.files import fingerprint

MANIFEST_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "site": "str",
        "subject": "str",
        "image": "str",
        "mask": "str",
        "split": "str",
        "label_map": "str",
        "classes": "str",
        "sha256": "str",
        "mask_sha256": "str",
        "height": "int64",
        "width": "int64",
        "original_height": "int64",
        "original_width": "int64",
        "row": "int64",
        "volume": "str",
        "slice": "int64",
        "split_settings": "str",
    }
)
"""The manifest's columns. Read a stored one with these, or a subject ``007`` comes back as 7."""


@dataclass(frozen=True)
class PreparedSite:
    """What the later stages need of one site.

    ``manifest`` has one row an image, or slice of a volume, in stem order, with the columns of ``MANIFEST_DTYPES``:
    ``split`` is train, validation, test or unused; ``classes`` a JSON list of the classes in the resized mask;
    ``height`` and ``width`` are the valid area in the arrays; paths are relative to the site folder; ``volume`` is the
    stem of a slice's volume, "" for a flat image, whose ``slice`` is -1. ``arrays`` is a finished file of ``images``
    uint8 [N, 3, S, S], ``masks`` uint8 [N, S, S] (0 background, 1..K, padding 0), ``sizes`` int32 [N, 2] and
    ``manifest`` uint8 [32], the manifest's digest. ``report`` is JSON-able.
    """

    manifest: pd.DataFrame
    arrays: ArraysFile
    report: dict[str, Any]


@dataclass(frozen=True)
class Settled:
    """What becomes of the samples that were read.

    ``rows`` are those to keep, in order; ``splits`` is by image path, empty where none could be drawn; ``planes`` are,
    by image path too, which rows of the sample stay in the arrays: of a training volume not every empty slice;
    ``settings`` and ``drawn`` say by what and how splits were drawn. ``refusals`` say why the site cannot train, with
    the cure, the first reason first.
    """

    rows: list[int]
    splits: dict[str, str]
    planes: dict[str, list[int]]
    settings: str
    drawn: str
    warnings: list[str]
    refusals: list[str]


def prepare_site(
    raw: Path,
    site: str,
    config: PreprocessingConfig,
    seed: int,
    previous_manifest: pd.DataFrame | None = None,
    *,
    scratch: Path | None = None,
    private: Path | None = None,
) -> PreparedSite:
    """Read, check, split and resize one site's images, in memory for one image, or volume, however many there are.

    The arrays grow in a hidden folder within ``scratch``, which is on the disk where they shall end up (left out: in
    the system's folder for temporary files). ``private`` is the site's own folder of ``pseudonyms.open_site``
    (left out: ``private/<site>`` beside ``raw``).

    Subjects in ``previous_manifest`` keep their split while seed, split settings and group rule are the same; under
    other settings all are drawn anew, which the report's warnings say.

    Raises:
        OSError: the disk is full.
        DataError: broken files with ``on_bad_sample: fail``, too few usable images, only empty masks, no images or
            masks folder, a wrong ``site.yml``, or a split without images. The message names them and the cure.
    """
    source = open_site(raw, site, private or raw.parent / "private" / site)
    site_file = source.site_file
    pairs, broken = pair_files(source.folder, source.home)
    found = len(pairs) + sum(entry.file.startswith("images/") for entry in broken)

    samples: list[Sample] = []
    with ArraysWriter(scratch or Path(tempfile.gettempdir()), site, config.image_size) as writer:
        for sample, planes in read_samples(source.folder, pairs, site_file, config, broken):
            for image, mask in planes:
                writer.append(image, mask)
            samples.append(sample)

        settled = settle(site, samples, broken, site_file, config, seed, previous_manifest)
        if settled.refusals:
            raise DataError("\n".join(filter(None, (settled.refusals[0], source.legend))))
        rows = _array_rows(samples, settled)
        samples = [samples[row] for row in settled.rows]
        manifest = _manifest(site, samples, settled)
        arrays = writer.finish(rows, manifest)
    report = site_report(raw, site, found, samples, broken, settled, site_file, config, seed)
    return PreparedSite(manifest, arrays, report)


def site_report(
    raw: Path,
    site: str,
    found: int,
    samples: Sequence[Sample],
    broken: Sequence[Broken],
    settled: Settled,
    site_file: SiteFile,
    config: PreprocessingConfig,
    seed: int,
) -> dict[str, Any]:
    """Return the data report (docs/data.md), JSON-able, of the samples that are kept; there may be none.

    ``pseudonyms`` says whether names and subjects stand for others.
    """
    splits = list(settled.splits.values())
    read = {sample.pair.image: sample.sha256 for sample in samples}
    read |= {sample.pair.mask: sample.mask_sha256 for sample in samples}
    return {
        "site": site,
        "fingerprint": fingerprint_site(raw, site, read),
        "counts": {
            "found": found,
            "used": len(samples),
            "broken": len(broken),
            "subjects": len({sample.subject for sample in samples}),
            **{split: splits.count(split) for split in (*SPLITS, "unused")},
        },
        "empty_masks": sum(_is_empty(sample) for sample in samples),
        **_summary(samples, config.classes),
        **_volumes(samples, settled),
        "split": {
            **_split_settings(site, config, seed, site_file),
            "settings": settled.settings,
            "drawn": settled.drawn,
            "fingerprint": fingerprint(sorted(settled.splits.items())),
        },
        "spacing": list(site_file.spacing) if site_file.spacing else None,
        "notes": site_file.notes,
        "pseudonyms": isinstance(site_file, HiddenSiteFile),
        "broken": [entry.as_dict() for entry in broken],
        "warnings": settled.warnings,
    }


def settle(
    site: str,
    samples: Sequence[Sample],
    broken: list[Broken],
    site_file: SiteFile,
    config: PreprocessingConfig,
    seed: int,
    previous_manifest: pd.DataFrame | None,
) -> Settled:
    """Drop copies across subjects, which join ``broken``, and draw the splits; say why the site would be refused."""
    settings = fingerprint(_split_settings(site, config, seed, site_file))
    previous, drawn, warnings = _previous(previous_manifest, settings)
    warnings += [f"{sample.pair.image}: {warning}" for sample in samples for warning in sample.warnings]
    rows, copies = _settle_duplicates(samples, set(previous["image"]), broken)
    kept = [samples[row] for row in rows]
    warnings += copies + _unused_subjects(site_file, kept, broken)
    refusals = _refusals(site, config, kept, broken)
    splits: dict[str, str] = {}
    if kept:
        try:
            splits = _draw(site, kept, config, seed, previous)
            warnings += _shortfalls(site, config, splits) + _absent_classes(config, kept, splits)
        except DataError as error:
            refusals.append(str(error))
    planes = {sample.pair.image: _planes_to_keep(site, sample, splits, config, seed) for sample in kept}
    return Settled(rows, splits, planes, settings, drawn, warnings, refusals)


def _planes_to_keep(
    site: str, sample: Sample, splits: Mapping[str, str], config: PreprocessingConfig, seed: int
) -> list[int]:
    image = sample.pair.image
    if not sample.is_volume or splits.get(image) in ("validation", "test"):
        return list(range(len(sample.planes)))
    return choose_slices([bool(classes) for classes in sample.planes], config.volume.empty_slices, seed, site, image)


def _array_rows(samples: Sequence[Sample], settled: Settled) -> list[int]:
    """Return which of the rows that all samples filled, one after the other, are kept."""
    starts = np.cumsum([0, *(len(sample.planes) for sample in samples)])
    return [int(starts[row]) + plane for row in settled.rows for plane in settled.planes[samples[row].pair.image]]


def _is_empty(sample: Sample) -> bool:
    return not sample.class_pixels[1:].any()


def _settle_duplicates(samples: Sequence[Sample], known: set[str], broken: list[Broken]) -> tuple[list[int], list[str]]:
    """Keep identical images within one subject only: no image may stand in two splits.

    Returns the rows to keep, in order, and warnings. Among subjects the one that had its split already is kept.
    """
    copies = defaultdict(list)
    for row, sample in enumerate(samples):
        copies[sample.pixels].append(row)
    dropped: set[int] = set()
    warnings = []
    for rows in copies.values():
        first = min(rows, key=lambda row: (samples[row].pair.image not in known, row))
        kept = [row for row in rows if samples[row].subject == samples[first].subject]
        for row in set(rows) - set(kept):
            dropped.add(row)
            broken.append(
                Broken(
                    samples[row].pair.image,
                    f"the same picture as {samples[first].pair.image}, of another subject",
                    "delete one of them, or give both one subject in site.yml",
                )
            )
        if len(kept) > 1:
            names = ", ".join(samples[row].pair.image for row in kept)
            warnings.append(f"identical images of subject {samples[first].subject}: {names}")
    return [row for row in range(len(samples)) if row not in dropped], warnings


def _unused_subjects(site_file: SiteFile, samples: Sequence[Sample], broken: Sequence[Broken]) -> list[str]:
    there = {sample.pair.stem for sample in samples} | {split_name(Path(entry.file).name)[0] for entry in broken}
    absent = sorted(set(site_file.subjects or {}) - there)
    return [f"site.yml: subjects names {len(absent)} stems without an image: {', '.join(absent[:8])}"] if absent else []


def _refusals(site: str, config: PreprocessingConfig, samples: Sequence[Sample], broken: Sequence[Broken]) -> list[str]:
    pages = f"kedro run --pipeline=data_report, then 08_reporting/data_report/{site}.json"
    listing = list_faults(broken, f"{site}/", pages)
    found = []
    if broken and config.on_bad_sample == "fail":
        found.append(
            f"site {site}: {len(broken)} file{'s' * (len(broken) > 1)} cannot be used:{listing}\n"
            "Mend them, or set preprocessing.on_bad_sample: quarantine to go on without them."
        )
    if len(samples) < config.min_images:
        found.append(
            f"site {site}: {len(samples)} usable images, preprocessing.min_images is {config.min_images}; "
            f"add images, or take the folder out of the raw data{listing}"
        )
    if samples and all(map(_is_empty, samples)):
        found.append(
            f"site {site}: all {len(samples)} masks are empty, so there is nothing to learn; add labelled images, "
            "or check label_map in site.yml"
        )
    return found


def _split_settings(site: str, config: PreprocessingConfig, seed: int, site_file: SiteFile) -> dict[str, Any]:
    override = config.split.overrides.get(site, {})
    return {
        "seed": seed,
        "validation": float(override.get("validation", config.split.validation)),
        "test": float(override.get("test", config.split.test)),
        "max_train": config.split.max_train,
        "group": site_file.split_rule,
    }


def _previous(manifest: pd.DataFrame | None, settings: str) -> tuple[dict[str, list[Any]], str, list[str]]:
    """Return the columns of a previous manifest if it binds this split, how the split comes about, and warnings."""
    nothing: dict[str, list[Any]] = {name: [] for name in MANIFEST_DTYPES}
    if manifest is None or manifest.empty:
        return nothing, "new", []
    if "split_settings" in manifest and (manifest["split_settings"] == settings).all():
        return manifest.to_dict("list"), "kept", []
    return nothing, "anew", ["the seed, split settings or group rule changed: validation and test were drawn anew"]


def _draw(
    site: str, samples: Sequence[Sample], config: PreprocessingConfig, seed: int, previous: Mapping[str, list[Any]]
) -> dict[str, str]:
    """Split by image path; an earlier image is known by its subject, its path or its content."""
    subjects = {sample.pair.image: sample.subject for sample in samples}
    images = dict(zip(previous["image"], previous["split"], strict=True))
    sides: dict[tuple[str, str], set[str]] = defaultdict(set)
    for column in ("subject", "image", "sha256"):
        for value, split in zip(previous[column], previous["split"], strict=True):
            sides[column, str(value)].add("train" if split == "unused" else split)
    known: dict[str, str] = {}
    for sample in samples:
        keys = (("subject", sample.subject), ("image", sample.pair.image), ("sha256", sample.sha256))
        earlier = {known[sample.subject]} if sample.subject in known else set()
        earlier.update(*(sides.get(key, set()) for key in keys))
        if len(earlier) > 1:
            raise DataError(
                f"site {site}: subject {sample.subject} ({sample.pair.image}) was in {' and '.join(sorted(earlier))} "
                "before its images were regrouped; undo that, or delete the site's stored manifest to draw anew"
            )
        if earlier:
            known[sample.subject] = earlier.pop()
    return draw_split(
        site,
        subjects,
        split_targets(site, len(samples), config.split),
        seed=seed,
        max_train=config.split.max_train,
        known=known,
        known_images=images,
    )


def _shortfalls(site: str, config: PreprocessingConfig, splits: Mapping[str, str]) -> list[str]:
    counts = Counter(splits.values())
    wanted = {"validation": config.split.validation, "test": config.split.test, **config.split.overrides.get(site, {})}
    return [
        f"split: {value:g} {split} images were asked for, {counts[split]} could be had"
        for split, value in wanted.items()
        if value >= 1 and counts[split] != value
    ]


def _absent_classes(config: PreprocessingConfig, samples: Sequence[Sample], splits: Mapping[str, str]) -> list[str]:
    if config.classes == 1:
        return []
    there = {label for sample in samples for label in sample.classes}
    known = {
        label for sample in samples for label in sample.classes if splits[sample.pair.image] in ("train", "validation")
    }
    warnings = []
    for label, name in enumerate(config.names, start=1):
        if label not in there:
            warnings.append(f"{name}: in no mask, so it is neither trained nor scored here")
        elif label not in known:
            warnings.append(f"{name}: in no mask of training and validation, so it is scored here, but never predicted")
    return warnings


def _manifest(site: str, samples: Sequence[Sample], settled: Settled) -> pd.DataFrame:
    kept = [(sample, plane) for sample in samples for plane in settled.planes[sample.pair.image]]
    rows = [
        {
            "site": site,
            "subject": sample.subject,
            "image": sample.pair.image,
            "mask": sample.pair.mask,
            "split": settled.splits[sample.pair.image],
            "label_map": json.dumps(sample.label_map),
            "classes": json.dumps(sample.planes[plane]),
            "sha256": sample.sha256,
            "mask_sha256": sample.mask_sha256,
            "height": sample.fitted[0],
            "width": sample.fitted[1],
            "original_height": sample.original[0],
            "original_width": sample.original[1],
            "volume": sample.pair.stem if sample.is_volume else "",
            "slice": plane if sample.is_volume else -1,
            "row": row,
            "split_settings": settled.settings,
        }
        for row, (sample, plane) in enumerate(kept)
    ]
    # Typed column by column: the whole frame at once takes several times as long.
    return pd.DataFrame({name: pd.array([row[name] for row in rows], dtype) for name, dtype in MANIFEST_DTYPES.items()})


def _summary(samples: Sequence[Sample], classes: int) -> dict[str, Any]:
    if not samples:
        return dict.fromkeys(("sizes", "intensity", "class_shares"))
    heights, widths = zip(*(sample.original for sample in samples), strict=True)
    lows, highs = zip(*(sample.intensity for sample in samples), strict=True)
    pixels = np.sum([sample.class_pixels for sample in samples], axis=0)
    return {
        "sizes": {"height": [min(heights), max(heights)], "width": [min(widths), max(widths)]},
        "intensity": {"range": [min(lows), max(highs)], "kinds": dict(Counter(sample.kind for sample in samples))},
        "class_shares": {str(label): float(pixels[label] / pixels.sum()) for label in range(classes + 1)},
    }


def _volumes(samples: Sequence[Sample], settled: Settled) -> dict[str, Any]:
    """Return what there is to say of volumes only; nothing where there is none."""
    volumes = [sample for sample in samples if sample.is_volume]
    if not volumes:
        return {}
    slices: Counter[str] = Counter()
    for sample in volumes:
        kept = settled.planes[sample.pair.image]
        slices[settled.splits.get(sample.pair.image, "unused")] += len(kept)
        slices["left_out"] += len(sample.planes) - len(kept)
    spacing = np.array([sample.spacing for sample in volumes])
    return {
        "volumes": {
            "count": len(volumes),
            "slices": {key: slices[key] for key in (*SPLITS, "unused", "left_out")},
            "empty_slices": sum(sample.planes.count(()) for sample in volumes),
            "spacing_mm": {
                name: [float(column.min()), float(column.max())]
                for name, column in zip(("slice", "row", "column"), spacing.T, strict=True)
            },
        }
    }
