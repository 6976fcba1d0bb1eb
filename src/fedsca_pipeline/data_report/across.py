"""Compare sites by their facts: near duplicates, shared subjects, and which sites can train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from fedsca_pipeline.data_report.hashes import near_duplicates
from fedsca_pipeline.data_report.inspection import across_splits


def across_sites(facts: Sequence[Mapping[str, Any]], threshold: int, passed_over: Sequence[str]) -> dict[str, Any]:
    """Return the comparison of the sites by their facts; it needs no pixels.

    Args:
        facts: ``Inspection.facts`` of each site.
        threshold: two images are near duplicates if their hashes differ in at most this many bits.
        passed_over: folders beside the sites that contain neither ``images/`` nor ``masks/``.

    Returns:
        JSON-able: ``refused`` (site names), ``sites`` (``counts``, ``refusals``, ``alerts`` and numbers of findings),
        ``near_duplicates`` and ``shared_subjects`` between sites, ``passed_over``.
    """
    return {
        "refused": [site["site"] for site in facts if site["refusals"]],
        "sites": {site["site"]: _summary(site) for site in facts},
        "near_duplicates": _near_duplicates(facts, threshold),
        "shared_subjects": _shared_subjects(facts),
        "passed_over": list(passed_over),
    }


def overview(facts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per site: whether it can train, counts, raw sizes and intensities, share of foreground."""
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
    """Return mm between slices (of volumes), rows and columns, as text; empty if unknown."""
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
        "alerts": site["alerts"],
        "near_duplicates": len(site["near_duplicates"]),
        "near_duplicates_across_splits": sum(group["across_splits"] for group in site["near_duplicates"]),
        "torn_subjects": len(site["torn_subjects"]),
        "grouped_names": site["grouped_names"] is not None,
    }


def _near_duplicates(facts: Sequence[Mapping[str, Any]], threshold: int) -> list[dict[str, Any]]:
    images = [
        {"site": site["site"], **image} for site in facts for image in site["images"] if image["hash"] is not None
    ]
    # Each site is one owner: duplicates within a site are already in its facts.
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
    """Return the number of common names for every two sites that name their subjects."""
    subjects = {
        site["site"]: {image["subject"] for image in site["images"]} for site in facts if site["subjects_named"]
    }
    return [
        {"sites": [one, other], "shared": len(both), "subjects": [len(subjects[one]), len(subjects[other])]}
        for one, other in combinations(subjects, 2)
        if (both := subjects[one] & subjects[other])
    ]
