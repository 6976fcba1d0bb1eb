"""What the sites' facts say together: near duplicates, shared subjects, and who can train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from fedsca_pipeline.data_report.hashes import near_duplicates
from fedsca_pipeline.data_report.inspection import across_splits


def across_sites(facts: Sequence[Mapping[str, Any]], threshold: int, passed_over: Sequence[str]) -> dict[str, Any]:
    """Compare sites by what they tell of themselves (``Inspection.facts``), without a pixel.

    Args:
        facts: of each site.
        threshold: bits between hashes up to which two images are near duplicates.
        passed_over: folders beside the sites that hold neither ``images/`` nor ``masks/``.

    Returns:
        JSON-able: ``refused`` (site names), ``sites`` (of each its ``counts``, ``refusals``, and numbers of findings),
        ``near_duplicates`` and ``shared_subjects`` of two and more sites, ``passed_over``.
    """
    return {
        "refused": [site["site"] for site in facts if site["refusals"]],
        "sites": {site["site"]: _summary(site) for site in facts},
        "near_duplicates": _near_duplicates(facts, threshold),
        "shared_subjects": _shared_subjects(facts),
        "passed_over": list(passed_over),
    }


def overview(facts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a site: whether it trains, counts, raw sizes and intensities, share of foreground."""
    return pd.DataFrame(
        [
            {
                "site": site["site"],
                "trains": "no" if site["refusals"] else "yes",
                **{key: site["counts"][key] for key in ("used", "broken", "subjects", "train", "validation", "test")},
                "empty_masks": site["empty_masks"],
                "near_duplicates": len(site["near_duplicates"]),
                "rows": _between(site["sizes"] and site["sizes"]["height"]),
                "columns": _between(site["sizes"] and site["sizes"]["width"]),
                "spacing_mm": " x ".join(spacing(site)),
                "raw_intensities": _between(site["intensity"] and site["intensity"]["range"]),
                "kinds": ", ".join(site["intensity"]["kinds"]) if site["intensity"] else "",
                "foreground": 1 - site["class_shares"]["0"] if site["class_shares"] else None,
            }
            for site in facts
        ]
    )


def spacing(site: Mapping[str, Any]) -> list[str]:
    """Return mm from slice to slice (of volumes), row to row, column to column, as text; empty where nothing says."""
    if "volumes" in site:
        return [_between(range_) for range_ in site["volumes"]["spacing_mm"].values()]
    return [f"{value:g}" for value in site["spacing"] or ()]


def _between(range_: Sequence[float] | None) -> str:
    if range_ is None:
        return ""
    low, high = range_
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _summary(site: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "counts": site["counts"],
        "refusals": site["refusals"],
        "warnings": len(site["warnings"]),
        "near_duplicates": len(site["near_duplicates"]),
        "near_duplicates_across_splits": sum(group["across_splits"] for group in site["near_duplicates"]),
        "torn_subjects": len(site["torn_subjects"]),
        "grouped_names": site["grouped_names"] is not None,
    }


def _near_duplicates(facts: Sequence[Mapping[str, Any]], threshold: int) -> list[dict[str, Any]]:
    images = [
        {"site": site["site"], **image} for site in facts for image in site["images"] if image["hash"] is not None
    ]
    # A site is one owner here: what is alike within it, its own facts tell.
    groups = near_duplicates([image["hash"] for image in images], [image["site"] for image in images], threshold)
    found = []
    for group in groups:
        members = [{key: images[row][key] for key in ("site", "image", "split")} for row in group.members]
        found.append(
            {
                "bits": group.distance,
                "across_splits": across_splits([member["split"] for member in members]),
                "images": members,
            }
        )
    return sorted(found, key=lambda group: not group["across_splits"])


def _shared_subjects(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Count, for each two sites that name their subjects, the names that both have."""
    subjects = {
        site["site"]: {image["subject"] for image in site["images"]} for site in facts if site["subjects_named"]
    }
    return [
        {"sites": [one, other], "shared": len(both), "subjects": [len(subjects[one]), len(subjects[other])]}
        for one, other in combinations(subjects, 2)
        if (both := subjects[one] & subjects[other])
    ]
