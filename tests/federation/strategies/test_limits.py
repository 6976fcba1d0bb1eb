"""What one site may contribute to a server step: its share of the prior, and the length of its update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_steps import FREE, LIMITS, SITES, double, fedsca, replies_of, step

from fedsca_pipeline.federation.strategies import STRATEGIES, build_strategy, strategy_class
from fedsca_pipeline.federation.strategies.server_step import capped, clip_factors
from fedsca_pipeline.model.layout import TensorLayout

CLIP = replace(FREE, clip_to_median=True)
# Every strategy shares a part of it.
LAYOUT = TensorLayout(
    blocks=(("low.lora_A.x", "low.lora_B.x"), ("high.lora_A.x", "high.lora_B.x")),
    decoder=("decoder",),
    encoder=("encoder",),
    shapes=dict.fromkeys(("low.lora_A.x", "high.lora_A.x"), (1, 5))
    | dict.fromkeys(("low.lora_B.x", "high.lora_B.x"), (4, 1))
    | dict.fromkeys(("decoder", "encoder"), (6,)),
)
SHARING = [name for name in STRATEGIES if not strategy_class(name).pools and name not in ("local", "local_full")]
VARIANTS = [
    *((name, {}) for name in SHARING),
    *(("fedsca", {"weighting": weighting}) for weighting in ("simplex", "softmax", "uniform")),
    ("fedsca", {"compare": "weights", "step": 2.0}),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
counts = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=7)
shares_allowed = st.floats(0.01, 1.0)


def drawn(name: str, options: dict, seed: int = 0):
    """A strategy and replies of four sites: a common direction with noise; all sites did four steps."""
    strategy = build_strategy(name, options, LAYOUT)
    values = sum(torch.Size(shape).numel() for shape in strategy.wire_shapes().values())
    draw = torch.Generator().manual_seed(seed)
    updates = torch.randn(1, values, generator=draw) + 0.5 * torch.randn(4, values, generator=draw)
    replies = replies_of(dict(zip(SITES, updates.tolist(), strict=True)), samples=dict.fromkeys(SITES, 30))
    return strategy, replace(replies, steps=double(4, 4, 4, 4))


def results(strategy, replies, limits, state=None):
    state, found = step(strategy, state, replies, limits=limits)
    return state, torch.cat([found.aggregates, strategy.general_model(state, limits.max_share)[None]])


class TestLargestShare:
    @given(counts, shares_allowed)
    def test_rows_keep_their_sum_and_order_and_no_site_is_above_the_limit(self, claimed, most):
        shares = double(claimed)

        found = capped(shares, most)

        row, sites = found[0], sum(count > 0 for count in claimed)
        torch.testing.assert_close(found.sum(), shares.sum(), rtol=1e-12, atol=0)
        assert (row >= 0).all()
        assert (row <= shares.sum() * max(most, 1 / max(sites, 1)) * (1 + 1e-12)).all()
        ordered = row[shares[0].argsort(stable=True)]
        assert (ordered.diff() >= -1e-12 * shares.sum()).all()

    @given(counts, shares_allowed)
    def test_sites_below_the_limit_keep_their_proportions(self, claimed, most):
        shares = double(claimed)

        row, limit = capped(shares, most)[0], shares.sum() * max(most, 1 / max(sum(count > 0 for count in claimed), 1))
        below = (row < limit * (1 - 1e-9)) & (shares[0] > 0)

        factors = row[below] / shares[0, below]
        torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-9, atol=0)
        assert (factors >= 1 - 1e-9).all()

    @given(counts, shares_allowed)
    def test_a_row_without_a_site_above_the_limit_stays_as_it_is(self, claimed, most):
        shares = double(claimed) / 7
        limit = shares.sum() * max(most, 1 / max(sum(count > 0 for count in claimed), 1))

        if (shares <= limit).all():
            assert torch.equal(capped(shares, most), shares)
        else:
            assert not torch.equal(capped(shares, most), shares)

    def test_each_row_has_its_own_limit_and_zeros_stay(self):
        found = capped(double([6, 2, 2, 2], [9, 0, 1, 0], [0, 0, 0, 0], [0, 5, 0, 0]), 0.4)

        expected = double([4.8, 2.4, 2.4, 2.4], [5, 0, 5, 0], [0, 0, 0, 0], [0, 5, 0, 0])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_of_two_sites_each_has_half_whatever_they_claim(self):
        assert capped(double([1, 2**31 - 1]) / 2**31, 0.5).tolist() == [[0.5, 0.5]]

    @every_variant
    @pytest.mark.parametrize("present", ["abcd", "ad"])
    def test_no_strategy_gives_a_site_more_for_a_claim_above_the_largest_share(self, name, options, present):
        """Four sites take part, then some; 2000 images are already above half beside the others' 90."""
        strategy, replies = drawn(name, options)
        rows = [SITES.index(site) for site in present]
        second = replace(replies, round=2, sites=tuple(present), updates=replies.updates[rows].flip(1))

        found = []
        for claimed in (2_000, 2**31 - 1):
            samples = double(30, 30, 30, claimed)
            state, first = results(strategy, replace(replies, samples=samples), LIMITS)
            some = replace(second, samples=samples[rows], steps=replies.steps[rows])
            found.append(torch.cat([first, results(strategy, some, LIMITS, state)[1]]))

        torch.testing.assert_close(*found)

    @every_variant
    def test_without_a_site_above_it_nothing_changes_by_a_bit(self, name, options):
        strategy, replies = drawn(name, options)
        replies = replace(replies, samples=double(30, 24, 40, 31))

        (one, limited), (other, free) = (results(strategy, replies, limits) for limits in (LIMITS, FREE))

        assert torch.equal(limited, free)
        assert torch.equal(one.local_models, other.local_models)


class TestClipping:
    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=7))
    def test_no_update_is_longer_than_the_lower_median_of_those_that_moved(self, lengths):
        norms = double(*lengths)
        factors = clip_factors(norms)

        moved = sorted(length for length in lengths if length >= 1e-12)
        most = moved[(len(moved) - 1) // 2] if moved else 0.0
        assert (norms * factors <= most * (1 + 1e-12) + 1e-12).all()
        assert (factors[norms <= most] == 1).all()
        assert ((factors > 0) & (factors <= 1)).all()

    @every_variant
    def test_it_is_the_step_of_updates_that_were_shortened_before(self, name, options):
        strategy, replies = drawn(name, options)
        replies = replace(replies, updates=replies.updates * torch.tensor([[1.0], [7.0], [3.0], [1.5]]))
        norms = replies.updates.double().norm(dim=1)
        shortened = replace(replies, updates=(replies.updates * clip_factors(norms)[:, None]).float())

        (one, clipped), (other, expected) = results(strategy, replies, CLIP), results(strategy, shortened, FREE)

        assert (shortened.updates != replies.updates).any()
        torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.local_models, other.local_models, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.memory, other.memory, rtol=1e-5, atol=1e-6, equal_nan=True)

    def test_an_update_that_is_far_too_long_is_rejected_all_the_same(self):
        limits = replace(LIMITS, clip_to_median=True)

        _, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1.5], "c": [1000.0], "d": [3.0]}), limits=limits)

        assert "is above 15" in found.rejected["c"]
        assert found.norms.tolist() == [1.0, 1.5, 3.0]
        # Shortened to 1, 1.5 and 1.5, which is what the distances to the mean are relative to.
        mean = (1 + 1.5 + 1.5) / 3
        assert found.spread.tolist() == pytest.approx([mean - 1, (1.5 - mean) / 1.5, (1.5 - mean) / 1.5])

    def test_zero_updates_do_not_lower_the_median_to_zero(self):
        _, found = step(fedsca(1), None, replies_of({"a": [2.0], "b": [0.0], "c": [0.0]}), limits=CLIP)

        assert found.aggregates[0].tolist() == [2.0]
