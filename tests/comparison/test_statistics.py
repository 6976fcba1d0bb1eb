from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import PermutationMethod, wilcoxon

from fedsca_pipeline.comparison.statistics import (
    ALL_SITES,
    SCORE_COLUMNS,
    STATISTICS,
    TEST_COLUMNS,
    bootstrap,
    image_means,
    mean_interval,
    paired_tests,
    pareto_front,
)

DRAWS = 200
DICE = st.floats(0, 1, allow_subnormal=False)


def scores_of(method: str, sites: dict[str, np.ndarray]) -> pd.DataFrame:
    """Rows of one method from Dice [seeds, images] by site; HD95 is 100 (1 - Dice)."""
    rows = [
        (method, seed, site, f"i{image}", value, 100 * (1 - value))
        for site, values in sites.items()
        for (seed, image), value in np.ndenumerate(np.asarray(values, dtype=float))
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


@st.composite
def drawn_scores(draw: st.DrawFn, methods: int = 2, least: int = 1) -> pd.DataFrame:
    """Scores of several methods with the same sites and images, and different numbers of seeds."""
    sizes = draw(st.lists(st.integers(least, 8), min_size=1, max_size=3))
    frames = []
    for number in range(methods):
        seeds = draw(st.integers(1, 3))
        generator = np.random.default_rng(draw(st.integers(0, 10_000)))
        # Few different values make ties and zero differences likely.
        sites = {f"s{index}": generator.integers(0, 8, size=(seeds, size)) / 8 for index, size in enumerate(sizes)}
        frames.append(scores_of(f"m{number}", sites))
    return pd.concat(frames, ignore_index=True)


def shuffled(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    return frame.sample(frac=1, random_state=seed, ignore_index=True)


def test_the_statistics_match_a_case_by_hand() -> None:
    scores = scores_of("a", {"x": [[0.2, 0.4], [0.6, 0.8]], "y": [[0.9], [0.7]]})

    (row,) = bootstrap(scores, draws=DRAWS).to_dict("records")

    # Site x: 0.5, site y: 0.8.
    assert row["dice"] == pytest.approx(0.65)
    assert row["worst_dice"] == pytest.approx(0.5)
    assert row["dice_sd"] == pytest.approx(0.15)
    assert row["hd95"] == pytest.approx(35)


def test_the_interval_of_one_seed_and_two_images_is_that_of_two_coin_tosses() -> None:
    (row,) = bootstrap(scores_of("a", {"x": [[0.0, 1.0]]}), ["dice"], draws=4000).to_dict("records")

    # A mean of 0, 0.5 and 1 in a quarter, half and quarter of the draws.
    assert (row["dice_low"], row["dice"], row["dice_high"]) == (0, 0.5, 1)
    assert list(row) == ["method", "dice", "dice_low", "dice_high"]


def test_the_interval_matches_a_plain_loop_of_draws() -> None:
    values = {"x": np.array([[0.1, 0.5, 0.9], [0.3, 0.6, 0.7]]), "y": np.array([[0.2, 0.8], [0.4, 0.9]])}
    generator = np.random.default_rng(5)
    means = []
    for _ in range(6000):
        seeds = generator.integers(2, size=2)
        picked = [site[seeds][:, generator.integers(site.shape[1], size=site.shape[1])] for site in values.values()]
        means.append([site.mean() for site in picked])
    means = np.array(means)
    expected = {"dice": means.mean(axis=1), "worst_dice": means.min(axis=1), "dice_sd": means.std(axis=1)}

    (row,) = bootstrap(scores_of("a", values), draws=6000).to_dict("records")

    for name, sample in expected.items():
        found = (row[f"{name}_low"], row[f"{name}_high"])
        assert found == pytest.approx(np.percentile(sample, [2.5, 97.5]), abs=0.02), name


def test_images_are_drawn_together_for_all_seeds() -> None:
    # Two seeds that agree are no more evidence than one: the interval must not shrink.
    one = np.random.default_rng(0).uniform(size=(1, 30))

    alone = bootstrap(scores_of("a", {"x": one})).iloc[0]
    twice = bootstrap(scores_of("a", {"x": np.repeat(one, 2, axis=0)})).iloc[0]

    assert twice["dice_high"] - twice["dice_low"] == pytest.approx(alone["dice_high"] - alone["dice_low"], rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    same = scores_of("a", {"x": [[0.5, 0.5]] * 3})
    apart = scores_of("a", {"x": [[0.3, 0.3], [0.5, 0.5], [0.7, 0.7]]})

    narrow, wide = bootstrap(same, draws=DRAWS).iloc[0], bootstrap(apart, draws=DRAWS).iloc[0]

    assert narrow["dice_low"] == narrow["dice_high"] == 0.5
    assert wide["dice_low"] == pytest.approx(0.3, abs=0.05)
    assert wide["dice_high"] == pytest.approx(0.7, abs=0.05)


def test_one_seed_and_one_image_have_an_interval_of_zero_width() -> None:
    row = bootstrap(scores_of("a", {"x": [[0.4]]}), draws=DRAWS).iloc[0]

    for name in STATISTICS:
        assert row[f"{name}_low"] == row[name] == row[f"{name}_high"]


@settings(deadline=None, max_examples=40)
@given(drawn_scores())
def test_intervals_contain_the_means_and_stay_in_range(scores: pd.DataFrame) -> None:
    table = bootstrap(scores, draws=DRAWS)

    for name in ("dice", "hd95"):
        assert (table[f"{name}_low"] <= table[name] + 1e-9).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-9).all()
    assert (table["worst_dice"] <= table["dice"] + 1e-12).all()
    assert table[["dice_low", "worst_dice_low", "dice_sd_low"]].min(axis=None) >= 0
    assert table[["dice_high", "worst_dice_high"]].max(axis=None) <= 1 + 1e-12


@settings(deadline=None, max_examples=20)
@given(drawn_scores(), st.integers(0, 1000))
def test_the_order_of_rows_and_other_methods_do_not_change_an_interval(scores: pd.DataFrame, order: int) -> None:
    table = bootstrap(scores, draws=DRAWS)

    pd.testing.assert_frame_equal(bootstrap(shuffled(scores, order), draws=DRAWS), table)
    alone = bootstrap(scores[scores["method"] == "m1"], draws=DRAWS)
    pd.testing.assert_frame_equal(alone, table[table["method"] == "m1"].reset_index(drop=True))
    renamed = bootstrap(scores.assign(method=scores["method"].map({"m0": "z", "m1": "a"})), draws=DRAWS)
    assert renamed["dice_low"].tolist() == table["dice_low"].tolist()[::-1]


@settings(deadline=None, max_examples=20)
@given(drawn_scores(methods=1), st.floats(0.1, 1))
def test_scaling_the_scores_scales_values_and_intervals(scores: pd.DataFrame, factor: float) -> None:
    scaled = scores.assign(dice=scores["dice"] * factor, hd95=scores["hd95"] * factor)

    table, other = (bootstrap(frame, draws=DRAWS).drop(columns="method") for frame in (scores, scaled))

    np.testing.assert_allclose(other, table * factor, atol=1e-9)


def test_the_same_seed_repeats_the_draws_and_another_does_not() -> None:
    scores = scores_of("a", {"x": np.random.default_rng(0).uniform(size=(2, 9))})

    first = bootstrap(scores, draws=DRAWS)

    pd.testing.assert_frame_equal(bootstrap(scores, draws=DRAWS), first)
    assert bootstrap(scores, draws=DRAWS, seed=1)["dice_low"].item() != first["dice_low"].item()


@pytest.mark.parametrize("call", [bootstrap, image_means, lambda scores: paired_tests(scores, "b")])
@pytest.mark.parametrize("broken", ["missing image", "twice", "missing site", "no dice"])
def test_seeds_with_different_images_are_refused_with_method_and_site(call, broken: str) -> None:
    good = scores_of("b", {"x": [[0.1, 0.2], [0.3, 0.4]]})
    bad = scores_of("a", {"x": [[0.1, 0.2], [0.3, 0.4]], "y": [[0.5], [0.6]]})
    last = bad["site"].eq("y") & bad["seed"].eq(1)
    bad = {
        "missing image": bad.drop(index=bad.index[bad["site"] == "x"][0]),
        "twice": pd.concat([bad, bad[last]]),
        "missing site": bad[~last],
        "no dice": bad.assign(dice=bad["dice"].mask(last)),
    }[broken]

    site = "x" if broken == "missing image" else "y"
    with pytest.raises(ValueError, match=f"method a, site {site}"):
        call(pd.concat([good, bad]))


def test_unknown_statistics_and_zero_draws_are_refused() -> None:
    scores = scores_of("a", {"x": [[0.1]]})

    with pytest.raises(ValueError, match="unknown statistics: median"):
        bootstrap(scores, ["dice", "median"])
    with pytest.raises(ValueError, match="0 draws"):
        bootstrap(scores, draws=0)


def test_a_missing_hd95_makes_only_the_hd95_statistic_missing() -> None:
    scores = scores_of("a", {"x": [[0.1, 0.2]]})

    row = bootstrap(scores.assign(hd95=[1.0, np.nan]), draws=DRAWS).iloc[0]

    assert row[["hd95", "hd95_low", "hd95_high"]].isna().all()
    assert not row[["dice", "dice_low", "dice_high"]].isna().any()


def test_empty_scores_give_empty_tables() -> None:
    empty = scores_of("a", {})

    assert bootstrap(empty).columns.tolist()[:2] == ["method", "dice"]
    assert bootstrap(empty).empty
    assert image_means(empty).empty
    assert paired_tests(empty, "a").columns.tolist() == list(TEST_COLUMNS)
    assert paired_tests(empty, "a").empty
    assert pareto_front([], []).shape == (0,)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=6))
def test_the_interval_of_a_mean_contains_it_and_lies_within_the_values(values: list[float]) -> None:
    value, low, high = mean_interval(values, draws=DRAWS)

    slack = 1e-9 * max(1, *map(abs, values))
    assert value == pytest.approx(np.mean(values), abs=slack)
    assert min(values) - slack <= low <= value + slack
    assert value - slack <= high <= max(values) + slack


def test_one_seed_has_a_point_interval_and_a_missing_value_has_none() -> None:
    assert mean_interval([7.5]) == (7.5, 7.5, 7.5)
    assert mean_interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1)
    assert np.isnan(mean_interval([1.0, np.nan])).all()
    assert np.isnan(mean_interval([])).all()
    assert mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_the_signed_rank_test_matches_a_case_by_hand() -> None:
    # Differences 1, 2, 3, -4, 5, 6 (hundredths): ranks against sum to 4; 7 of the 64 sign patterns reach that far
    # ({}, 1, 2, 3, 4, 1+2, 1+3), on either side.
    reference = np.full(6, 0.5)
    other = reference + np.array([1, 2, 3, -4, 5, 6]) / 100
    scores = pd.concat([scores_of("ref", {"x": [reference]}), scores_of("m", {"x": [other]})])

    table = paired_tests(scores, "ref")

    assert table["site"].tolist() == [ALL_SITES, "x"]
    for row in table.to_dict("records"):
        assert (row["method"], row["images"]) == ("m", 6)
        assert row["difference"] == pytest.approx(0.13 / 6)
        assert row["p"] == row["p_holm"] == pytest.approx(2 * 7 / 64)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=7))
def test_p_is_exact_with_zeros_and_ties(steps: list[int]) -> None:
    assume(any(steps))
    reference = np.full((1, len(steps)), 0.5)
    scores = pd.concat([scores_of("ref", {"x": reference}), scores_of("m", {"x": reference + np.array(steps) / 16})])

    found = paired_tests(scores, "ref")["p"].iloc[0]

    every = PermutationMethod(n_resamples=np.inf)
    assert found == pytest.approx(wilcoxon(steps, zero_method="pratt", method=every).pvalue)


@pytest.mark.parametrize("images", [50, 51, 200])
def test_p_of_many_images_is_close_to_scipy_s(images: int) -> None:
    generator = np.random.default_rng(images)
    base = generator.uniform(0.2, 0.8, size=images)
    other = base + generator.normal(0.004, 0.02, size=images)
    other[:5] = base[:5]
    scores = pd.concat([scores_of("ref", {"x": [base]}), scores_of("m", {"x": [other]})])

    found = paired_tests(scores, "ref")["p"].iloc[0]

    assert 0.001 < found < 0.9
    assert found == pytest.approx(wilcoxon(other - base, zero_method="pratt", method="asymptotic").pvalue, rel=0.1)


@settings(deadline=None, max_examples=3)
@given(drawn_scores(methods=4), st.integers(0, 1000))
def test_the_tests_obey_their_laws(scores: pd.DataFrame, order: int) -> None:
    copy = scores[scores["method"] == "m0"].assign(method="copy")
    scores = pd.concat([scores, copy], ignore_index=True)

    table = paired_tests(scores, "m0")

    assert table.groupby("site").size().eq(4).all()
    same = table[table["method"] == "copy"]
    assert (same["p"] == 1).all()
    assert (same["p_holm"] == 1).all()
    assert (same["difference"] == 0).all()
    assert table["p"].between(0, 1).all()
    assert (table["p_holm"] >= table["p"]).all()
    for _, family in table.groupby("site"):
        assert family.sort_values("p")["p_holm"].is_monotonic_increasing
    pd.testing.assert_frame_equal(paired_tests(shuffled(scores, order), "m0"), table)
    back = paired_tests(scores[scores["method"].isin(["m0", "m1"])], "m1")
    there = table[table["method"] == "m1"].reset_index(drop=True)
    np.testing.assert_allclose(back["difference"], -there["difference"], atol=1e-12)
    np.testing.assert_allclose(back["p"], there["p"])


def test_holm_multiplies_the_smallest_p_by_the_number_of_methods_at_the_same_site() -> None:
    generator = np.random.default_rng(0)
    sites = {"x": generator.uniform(size=(1, 8)), "y": generator.uniform(size=(1, 8))}
    other = [
        scores_of(f"m{number}", {site: values + 0.01 * generator.normal(size=(1, 8)) for site, values in sites.items()})
        for number in range(3)
    ]

    table = paired_tests(pd.concat([scores_of("ref", sites), *other]), "ref")

    for site in (ALL_SITES, "x", "y"):
        family = table[table["site"] == site].sort_values("p")
        first, second, third = family["p"]
        corrected = np.minimum(np.maximum.accumulate([3 * first, 2 * second, third]), 1)
        np.testing.assert_allclose(family["p_holm"], corrected)


def test_seeds_are_averaged_first_and_do_not_count_as_more_images() -> None:
    base, other = np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.4, 0.5])
    one = pd.concat([scores_of("ref", {"x": [base]}), scores_of("m", {"x": [other]})])
    many = pd.concat(
        [scores_of("ref", {"x": [base] * 4}), scores_of("m", {"x": [other - 0.05, other + 0.05, other, other]})]
    )

    pd.testing.assert_frame_equal(paired_tests(many, "ref"), paired_tests(one, "ref"))
    assert paired_tests(one, "ref")["images"].tolist() == [3, 3]


def test_rounding_errors_of_the_mean_over_seeds_are_no_difference() -> None:
    seeds = np.repeat([[0.1], [0.2], [0.3]], 8, axis=1)
    scores = pd.concat([scores_of("ref", {"x": seeds}), scores_of("m", {"x": seeds[1:2]})])
    assert (image_means(scores)["m"] != image_means(scores)["ref"]).all()

    table = paired_tests(scores, "ref")

    assert table["p"].tolist() == [1, 1]


def test_methods_are_compared_on_their_common_images() -> None:
    reference = scores_of("ref", {"x": [[0.5, 0.5, 0.5]], "y": [[0.5]]})
    fewer = scores_of("m", {"x": [[0.6, 0.7]], "z": [[0.9]]})

    table = paired_tests(pd.concat([reference, fewer]), "ref")

    assert table["site"].tolist() == [ALL_SITES, "x"]
    assert table["images"].tolist() == [2, 2]
    assert table["difference"].tolist() == pytest.approx([0.15, 0.15])


def test_a_reference_without_rivals_has_no_test_and_an_unknown_reference_is_refused() -> None:
    scores = scores_of("ref", {"x": [[0.5]]})

    assert paired_tests(scores, "ref").columns.tolist() == list(TEST_COLUMNS)
    assert paired_tests(scores, "ref").empty
    with pytest.raises(ValueError, match="reference unknown is not among the methods ref"):
        paired_tests(scores, "unknown")


def test_the_pareto_front_matches_a_case_by_hand() -> None:
    sent = [0, 10, 10, 10, 20, 30, np.nan]
    dice = [0.5, 0.7, 0.7, 0.6, 0.7, 0.8, 0.9]

    assert pareto_front(sent, dice).tolist() == [True, True, True, False, False, True, False]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=15))
def test_the_pareto_front_matches_a_search_over_all_pairs(points: list[tuple[int, int]]) -> None:
    def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    dominated = {other for one, other in product(points, points) if dominates(one, other)}

    front = pareto_front([sent for sent, _ in points], [dice for _, dice in points])

    assert front.tolist() == [point not in dominated for point in points]
