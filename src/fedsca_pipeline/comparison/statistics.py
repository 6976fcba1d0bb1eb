"""What may be said of the difference between methods: bootstrap intervals, paired tests, the Pareto front.

``scores`` below is a frame with one row per method, seed, site and image and the columns ``SCORE_COLUMNS``: ``dice`` in
0..1, ``hd95`` in pixels of the working resolution. The order of its rows never matters. All functions are pure; what is
drawn at random follows from their ``seed``.
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
# Up to so many differences that are not zero the null distribution is computed, above it is close to a normal one.
_EXACT = 50


def bootstrap(
    scores: pd.DataFrame, statistics: Sequence[str] = STATISTICS, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Each method's statistics with 95 % percentile intervals of a two-way bootstrap.

    A draw takes seeds with replacement and, within each site, images with replacement: the same images for all drawn
    seeds, since the scores of one image under several seeds are not independent. The statistics, of each site's mean
    over seeds and images:

    - ``dice``: mean over sites, each counting once;
    - ``worst_dice``: lowest site;
    - ``dice_sd``: standard deviation over sites (population, so 0 for one site);
    - ``hd95``: mean over sites.

    The sites themselves are not drawn: the intervals are about these sites, not about an unseen one. Three things to
    know when reading them. With few seeds they are too narrow (n drawn seeds vary by (n - 1) / n of what new ones
    would; one seed not at all, so only images vary). Methods share images, so intervals that overlap can still belong
    to methods that differ: ``paired_tests`` is the comparison. And drawing lowers the minimum over sites and raises
    their spread, so where sites are alike the intervals of ``worst_dice`` and ``dice_sd`` may not hold the value.

    Args:
        scores: see above, any number of methods.
        statistics: names out of ``STATISTICS``.
        draws: at least 1.
        seed: of the draws. All methods start from it, so adding a method changes no other's interval.

    Returns:
        One row a method, sorted by name: ``method``, then for each statistic ``<name>``, ``<name>_low``,
        ``<name>_high``. A missing ``hd95`` makes the method's three values missing. No row in, no row out.

    Raises:
        ValueError: an unknown statistic; no draw; a missing Dice; a method's seeds do not have the same images at a
            site, which the message names.
    """
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown:
        raise ValueError(f"unknown statistics: {', '.join(unknown)}")
    if draws < 1:
        raise ValueError(f"{draws} draws, at least 1 is needed")
    _check(scores)
    records = [
        {"method": method, **_intervals(rows, statistics, draws, np.random.default_rng(seed))}
        for method, rows in scores.groupby("method")
    ]
    columns = [column for name in statistics for column in (name, f"{name}_low", f"{name}_high")]
    return pd.DataFrame(records, columns=["method", *columns])


def mean_interval(values: ArrayLike, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of one number per seed, with a 95 % percentile interval over seeds drawn with replacement.

    Args:
        values: [seeds]. A missing one makes all three missing: the mean of the others would be another quantity, and
            a kinder one where, say, a run never got to its goal.
        draws: at least 1.
        seed: of the draws.

    Returns:
        Value, low, high. One seed: all three are its value. No seed: all three are missing.
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0 or np.isnan(values).any():
        return (np.nan, np.nan, np.nan)
    if (values == values[0]).all():
        # Their computed mean could miss the value by a rounding, and show an interval where there is none.
        return (float(values[0]),) * 3
    picks = np.random.default_rng(seed).integers(values.size, size=(draws, values.size))
    low, high = np.percentile(values[picks].mean(axis=1), _LEVELS)
    return float(values.mean()), float(low), float(high)


def image_means(scores: pd.DataFrame) -> pd.DataFrame:
    """Dice of each image, averaged over the seeds.

    Returns:
        Sites and images as sorted index (``site``, ``image``), methods as sorted columns; missing where a method has no
        such image. No row in: an empty frame.

    Raises:
        ValueError: as for ``bootstrap``.
    """
    _check(scores)
    return scores.pivot_table(index=["site", "image"], columns="method", values="dice", aggfunc="mean")


def paired_tests(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Wilcoxon's signed-rank test of each method against one, image by image: at each site and over all of them.

    The pairs are images that both methods have, their Dice averaged over seeds first, so that one image counts once.
    Zero differences (both masks empty, say) are ranked with the others and then left out, after Pratt: dropping them
    first, as Wilcoxon did, finds differences too easily where most images agree. The two-sided p is exact given ranks
    and zeros for up to 50 other differences, ties included; beyond, scipy's normal approximation. Without any
    difference p is 1. With fewer than 6 images p cannot fall below 0.05, and is reported all the same.

    Over all sites every image counts once, so large sites weigh more than in the mean over sites. The tests are about
    the images of these sites and the models of these seeds; they do not say what another training would give.

    Args:
        scores: see above.
        reference: the method that the others are compared with.

    Returns:
        Columns ``TEST_COLUMNS``, one row per site (``all sites`` first, then by name) and other method (by name):
        ``images`` compared, mean ``difference`` (method - reference), ``p``, and ``p_holm``, Holm's correction over the
        methods of the same site. No common image: no row. No row in, or no other method: no row.

    Raises:
        ValueError: the reference has no row, or as for ``bootstrap``.
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
    """Which points no other one dominates, that is, sends no more, scores no less and is better in one of the two.

    Args:
        sent: [points], bytes; less is better.
        dice: [points]; more is better.

    Returns:
        bool [points]. Equal points are kept or dominated together; a point with a missing number is not on the front.
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
    """Value, low and high of one method's statistics."""
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
    record = {}
    for name in statistics:
        low, high = np.percentile(sample[name], _LEVELS)
        record |= {name: float(point[name]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return record


def _draw(
    values: NDArray[np.float64], weights: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """One site's means in each draw: [2 metrics, seeds, images] under seed weights [draws, seeds] to [2, draws]."""
    images = values.shape[2]
    picks = generator.integers(images, size=(len(weights), images))
    return np.stack([np.take_along_axis(weights @ metric, picks, axis=1).mean(axis=1) for metric in values])


def _statistics(means: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """From the sites' means of Dice and HD95, [sites, 2, ...], to statistics [...]."""
    dice, hd95 = means[:, 0], means[:, 1]
    return {
        "dice": dice.mean(axis=0),
        "worst_dice": dice.min(axis=0),
        "dice_sd": dice.std(axis=0),
        "hd95": hd95.mean(axis=0),
    }


def _family(site: str, dice: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The tests at one site, corrected together."""
    # Half a second that only a comparison should pay.
    from statsmodels.stats.multitest import multipletests

    rows = []
    for method in dice.columns.drop(reference):
        # Means over seeds carry roundings, which must not break the ties that ranks are about.
        differences = (dice[method] - dice[reference]).dropna().round(12).to_numpy()
        if len(differences):
            row = (method, site, len(differences), float(differences.mean()), _signed_rank(differences))
            rows.append((*row, np.nan))
    table = pd.DataFrame(rows, columns=list(TEST_COLUMNS))
    if len(table):
        table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table


def _signed_rank(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test, zeros after Pratt, 1 where all are zero."""
    changed = differences != 0
    if changed.sum() > _EXACT:
        return float(stats.wilcoxon(differences, zero_method="pratt", method="asymptotic").pvalue)
    # Ranks of tied values are halves: twice the ranks are whole numbers. Each sign is a fair coin under the null, so
    # the distribution of the positive ranks' sum is built by adding one rank after the other.
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    chances = np.ones(1)
    for rank in ranks[changed]:
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    found = ranks[differences > 0].sum()
    return float(min(1.0, 2 * min(chances[: found + 1].sum(), chances[found:].sum())))
