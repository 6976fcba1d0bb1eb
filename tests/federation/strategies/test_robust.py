"""Median, trimmed mean and Krum: their papers' formulas, and what hostile sites can do to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_steps import FREE, flat_layout, replies_of, step

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies import build_strategy

VALUES = 3
LAYOUT = flat_layout(VALUES)
ROBUST = ("median", "trimmed_mean", "krum")
updates = st.lists(st.floats(-9, 9, width=32), min_size=VALUES, max_size=VALUES)
far = st.lists(st.floats(-1e6, 1e6, width=32), min_size=VALUES, max_size=VALUES)
four = st.fixed_dictionaries(dict.fromkeys("abcd", updates))


def aggregate_of(name: str, sent: dict[str, list[float]], samples: dict[str, float] | None = None, **options: object):
    strategy = build_strategy(name, options, LAYOUT)
    _, found = step(strategy, None, replies_of(sent, samples=samples), limits=FREE)
    # Every site receives the same, absent ones too.
    assert torch.equal(found.aggregates, found.aggregates[:1].expand_as(found.aggregates))
    return found.aggregates[0]


@given(four)
def test_the_median_is_that_of_each_value(sent):
    expected = torch.tensor(list(sent.values())).double().quantile(0.5, dim=0)

    torch.testing.assert_close(aggregate_of("median", sent).double(), expected)


def test_of_an_odd_number_of_sites_the_median_is_the_middle_one():
    sent = {"a": [1.0, 9.0, -1.0], "b": [2.0, 0.0, -5.0], "d": [30.0, 1.0, -3.0]}

    assert aggregate_of("median", sent).tolist() == [2.0, 1.0, -3.0]


@given(four)
def test_the_trimmed_mean_leaves_out_the_smallest_and_the_largest(sent):
    ordered = torch.tensor(list(sent.values())).sort(dim=0).values

    torch.testing.assert_close(aggregate_of("trimmed_mean", sent), ordered[1:3].mean(dim=0))
    torch.testing.assert_close(aggregate_of("trimmed_mean", sent, trim=0.0), ordered.mean(dim=0))


@given(four)
def test_krum_is_the_update_closest_to_its_neighbours(sent):
    points = torch.tensor(list(sent.values()))
    squares = torch.cdist(points.double(), points.double()).square()
    # Four sites, one hostile: 4 - 1 - 2 = 1 neighbour.
    scores = (squares + torch.diag(torch.full((4,), torch.inf))).amin(dim=1)

    found = aggregate_of("krum", sent)

    norms = (points - found).norm(dim=1)
    chosen = int(norms.argmin())
    assert norms[chosen] <= 1e-5
    # Inner products of fp32 values round.
    assert scores[chosen] <= scores.min() + 1e-3


def test_multi_krum_is_the_mean_of_the_best():
    sent = {"a": [1.0, 0.0, 0.0], "b": [2.0, 0.0, 0.0], "c": [2.5, 0.0, 0.0], "d": [80.0, 0.0, 0.0]}

    assert aggregate_of("krum", sent, chosen=3)[0].item() == pytest.approx((1 + 2 + 2.5) / 3)
    assert aggregate_of("krum", sent, chosen=9)[0].item() == pytest.approx((1 + 2 + 2.5 + 80) / 4)


@pytest.mark.parametrize("name", ROBUST)
@given(
    honest=st.lists(updates, min_size=3, max_size=3),
    hostile=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
)
def test_one_hostile_site_of_four_leaves_the_aggregate_among_the_honest_ones(name, honest, hostile):
    sent = dict(zip("abc", honest, strict=True)) | {"d": hostile}
    if name == "krum":
        # One neighbour counts: a hostile site that sends what an honest one sends is chosen, and does no harm.
        sent = {site: [value / 9 for value in sent[site]] for site in "abc"} | {"d": [100 + abs(v) for v in hostile]}
    points = torch.tensor([sent[site] for site in "abc"])

    found = aggregate_of(name, sent, samples={"d": 2**31 - 1})

    slack = 1e-4 * (1 + points.abs().max())
    assert (found >= points.amin(dim=0) - slack).all()
    assert (found <= points.amax(dim=0) + slack).all()


@pytest.mark.parametrize("name", ROBUST)
def test_one_or_two_sites_are_enough(name):
    assert aggregate_of(name, {"b": [1.0, 2.0, 3.0]}).tolist() == [1.0, 2.0, 3.0]
    assert aggregate_of(name, {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ROBUST)
def test_claimed_images_cannot_be_made_to_count(name):
    with pytest.raises(ConfigError, match=rf"strategies\.{name}\.prior is 'samples'"):
        build_strategy(name, {"prior": "samples"}, LAYOUT)
