"""Tables of image scores: per image, per site, and the final table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsca_pipeline.errors import counted
from fedsca_pipeline.evaluation import ALL_CLASSES, CLASS_DICE, MEAN, WORST

METRICS = ("dice", "iou", "hd95", "asd")
MODELS = ("before", "after", "chosen")

IMAGE_COLUMNS = ("site", "image", "model", "class", *METRICS, "empty")


def _site_columns(metrics: Sequence[str]) -> tuple[str, ...]:
    averages = (column for metric in metrics for column in (metric, f"{metric}_std"))
    return ("site", "model", *averages, "images", "one_empty", "note")


SITE_COLUMNS = _site_columns(METRICS)


def image_table(site: str, names: Sequence[str], scores: Sequence[Mapping[str, Any]], model: str) -> pd.DataFrame:
    """Return one row per image and class.

    Args:
        site: the site's name.
        names: names of the B images.
        scores: B * K records of ``metrics.images.score_images``, image by image.
        model: ``before`` (the foundation, round 0), ``after`` (the last round) or ``chosen`` (by validation).

    Returns:
        Columns ``IMAGE_COLUMNS``; distances in pixels of the working resolution. No image: no row.

    Raises:
        ValueError: the number of scores is not a multiple of the number of images.
    """
    classes = len(scores) // max(len(names), 1)
    if classes * len(names) != len(scores):
        raise ValueError(f"site {site}: {len(scores)} scores do not divide over {len(names)} images")
    owners = [name for name in names for _ in range(classes)]
    rows = [{"site": site, "image": name, "model": model, **score} for name, score in zip(owners, scores, strict=True)]
    return pd.DataFrame(rows, columns=list(IMAGE_COLUMNS))


def site_table(
    images: pd.DataFrame, names: Sequence[str] = ("class 1",), metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Return one row per model and site, then the mean over sites and the worst site of each model.

    Every metric is averaged over the classes of an image, then over the images of the site. ``<metric>_std`` is the
    standard deviation over these images (population, so 0 for one image). ``images`` counts images, ``one_empty``
    counts pairs of image and class with exactly one empty mask. Row ``mean over sites`` is the unweighted mean of the
    sites' rows, with the standard deviation over sites and the sums of the counts. Row ``worst site`` repeats the row
    of the lowest Dice (the first name at a tie); ``note`` names the site.

    With several classes, these rows have class ``ALL_CLASSES`` and average over the classes that a site has. The same
    rows follow for each class, over the sites that have it; ``note`` names missing classes and sites.

    Args:
        images: rows of ``image_table``, any number of sites and models.
        names: names of all K classes, class 1 first.
        metrics: columns to average, ``dice`` among them.

    Returns:
        Columns ``SITE_COLUMNS`` for these metrics, with ``class`` after ``model`` if K > 1; models in the order before,
        after, chosen. No image: no row.
    """
    return table_of_means(site_means(images, names, metrics), names, metrics)


def site_means(
    images: pd.DataFrame, names: Sequence[str] = ("class 1",), metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Return one row per model, site and label: the numbers of ``site_table`` before it summarises the sites.

    A site's rows depend on its own images only, so each site can compute its rows locally.

    Args:
        images: rows of ``image_table``, any number of sites and models.
        names: names of all K classes, class 1 first.
        metrics: columns to average, ``dice`` among them.

    Returns:
        Columns site, model, label (0: over the classes that a site has; if K > 1 also 1..K), means and standard
        deviations, images and one_empty. No image: no row.
    """
    labels = range(len(names) + 1) if len(names) > 1 else (0,)
    parts = [
        (model, label, part)
        for model in _in_order(images["model"])
        for label in labels
        for part in [images[(images["model"] == model) & ((images["class"] == label) | (label == 0))]]
    ]
    blocks = [_means(part, list(metrics)).assign(model=model, label=label) for model, label, part in parts if len(part)]
    table = pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame()
    return table.reindex(columns=["site", "model", "label", *_site_columns(metrics)[2:-1]])


def table_of_means(
    means: pd.DataFrame, names: Sequence[str] = ("class 1",), metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Return the table of ``site_table`` from the rows of ``site_means``."""
    columns = _site_columns(metrics)
    if len(names) > 1:
        columns = (*columns[:2], "class", *columns[2:])
    blocks = [
        block
        for model in _in_order(means["model"])
        for block in _model_blocks(means[means["model"] == model], names, list(metrics))
    ]
    table = pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame()
    return table.reindex(columns=list(columns))


def final_table(sites: pd.DataFrame, traffic: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return the final table of a run: one row per site, sorted by name, then the mean over sites.

    Args:
        sites: table of ``site_table``.
        traffic: by site ``bytes_up`` and ``bytes_down``, serialised bytes summed over the rounds, ``best_round``, the
            round that validation chose, and with differential privacy ``epsilon`` and ``privacy``, its level. A site
            that is missing sent nothing and has no best round.

    Returns:
        Columns site, Dice before, Dice after, Dice chosen, with several classes ``CLASS_DICE`` of each, HD95 (of the
        chosen model, pixels), bytes up, bytes down (int), best round (nullable int, missing in the mean row), and
        epsilon and privacy (missing in the mean row) if any site has them. Metrics of a model that was not evaluated
        are missing, as is the Dice of a class that a site does not have. The last row is ``mean over sites``; a class
        is averaged over the sites that have it. No site: no row.
    """
    every_class = sites[~sites["site"].isin([MEAN, WORST])]
    real = every_class if "class" not in sites else every_class[every_class["class"] == ALL_CLASSES]
    dice = real.pivot_table(index="site", columns="model", values="dice").reindex(columns=list(MODELS))
    hd95 = real[real["model"] == "chosen"].set_index("site")["hd95"]
    table = pd.DataFrame({f"Dice {model}": dice[model] for model in MODELS}).sort_index()
    by_class = _class_dice(every_class)
    table = table.join(by_class)
    table["HD95"] = hd95.reindex(table.index)
    for direction in ("up", "down"):
        table[f"bytes {direction}"] = [
            float(traffic.get(site, {}).get(f"bytes_{direction}", 0)) for site in table.index
        ]
    if not table.empty:
        # A mean without one of the sites would not be the mean over sites: it is missing too.
        table.loc[MEAN] = table.mean(skipna=False)
        table.loc[MEAN, by_class.columns] = _class_means(every_class, by_class)
    table = table.round(dict.fromkeys(_BYTES, 0)).astype(dict.fromkeys(_BYTES, "int64"))
    table["best round"] = pd.array([traffic.get(site, {}).get("best_round") for site in table.index], dtype="Int64")
    if any("epsilon" in entry for entry in traffic.values()):
        for column in ("epsilon", "privacy"):
            table[column] = [traffic.get(site, {}).get(column) for site in table.index]
    return table.rename_axis(index="site").reset_index()


_BYTES = ("bytes up", "bytes down")


def _class_dice(sites: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen model's Dice by site, one column per class; no column if there is only one class."""
    if "class" not in sites:
        return pd.DataFrame(index=pd.Index(sites["site"].unique(), name="site"))
    rows = sites[sites["class"] != ALL_CLASSES]
    names = list(dict.fromkeys(rows["class"]))
    chosen = rows[rows["model"] == "chosen"].pivot_table(index="site", columns="class", values="dice")
    return chosen.reindex(columns=names).rename(columns=CLASS_DICE.format)


def _class_means(sites: pd.DataFrame, by_class: pd.DataFrame) -> pd.Series:
    """Return the mean of each class over the sites that have it; missing if one of these has no chosen model."""
    return pd.Series(
        {
            column: by_class[column].reindex(owners["site"].unique()).mean(skipna=False)
            for column in by_class
            for owners in [sites[sites["class"].map(CLASS_DICE.format) == column]]
        },
        dtype=float,
    )


def _in_order(models: pd.Series) -> list[str]:
    """Return the different models: before, after, chosen, then others by name."""
    found = set(models)
    return [*(model for model in MODELS if model in found), *sorted(found - set(MODELS))]


def _means(images: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Return one row per site, by name, for the images of one model."""
    per_image = images.groupby(["site", "image"])[metrics].mean()
    means, spreads = per_image.groupby("site").mean(), per_image.groupby("site").std(ddof=0)
    one_empty = images["empty"].isin(["truth", "prediction"]).groupby(images["site"]).sum()
    rows = means.join(spreads.add_suffix("_std"))
    rows["images"], rows["one_empty"] = per_image.groupby("site").size(), one_empty
    return rows.reset_index()


def _model_blocks(means: pd.DataFrame, names: Sequence[str], metrics: list[str]) -> list[pd.DataFrame]:
    """Return the rows of one model over all classes, then, with several classes, for each that any site has."""
    block = _site_block(means[means["label"] == 0], metrics)
    if len(names) == 1:
        return [block]
    numbers = means.groupby("site")["label"].unique()
    lacking = {
        site: [name for label, name in enumerate(names, start=1) if label not in numbers[site]]
        for site in numbers.index
    }
    notes = {site: f"without {', '.join(missing)}" for site, missing in lacking.items() if missing}
    block["note"] = block["site"].map(notes).fillna(block["note"])
    blocks = [block.assign(**{"class": ALL_CLASSES})]
    for label, name in enumerate(names, start=1):
        if label not in set(means["label"]):
            continue
        block = _site_block(means[means["label"] == label], metrics)
        if absent := [site for site in numbers.index if name in lacking[site]]:
            averaged = f"{len(numbers) - len(absent)} of {counted(len(numbers), 'site')}"
            block.loc[block["site"] == MEAN, "note"] = f"unweighted, over {averaged}: not at {', '.join(absent)}"
        blocks.append(block.assign(**{"class": name}))
    return blocks


def _site_block(means: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Return the rows of one model and class: its sites by name, their mean, the worst."""
    sites = means.drop(columns="label").sort_values("site", ignore_index=True).assign(note="")
    worst = sites.loc[[sites["dice"].idxmin()]]
    summary = [
        _mean_row(sites, metrics),
        worst.assign(site=WORST, note=f"lowest Dice: {worst['site'].item()}"),
    ]
    return pd.concat([sites, *summary], ignore_index=True).assign(model=means["model"].iloc[0])


def _mean_row(sites: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    means = sites[metrics]
    values = {**means.mean(), **means.std(ddof=0).add_suffix("_std")}
    counts = {"images": sites["images"].sum(), "one_empty": sites["one_empty"].sum()}
    note = f"unweighted, over {counted(len(sites), 'site')}"
    return pd.DataFrame([{"site": MEAN, **values, **counts, "note": note}])
