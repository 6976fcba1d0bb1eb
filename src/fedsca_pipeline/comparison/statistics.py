"""Statistics of the difference between methods: bootstrap intervals, paired tests, the Pareto front.

``scores`` below is a frame with one row per method, seed, site and image and the columns ``SCORE_COLUMNS``: ``dice`` in
0..1, ``hd95`` in pixels of the working resolution. The order of its rows does not matter. All functions are pure; their
``seed`` determines all random draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

SCORE_COLUMNS = ("method", "seed", "site", "image", "dice", "hd95")
STATISTICS = ("dice", "worst_dice", "dice_sd", "hd95")
TEST_COLUMNS = ("method", "site", "images", "difference", "p", "p_holm")
ALL_SITES = "all sites"
"""Site of the pooled rows of ``paired_tests``."""

_LEVELS = (2.5, 97.5)
# Largest number of non-zero differences with an exact null distribution; beyond, it is close to a normal one.
_EXACT = 50


def bootstrap(
    scores: pd.DataFrame, statistics: Sequence[str] = STATISTICS, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return each method's statistics with 95 % percentile intervals of a two-way bootstrap.

    A draw takes seeds with replacement and, within each site, images with replacement: the same images for all drawn
    seeds, since the scores of one image under several seeds are not independent. The statistics of the sites' means
    over seeds and images:

    - ``dice``: mean over sites, each counting once;
    - ``worst_dice``: lowest site;
    - ``dice_sd``: standard deviation over sites (population, so 0 for one site);
    - ``hd95``: mean over sites.

    The sites themselves are not drawn: the intervals are about these sites, not about an unseen one. Three limits:

    - With few seeds the intervals are too narrow: the variance of n drawn seeds is (n - 1) / n of that of new seeds. A
      single seed does not vary at all, so only images do.
    - Methods share images, so methods with overlapping intervals can still differ: use ``paired_tests``.
    - Drawing lowers the minimum over sites and raises their spread: if sites are alike, the intervals of
      ``worst_dice`` and ``dice_sd`` may not contain the value.

    Args:
        scores: see above, any number of methods.
        statistics: names from ``STATISTICS``.
        draws: number of draws, at least 1.
        seed: seed of the draws. All methods start from it, so adding a method changes no other method's interval.

    Returns:
        One row per method, sorted by name: ``method``, then for each statistic ``<name>``, ``<name>_low``,
        ``<name>_high``. A missing ``hd95`` makes the method's three HD95 values missing. Empty in, empty out.

    Raises:
        ValueError: an unknown statistic; ``draws`` below 1; a missing Dice; a method whose seeds do not have the same
            images at a site. The message names method and site.
    """
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown:
        raise ValueError(f"unknown statistics: {', '.join(unknown)}")
    if draws < 1:
        raise ValueError(f"{draws} draws; at least 1 is needed")
    _check(scores)
    records = [
        {"method": method, **_intervals(rows, statistics, draws, np.random.default_rng(seed))}
        for method, rows in scores.groupby("method")
    ]
    columns = [column for name in statistics for column in (name, f"{name}_low", f"{name}_high")]
    return pd.DataFrame(records, columns=["method", *columns])


def mean_interval(values: ArrayLike, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of one number per seed, with a 95 % percentile interval over seeds drawn with replacement.

    Args:
        values: [seeds]. A missing value makes the result missing: the mean of the others would be too good if, say, a
            run never reached its goal.
        draws: number of draws, at least 1.
        seed: seed of the draws.

    Returns:
        Mean, low, high. For one seed all three are its value; without seeds all three are NaN.
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0 or np.isnan(values).any():
        return (np.nan, np.nan, np.nan)
    if (values == values[0]).all():
        # The computed mean could differ from the value by rounding, and show an interval of equal values.
        value = float(values[0])
        return value, value, value
    picks = np.random.default_rng(seed).integers(values.size, size=(draws, values.size))
    low, high = np.percentile(values[picks].mean(axis=1), _LEVELS)
    return float(values.mean()), float(low), float(high)


def image_means(scores: pd.DataFrame) -> pd.DataFrame:
    """Return each image's Dice, averaged over the seeds.

    Returns:
        Sites and images as sorted index (``site``, ``image``), methods as sorted columns; NaN if a method does not have
        the image. Empty in, empty out.

    Raises:
        ValueError: as in ``bootstrap``.
    """
    _check(scores)
    return scores.pivot_table(index=["site", "image"], columns="method", values="dice", aggfunc="mean")


def paired_tests(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return Wilcoxon's signed-rank test of each method against the reference, per site and over all sites.

    The pairs are the images that both methods have; Dice is averaged over seeds first, so that one image counts once.
    Zero differences (for example, two empty masks) are ranked with the others and then left out (Pratt): dropping them
    first, as Wilcoxon did, finds differences too easily if most images agree. For up to 50 non-zero differences the
    two-sided p is exact given ranks and zeros, ties included; beyond, it is scipy's normal approximation. Without any
    difference p is 1. With fewer than 6 images p cannot fall below 0.05; it is reported nevertheless.

    Over all sites every image counts once, so large sites weigh more than in the mean over sites. The tests are about
    the images of these sites and the models of these seeds; they do not say what another training would give.

    Args:
        scores: see above.
        reference: the method to compare the others with.

    Returns:
        Columns ``TEST_COLUMNS``, one row per site (``all sites`` first, then by name) and other method (by name): the
        number of compared ``images``, the mean ``difference`` (method - reference), ``p``, and ``p_holm``, Holm's
        correction over the methods of the same site. A method without a common image has no row.

    Raises:
        ValueError: the reference has no row, or as in ``bootstrap``.
    """
    dice = image_means(scores)
    if dice.empty:
        return pd.DataFrame(columns=list(TEST_COLUMNS))
    if reference not in dice.columns:
        raise ValueError(f"the reference {reference} is not among the methods {', '.join(dice.columns)}")
    families = {ALL_SITES: dice, **dict(iter(dice.groupby(level="site")))}
    tables = [_family(site, family, reference) for site, family in families.items()]
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def pareto_front(sent: ArrayLike, dice: ArrayLike) -> NDArray[np.bool_]:
    """Return which points are on the Pareto front: no other point dominates them.

    A point dominates another if it sends no more, scores no less, and is better in one of the two.

    Args:
        sent: [points], bytes; less is better.
        dice: [points]; more is better.

    Returns:
        bool [points]. Equal points have the same value; a point with a missing number is not on the front.
    """
    sent, dice = np.asarray(sent, dtype=float), np.asarray(dice, dtype=float)
    no_worse = (sent[:, None] <= sent) & (dice[:, None] >= dice)
    better = (sent[:, None] < sent) | (dice[:, None] > dice)
    return ~(no_worse & better).any(axis=0) & ~np.isnan(sent) & ~np.isnan(dice)


def _check(scores: pd.DataFrame) -> None:
    if scores["dice"].isna().any():
        method, site = scores[scores["dice"].isna()].iloc[0][["method", "site"]]
        raise ValueError(f"method {method}, site {site}: a Dice is missing")
    seeds = scores.groupby("method")["seed"].nunique()
    images = scores.groupby(["method", "site", "image"])["seed"].agg(["size", "nunique"]).reset_index()
    uneven = images[(images["size"] != images["nunique"]) | (images["nunique"] != images["method"].map(seeds))]
    if len(uneven):
        method, site, image = uneven.iloc[0][["method", "site", "image"]]
        raise ValueError(f"method {method}, site {site}: not every seed has image {image} exactly once")


def _intervals(
    rows: pd.DataFrame, statistics: Sequence[str], draws: int, generator: np.random.Generator
) -> dict[str, float]:
    """Return value, low and high of one method's statistics."""
    seeds = rows["seed"].nunique()
    picks = generator.integers(seeds, size=(draws, seeds))
    weights = (picks[:, :, None] == np.arange(seeds)).mean(axis=1)
    points, drawn = [], []
    for _, at_site in rows.groupby("site"):
        ordered = at_site.sort_values(["seed", "image"])[["dice", "hd95"]].to_numpy(dtype=float)
        values = ordered.reshape(seeds, -1, 2).transpose(2, 0, 1)
        points.append(values.mean(axis=(1, 2)))
        drawn.append(_draw(values, weights, generator))
    point, sample = _statistics(np.array(points)), _statistics(np.array(drawn))
    record: dict[str, float] = {}
    for name in statistics:
        low, high = np.percentile(sample[name], _LEVELS)
        record |= {name: float(point[name]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return record


def _draw(
    values: NDArray[np.float64], weights: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return one site's means [2, draws] of values [2 metrics, seeds, images] under seed weights [draws, seeds]."""
    images = values.shape[2]
    picks = generator.integers(images, size=(len(weights), images))
    return np.stack([np.take_along_axis(weights @ metric, picks, axis=1).mean(axis=1) for metric in values])


def _statistics(means: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return the statistics [...] of the sites' means of Dice and HD95 [sites, 2, ...]."""
    dice, hd95 = means[:, 0], means[:, 1]
    return {
        "dice": dice.mean(axis=0),
        "worst_dice": dice.min(axis=0),
        "dice_sd": dice.std(axis=0),
        "hd95": hd95.mean(axis=0),
    }


def _family(site: str, dice: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the tests at one site, with Holm's correction over them."""
    # This import takes half a second, and only tests need it.
    from statsmodels.stats.multitest import multipletests

    rows = []
    for method in dice.columns.drop(reference):
        # Rounding errors of the means over seeds must not break ties between ranks.
        differences = (dice[method] - dice[reference]).dropna().round(12).to_numpy()
        if len(differences):
            row = (method, site, len(differences), float(differences.mean()), _signed_rank(differences))
            rows.append((*row, np.nan))
    table = pd.DataFrame(rows, columns=list(TEST_COLUMNS))
    if len(table):
        table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table


def _signed_rank(differences: NDArray[np.float64]) -> float:
    """Return the two-sided p of the signed-rank test with Pratt's treatment of zeros; 1 if all are zero."""
    changed = differences != 0
    if changed.sum() > _EXACT:
        return float(stats.wilcoxon(differences, zero_method="pratt", method="asymptotic").pvalue)
    # Tied ranks can be half numbers, so twice the ranks are whole numbers. Under the null hypothesis each sign is a
    # fair coin: the distribution of the sum of positive ranks is built by adding one rank after the other.
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    chances = np.ones(1)
    for rank in ranks[changed]:
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    found = ranks[differences > 0].sum()
    return float(min(1.0, 2 * min(chances[: found + 1].sum(), chances[found:].sum())))
