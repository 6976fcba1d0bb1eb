"""The pages of the data report: self-contained HTML files without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsca_pipeline.data.preprocessing.split import SPLITS
from fedsca_pipeline.data_report.across import spacing
from fedsca_pipeline.data_report.figures import histogram, site_map
from fedsca_pipeline.data_report.inspection import Inspection, Picture
from fedsca_pipeline.data_report.thumbnails import data_uri, outlined
from fedsca_pipeline.evaluation.figures import CLASS_COLOURS

# Most entries of a list on a page; the JSON beside the page has all of them.
_MOST_LISTED, _FEWER_LISTED = 200, 10
# Two sites differ if p is at most this.
_LEVEL = 0.05
# Share of the accent colour in a matrix's darkest cell, per cent; text stays legible on it.
_DARKEST = 45
_DRAWN = {
    "new": "Drawn from the seed; preprocessing draws the same.",
    "kept": "As in the stored manifest.",
    "anew": "Drawn again: the stored manifest has another seed, split setting or group rule.",
}


@dataclass(frozen=True)
class Distances:
    """Distances between sites, from ``distance.py``.

    Attributes:
        pairs: the distance of every two sites, or of every two in a sample of many.
        points: [n, 2] by site, the images on the plane.
        explained: share of variance that the plane shows.
        images: most images embedded per site.
        missing: why there are no distances; "" if there are.
    """

    pairs: Sequence[Mapping[str, Any]]
    points: Mapping[str, np.ndarray]
    explained: float
    images: int
    missing: str = ""


@dataclass(frozen=True)
class _Shown:
    picture: Picture
    uri: str


def render_site(inspection: Inspection, across: Mapping[str, Any]) -> str:
    """Return the page of one site, images included; ``across`` is the result of ``across_sites``."""
    site = inspection.facts
    groups = [
        {
            **group,
            "shown": [
                _shown(inspection.duplicates[image["image"]])
                for image in group["images"]
                if image["image"] in inspection.duplicates
            ],
        }
        for group in site["near_duplicates"]
    ]
    return (
        _environment()
        .get_template("site.html")
        .render(
            site=site,
            classes=_classes(site),
            groups=[group for group in groups if group["shown"]],
            leaks=sum(group["across_splits"] for group in groups),
            elsewhere=[
                group
                for group in across["near_duplicates"]
                if site["site"] in {image["site"] for image in group["images"]}
            ],
            pictures=[_shown(picture) for picture in inspection.pictures],
            histogram=histogram(site["intensity_values"]) if site["intensity_values"] else None,
            drawn=_DRAWN,
            most_listed=_MOST_LISTED,
        )
    )


def render_index(facts: Sequence[Mapping[str, Any]], across: Mapping[str, Any], distances: Distances) -> str:
    """Return the page across sites, which has no images."""
    return (
        _environment()
        .get_template("index.html")
        .render(
            sites=facts,
            across=across,
            findings=[finding for site in facts for finding in _findings(site)],
            matrix=_matrix(distances.pairs),
            map=site_map(distances.points) if distances.points else None,
            explained=distances.explained,
            embedded_images=distances.images,
            embedded_sites=len(distances.points),
            no_matrix=distances.missing,
            most_listed=_MOST_LISTED,
            fewer_listed=_FEWER_LISTED,
        )
    )


def _environment() -> Environment:
    # File names and notes are untrusted, so all text is escaped. An undefined variable is an error.
    environment = Environment(
        loader=PackageLoader("fedsca_pipeline.data_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "general": "{:.6g}".format, "spacing": spacing}
    environment.globals["splits"] = (*SPLITS, "unused")
    return environment


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def _shown(picture: Picture) -> _Shown:
    return _Shown(picture, data_uri(outlined(picture)))


def _classes(site: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return background and classes with their colours, shares of pixels and numbers of images; [] without images."""
    if site["class_shares"] is None:
        return []
    shares = list(site["class_shares"].values())
    used = site["counts"]["used"]
    background = {"name": "background", "colour": None, "share": shares[0], "images": used}
    return [
        background,
        *(
            {"name": name, "colour": colour, "share": share, "images": images}
            for name, colour, share, images in zip(
                site["class_names"], cycle(CLASS_COLOURS), shares[1:], site["class_images"], strict=False
            )
        ),
    ]


def _findings(site: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return findings that do not stop a site from training, but may spoil its results."""
    leaks = sum(group["across_splits"] for group in site["near_duplicates"])
    findings = {
        "alerts": "; ".join(site["alerts"]),
        "duplicates": f"near duplicates in two splits ({leaks})" if leaks else "",
        "subjects": f"subjects in two splits of the stored manifest ({len(site['torn_subjects'])})"
        if site["torn_subjects"]
        else "",
        "names": "file names suggest several images per patient, and site.yml has no rule"
        if site["grouped_names"]
        else "",
        "warnings": f"warnings ({len(site['warnings'])})" if site["warnings"] else "",
    }
    return [
        {"page": f"{site['site']}.html#{section}", "where": site["site"], "what": what}
        for section, what in findings.items()
        if what
    ]


def _matrix(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the pairs as a table of rows of cells, with None on the diagonal; None without pairs."""
    if not pairs:
        return None
    sites = list(dict.fromkeys(site for pair in pairs for site in pair["sites"]))
    farthest = max(max(pair["distance"] for pair in pairs), 1.0)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for pair in pairs:
        one, other = pair["sites"]
        cells[one, other] = cells[other, one] = {
            "distance": pair["distance"],
            "p": pair["p"],
            "alike": pair["p"] > _LEVEL,
            "shade": round(_DARKEST * max(0.0, pair["distance"]) / farthest),
        }
    return {
        "sites": sites,
        "rows": [{"site": site, "cells": [cells.get((site, other)) for other in sites]} for site in sites],
    }
