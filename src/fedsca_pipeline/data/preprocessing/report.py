"""A site's preprocessing report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.preprocessing.samples import Sample
from fedsca_pipeline.data.preprocessing.selection import Selection, _is_empty, _split_settings
from fedsca_pipeline.data.preprocessing.split import SPLITS
from fedsca_pipeline.data.site_folder.discovery import fingerprint_site
from fedsca_pipeline.data.site_folder.pairing import Broken
from fedsca_pipeline.data.site_folder.site_file import SiteFile
from fedsca_pipeline.files import fingerprint


def site_report(
    raw: Path,
    site: str,
    found: int,
    samples: Sequence[Sample],
    broken: Sequence[Broken],
    selection: Selection,
    site_file: SiteFile,
    config: PreprocessingConfig,
    seed: int,
) -> dict[str, Any]:
    """Return the JSON-able report (docs/data.md) of the samples that are used; there may be none.

    ``hashed_names`` says whether names and subjects are salted hashes, which an import wrote.
    """
    splits = list(selection.splits.values())
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
        **_volumes(samples, selection),
        "split": {
            **_split_settings(site, config, seed, site_file),
            "settings": selection.settings,
            "drawn": selection.drawn,
            "fingerprint": fingerprint(sorted(selection.splits.items())),
        },
        "spacing": list(site_file.spacing) if site_file.spacing else None,
        "notes": site_file.notes,
        "hashed_names": site_file.hashed_names,
        "broken": [entry.as_dict() for entry in broken],
        "warnings": selection.warnings,
        "alerts": selection.alerts,
    }


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


def _volumes(samples: Sequence[Sample], selection: Selection) -> dict[str, Any]:
    """Return the facts about volumes; empty without volumes."""
    volumes = [sample for sample in samples if sample.is_volume]
    if not volumes:
        return {}
    slices: Counter[str] = Counter()
    for sample in volumes:
        kept = selection.planes[sample.pair.image]
        slices[selection.splits.get(sample.pair.image, "unused")] += len(kept)
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
