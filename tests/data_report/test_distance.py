"""The distance between sites follows its definition: near 0 for similar sites, large for different ones."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.data_report.distance import FEWEST, MOST, plane, site_distances


def features(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, 6)).astype(np.float32)


def by_definition(one: np.ndarray, other: np.ndarray) -> float:
    """Return the unbiased squared MMD, pair by pair, of features scaled with equal weight per site."""
    centre = (one.mean(0) + other.mean(0)) / 2
    spread = np.sqrt((((one - centre) ** 2).mean(0) + ((other - centre) ** 2).mean(0)) / 2)
    one, other = (one - centre) / spread, (other - centre) / spread

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j])
        for rows in (one, other)
    ]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in one for y in other])


@given(st.integers(0, 1000), st.integers(FEWEST, 9), st.integers(FEWEST, 9), st.floats(0, 3))
def test_the_distance_is_the_squared_maximum_mean_discrepancy(seed: int, first: int, other: int, shift: float) -> None:
    one, two = features(seed, first).astype(float), features(seed + 5000, other, shift).astype(float)

    (found,) = site_distances({"a": one, "b": two}, 0)

    assert found["distance"] == pytest.approx(by_definition(one, two), rel=1e-6, abs=1e-6)
    assert 0.005 <= found["p"] <= 1


def test_the_distance_is_symmetric() -> None:
    a, b = features(0, 12), features(1, 9, 0.5)

    (one,), (other,) = site_distances({"a": a, "b": b}, 0), site_distances({"b": b, "a": a}, 0)

    assert one["distance"] == pytest.approx(other["distance"], rel=1e-6)


def test_the_distance_of_similar_sites_is_0_on_average_and_rarely_significant() -> None:
    found = [site_distances({"a": features(n, 16), "b": features(n + 100, 16)}, n)[0] for n in range(60)]

    values = np.array([pair["distance"] for pair in found])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert sum(pair["p"] <= 0.05 for pair in found) <= 9


def test_different_sites_are_farther_apart_than_similar_ones_and_than_any_permutation() -> None:
    found = {
        tuple(pair["sites"]): pair
        for pair in site_distances({"a": features(0, 20), "b": features(1, 20, 0.3), "c": features(2, 20, 3.0)}, 0)
    }

    assert set(found) == set(combinations("abc", 2))
    assert found["a", "c"]["distance"] > 3 * found["a", "b"]["distance"]
    assert found["a", "c"]["p"] == pytest.approx(0.005)


def test_sites_with_too_few_images_are_left_out() -> None:
    sites = {"few": features(0, FEWEST - 1), "none": np.zeros((0, 6)), "enough": features(1, FEWEST)}

    assert site_distances(sites, 0) == []
    assert plane(sites) == ({}, 0.0)
    assert site_distances({}, 0) == []


def test_of_many_sites_a_sample_is_compared() -> None:
    sites = {f"s{number:03d}": features(number, FEWEST) for number in range(MOST + 10)}

    pairs = site_distances(sites, 0)

    compared = sorted({site for pair in pairs for site in pair["sites"]})
    assert len(compared) == MOST
    assert [tuple(pair["sites"]) for pair in pairs] == list(combinations(compared, 2))
    assert compared != sorted({site for pair in site_distances(sites, 1) for site in pair["sites"]})


def test_a_constant_feature_does_not_count() -> None:
    a, b = features(0, 8), features(1, 8)
    constant = np.full((8, 1), 7.0)

    found = site_distances({"a": np.hstack([a, constant]), "b": np.hstack([b, constant])}, 0)

    assert np.isfinite(found[0]["distance"])


def test_the_plane_keeps_far_sites_apart() -> None:
    points, explained = plane({"a": features(0, 10), "b": features(1, 7, 4.0)})

    assert {site: xy.shape for site, xy in points.items()} == {"a": (10, 2), "b": (7, 2)}
    assert 0 < explained <= 1
    assert (points["a"][:, 0] < 0).all() != (points["b"][:, 0] < 0).all()
