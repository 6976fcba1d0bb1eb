"""From scores of volumes to tables: per volume, per site, and what a run tells of each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsca_pipeline.evaluation import ALL_CLASSES, MEAN, WORST
from fedsca_pipeline.evaluation.tables import site_means, table_of_means

VOLUME_METRICS = ("dice", "hd95_mm", "asd_mm", "nsd")
VOLUME_COLUMNS = ("site", "volume", "model", "class", *VOLUME_METRICS, "empty")

# By metric, as MLflow takes it.
_HEADINGS = {"dice": "volume Dice", "hd95_mm": "volume HD95 mm", "asd_mm": "volume ASD mm", "nsd": "volume NSD"}


def volume_table(site: str, model: str, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """One row per volume and class.

    Args:
        site: its name.
        model: ``before``, ``after`` or ``chosen``, as in ``tables.image_table``.
        scores: by volume the records of ``volumes.score_volume``.

    Returns:
        Columns ``VOLUME_COLUMNS``; distances in mm. No volume: no row.
    """
    rows = [
        {"site": site, "volume": volume, "model": model, **record}
        for volume, records in scores.items()
        for record in records
    ]
    return pd.DataFrame(rows, columns=list(VOLUME_COLUMNS))


def site_volume_table(volumes: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row per model and site, their mean and the worst site: ``tables.site_table`` of volumes.

    Args:
        volumes: rows of ``volume_table``, any number of sites and models.
        names: of all K classes, class 1 first.

    Returns:
        As ``tables.site_table``, of ``VOLUME_METRICS``, with ``volumes`` for ``images``.
    """
    return volume_table_of_means(site_volume_means(volumes, names), names)


def site_volume_means(volumes: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row per model, site and class: ``tables.site_means`` of volumes, with ``volumes`` for ``images``."""
    table = site_means(volumes.rename(columns={"volume": "image"}), names, VOLUME_METRICS)
    return table.rename(columns={"images": "volumes"})


def volume_table_of_means(means: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return the table that ``site_volume_table`` makes of volumes, from rows of ``site_volume_means`` alone."""
    table = table_of_means(means.rename(columns={"volumes": "images"}), names, VOLUME_METRICS)
    return table.rename(columns={"images": "volumes"})


def final_volume_table(sites: pd.DataFrame) -> pd.DataFrame:
    """What the chosen models are worth by volume: a row a site, sorted by name, and their mean, over all classes.

    Args:
        sites: of ``site_volume_table``.

    Returns:
        Columns site, ``volume Dice``, ``volume HD95 mm``, ``volume ASD mm``, ``volume NSD``, missing for a site without
        a chosen model, and in the mean then too; ``volumes``, how many. No site: no row.
    """
    rows = sites[~sites["site"].isin([MEAN, WORST])]
    rows = rows if "class" not in sites else rows[rows["class"] == ALL_CLASSES]
    counts = rows.groupby("site")["volumes"].max()
    chosen = rows[rows["model"] == "chosen"].set_index("site")[list(_HEADINGS)].rename(columns=_HEADINGS)
    table = chosen.astype(float).reindex(counts.index)
    if not table.empty:
        table.loc[MEAN] = table.mean(skipna=False)
        counts[MEAN] = counts.sum()
    return table.assign(volumes=counts.astype("int64")).rename_axis(index="site").reset_index()
