"""Select the samples of a site that are used, and their splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.data.preprocessing.samples import Sample
from fedsca_pipeline.data.preprocessing.slices import choose_slices
from fedsca_pipeline.data.preprocessing.split import draw_split, split_targets
from fedsca_pipeline.data.readers.common import split_name
from fedsca_pipeline.data.site_folder.pairing import Broken, by_fault, list_faults
from fedsca_pipeline.data.site_folder.site_file import SiteFile
from fedsca_pipeline.errors import DataError, counted
from fedsca_pipeline.files import fingerprint


@dataclass(frozen=True)
class Selection:
    """The samples that are used, their splits, and the reasons why the site cannot train.

    ``rows`` are the samples to use, in order. ``splits`` is by image path, empty if no split can be drawn. ``planes``,
    by image path, are the slices that stay in the arrays: a training volume drops some empty slices. ``settings`` is
    the fingerprint of the split settings; ``drawn`` is new, kept or anew. ``alerts`` are the warnings that the terminal
    shows too, one per kind. ``refusals`` are the reasons, each with its cure, in order of importance.
    """

    rows: list[int]
    splits: dict[str, str]
    planes: dict[str, list[int]]
    settings: str
    drawn: str
    warnings: list[str]
    alerts: list[str]
    refusals: list[str]


def select_samples(
    site: str,
    samples: Sequence[Sample],
    broken: list[Broken],
    site_file: SiteFile,
    config: PreprocessingConfig,
    seed: int,
    previous_manifest: pd.DataFrame | None,
) -> Selection:
    """Return the selection: copies across subjects are dropped and added to ``broken``, and splits are drawn."""
    settings = fingerprint(_split_settings(site, config, seed, site_file))
    previous, drawn, warnings = _previous(previous_manifest, settings)
    warnings += [f"{sample.pair.image}: {text}" for sample in samples for text in sample.warnings + sample.alerts]
    rows, copies = _drop_copies(samples, set(previous["image"]), broken)
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
    alerts = _alerts(kept) + _classes_lost(kept, config)
    return Selection(rows, splits, planes, settings, drawn, warnings, alerts, refusals)


def _alerts(samples: Sequence[Sample]) -> list[str]:
    """Return the samples' alerts, one line per kind, with the first images."""
    alerts = [Broken(sample.pair.image, alert, "") for sample in samples for alert in sample.alerts]
    return [f"{alike.file}: {alike.reason}" for alike in by_fault(alerts)]


def _classes_lost(samples: Sequence[Sample], config: PreprocessingConfig) -> list[str]:
    """Return a line for each class that every image with it loses by resizing, with the size that would keep it."""
    alerts = []
    for label, name in enumerate(config.names, start=1):
        sizes = [sample.lost.get(label, 0) for sample in samples if sample.class_pixels[label]]
        if sizes and 0 not in sizes:
            known = [size for size in sizes if size is not None]
            size = f"preprocessing.image_size={max(known)}" if len(known) == len(sizes) else "no size"
            alerts.append(
                f"{name}: resizing to {config.image_size} pixels loses it in {counted(len(sizes), 'mask')}, all that "
                f"show it, so it is not learned here; {size} keeps it in each"
            )
    return alerts


def _planes_to_keep(
    site: str, sample: Sample, splits: Mapping[str, str], config: PreprocessingConfig, seed: int
) -> list[int]:
    image = sample.pair.image
    if not sample.is_volume or splits.get(image) in ("validation", "test"):
        return list(range(len(sample.planes)))
    return choose_slices([bool(classes) for classes in sample.planes], config.volume.empty_slices, seed, site, image)


def _is_empty(sample: Sample) -> bool:
    return not sample.class_pixels[1:].any()


def _drop_copies(samples: Sequence[Sample], known: set[str], broken: list[Broken]) -> tuple[list[int], list[str]]:
    """Return the rows without copies across subjects, in order, and warnings: no image may be in two splits.

    Of several subjects, the one in the previous manifest is used, else the first.
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
                    "delete one, or give both one subject in site.yml",
                )
            )
        if len(kept) > 1:
            names = ", ".join(samples[row].pair.image for row in kept)
            warnings.append(f"identical images of subject {samples[first].subject}: {names}")
    return [row for row in range(len(samples)) if row not in dropped], warnings


def _unused_subjects(site_file: SiteFile, samples: Sequence[Sample], broken: Sequence[Broken]) -> list[str]:
    there = {sample.pair.stem for sample in samples} | {split_name(Path(entry.file).name)[0] for entry in broken}
    absent = sorted(set(site_file.subjects or {}) - there)
    named = f"site.yml: subjects names {counted(len(absent), 'stem')} without an image: {', '.join(absent[:8])}"
    return [named] if absent else []


def _refusals(site: str, config: PreprocessingConfig, samples: Sequence[Sample], broken: Sequence[Broken]) -> list[str]:
    pages = f"kedro run --pipeline=data_report, then 08_reporting/data_report/{site}.json"
    listing = list_faults(broken, f"{site}/", pages)
    found = []
    if broken and config.on_bad_sample == "fail":
        found.append(
            f"site {site}: {counted(len(broken), 'file')} cannot be used:{listing}\n"
            "Fix them, or set preprocessing.on_bad_sample: quarantine to leave them out."
        )
    if len(samples) < config.min_images:
        found.append(
            f"site {site}: {counted(len(samples), 'usable image')}, preprocessing.min_images is {config.min_images}; "
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
    """Return the columns of a previous manifest if its split stays valid, how the split is drawn, and warnings."""
    nothing: dict[str, list[Any]] = {name: [] for name in MANIFEST_DTYPES}
    if manifest is None or manifest.empty:
        return nothing, "new", []
    if "split_settings" in manifest and (manifest["split_settings"] == settings).all():
        return manifest.to_dict("list"), "kept", []
    return nothing, "anew", ["the seed, split settings or group rule changed: validation and test were drawn again"]


def _draw(
    site: str, samples: Sequence[Sample], config: PreprocessingConfig, seed: int, previous: Mapping[str, list[Any]]
) -> dict[str, str]:
    """Return the split by image path; subject, path or content identify an image of the previous manifest."""
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
                "before its images were regrouped; undo that, or delete the site's stored manifest to draw a new split"
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
        f"split: {counted(int(value), f'{split} image')} requested, {counts[split]} available"
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
