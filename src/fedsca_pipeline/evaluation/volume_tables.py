"""Tables of volume scores: per volume, per site, and the final table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsca_pipeline.evaluation import ALL_CLASSES, MEAN, WORST
from fedsca_pipeline.evaluation.tables import site_means, table_of_means

VOLUME_METRICS = ("dice", "hd95_mm", "asd_mm", "nsd")
VOLUME_COLUMNS = ("site", "volume", "model", "class", *VOLUME_METRICS, "empty")

# Column of the final table by metric; MLflow logs under these names.
_HEADINGS = {"dice": "volume Dice", "hd95_mm": "volume HD95 mm", "asd_mm": "volume ASD mm", "nsd": "volume NSD"}


def volume_table(site: str, model: str, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Return one row per volume and class.

    Args:
        site: the site's name.
        model: ``before``, ``after`` or ``chosen``, as in ``tables.image_table``.
        scores: records of ``metrics.volumes.score_volume`` by volume.

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
    """Return one row per model and site, then the mean over sites and the worst site: ``tables.site_table`` of volumes.

    Args:
        volumes: rows of ``volume_table``, any number of sites and models.
        names: names of all K classes, class 1 first.

    Returns:
        As ``tables.site_table``, with ``VOLUME_METRICS``, and ``volumes`` instead of ``images``.
    """
    return volume_table_of_means(site_volume_means(volumes, names), names)


def site_volume_means(volumes: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return ``tables.site_means`` of volumes, one row per model, site and class; ``volumes`` replaces ``images``."""
    table = site_means(volumes.rename(columns={"volume": "image"}), names, VOLUME_METRICS)
    return table.rename(columns={"images": "volumes"})


def volume_table_of_means(means: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return the table of ``site_volume_table`` from the rows of ``site_volume_means``."""
    table = table_of_means(means.rename(columns={"volumes": "images"}), names, VOLUME_METRICS)
    return table.rename(columns={"images": "volumes"})


def final_volume_table(sites: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen models' scores by volume, over all classes: one row per site, sorted by name, then the mean.

    Args:
        sites: table of ``site_volume_table``.

    Returns:
        Columns ``site``, ``volume Dice``, ``volume HD95 mm``, ``volume ASD mm``, ``volume NSD``, and ``volumes``, their
        number. Scores are missing for a site without a chosen model, and then in the mean too. No site: no row.
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
