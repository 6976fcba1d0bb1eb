"""The step from replies to aggregates: memory, spread, catching up, the general model and the defaults."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from server_steps import FREE, SITES, fedsca, flat_layout, replies_of, step

from fedsca_pipeline.errors import NoValidSite
from fedsca_pipeline.federation.strategies import build_strategy, kernels
from fedsca_pipeline.federation.strategies.kernels import Results, gram
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState
from fedsca_pipeline.model.layout import TensorLayout


def dense(state, replies, weights):
    """The step's matrix products, undivided, in float64: Gram matrix, local_models, aggregates, spread."""
    updates, local_models = replies.updates.double(), state.local_models.double()
    rows = [SITES.index(site) for site in replies.sites]
    thetas = replies.bases[rows].double() + updates
    local_models = local_models.index_copy(0, torch.tensor(rows), thetas)
    apart = (thetas - thetas.mean(dim=0)).norm(dim=1) / updates.norm(dim=1)
    return updates @ updates.T, local_models, weights @ local_models, apart


class TestMemory:
    @settings(max_examples=40, deadline=None)
    @given(
        values=st.integers(1, 70),
        columns=st.integers(1, 80),
        band=st.integers(1, 6),
        present=st.sets(st.sampled_from(SITES), min_size=1),
        seed=st.integers(0, 1000),
    )
    def test_any_block_width_gives_the_results_of_undivided_products(self, values, columns, band, present, seed):
        draw = torch.Generator().manual_seed(seed)
        state = replace(ServerState.initial(4, values, 1), local_models=torch.randn(4, values, generator=draw))
        sites = tuple(sorted(present))
        bases = torch.randn(4, values, generator=draw)
        updates = torch.randn(len(sites), values, generator=draw)
        replies = Replies(1, sites, bases, updates, torch.full((len(sites),), 10.0).double())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_COLUMNS", columns)
            patch.setattr(kernels, "_CACHED", columns * len(SITES))
            patch.setattr(kernels, "_KERNEL", band)
            strategy = fedsca(values, weighting="uniform")
            after, found = step(strategy, state, replies, limits=FREE)
            products = gram(updates, (slice(0, values),))[0]
            weights = strategy.site_weights(
                after, torch.tensor([SITES.index(site) for site in sites]), torch.ones(1, len(sites)) > 0, 1.0
            )[0]

        exact, local_models, aggregates, apart = dense(state, replies, weights)
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(products, exact, **close)
        torch.testing.assert_close(after.local_models.double(), local_models, **close)
        torch.testing.assert_close(found.aggregates.double(), aggregates, **close)
        torch.testing.assert_close(found.spread, apart, **close)

    def test_given_memory_receives_the_same_results_bit_for_bit(self):
        draw = torch.Generator().manual_seed(5)
        bases, updates = torch.randn(2, 4, 20_000, generator=draw)
        replies = Replies(1, ("a", "b", "d"), bases, updates[:3], torch.ones(3).double())
        strategy = fedsca(20_000)
        out = Results.around(torch.full((4, 20_000), torch.nan), torch.full((4, 20_000), torch.nan))

        state, found = step(strategy, None, replies)
        same_state, same = step(strategy, None, replies, out=out)

        assert same_state.local_models is out.local_models
        assert same.aggregates is out.aggregates
        assert torch.equal(out.local_models, state.local_models)
        assert torch.equal(out.aggregates, found.aggregates)
        assert torch.equal(same.spread, found.spread)

    def test_local_models_may_overwrite_the_updates(self, monkeypatch):
        monkeypatch.setattr(kernels, "_CACHED", 4 * 1024)
        draw = torch.Generator().manual_seed(6)
        bases, updates = torch.randn(2, 4, 20_000, generator=draw)
        options = {"granularity": "block", "shared_blocks": "all"}
        strategy = build_strategy("fedsca", options, flat_layout(7_000, 13_000))
        before, _ = step(strategy, None, Replies(1, SITES, bases, updates, torch.ones(4).double()))
        updates[0, 0] = torch.nan
        replies = Replies(2, ("a", "b", "d"), bases, updates[:3], torch.ones(3).double())
        state, found = step(strategy, before, replies)

        out = Results.around(updates, torch.empty(4, 20_000))
        same_state, same = step(strategy, before, replies, out=out)

        assert found.accepted == ("b", "d")
        assert torch.equal(same_state.local_models, state.local_models)
        assert torch.equal(same.aggregates, found.aggregates)
        assert torch.equal(same.spread, found.spread)

    def test_a_round_that_fails_writes_nothing(self):
        out = Results.around(torch.full((4, 1), 7.0), torch.full((4, 1), 7.0))

        with pytest.raises(NoValidSite):
            step(fedsca(1), None, replies_of({"a": [torch.nan]}), out=out)

        assert out.local_models.eq(7).all()
        assert out.aggregates.eq(7).all()

    def test_bases_of_sites_without_a_reply_are_not_used(self):
        replies = replies_of({"a": [1.0], "c": [1.0]}, bases={"a": [1.0], "b": [torch.nan], "d": [torch.nan]})

        state, found = step(fedsca(1), None, replies)

        assert state.local_models.flatten().tolist() == [2, 0, 1, 0]
        assert found.aggregates.isfinite().all()


class TestSpread:
    def test_it_is_the_distance_to_the_mean_per_update_norm_and_0_for_a_zero_update(self):
        updates = {"a": [2.0, 0.0], "b": [0.0, 0.0], "c": [0.0, 1.0]}
        bases = {"a": [-2.0, 0.0], "b": [6.0, 8.0], "c": [3.0, 3.0]}

        assert step(fedsca(2), None, replies_of(updates, bases))[1].spread.tolist() == [2.5, 0, 0]

    def test_absent_sites_are_not_in_the_mean(self):
        strategy = fedsca(2)
        state, _ = step(strategy, None, replies_of({"b": [900.0, 0.0]}))

        replies = replies_of({"a": [600.0, 0.0], "c": [0.0, 900.0]}, {"a": [-600.0, 0.0], "c": [6.0, -892.0]})

        assert step(strategy, state, replies)[1].spread.tolist() == pytest.approx([5 / 600, 5 / 900])


class TestCatchUp:
    def test_an_absent_site_receives_the_latest_local_models_by_its_remembered_similarities(self):
        strategy = fedsca(2, prior="uniform")
        state, _ = step(strategy, None, replies_of({"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 1.0]}))

        _, found = step(strategy, state, replies_of({"b": [2.0, 4.0], "c": [0.0, 9.0]}, round_=2))

        # a knows b (similarity 1, the best) and c (0): half of its own local model, half of b's latest.
        assert found.aggregates[0].tolist() == [1.5, 2.0]

    def test_a_site_that_resembled_no_other_resumes_from_its_own_local_model(self):
        strategy = fedsca(1)
        state, _ = step(strategy, None, replies_of({"a": [1.0], "b": [-1.0]}))

        _, found = step(strategy, state, replies_of({"b": [-1.0]}, round_=2))

        assert found.aggregates[0].tolist() == [1.0]

    def test_a_site_that_never_took_part_receives_the_general_model(self):
        strategy = fedsca(1)
        samples = {"a": 10, "b": 30}

        state, found = step(strategy, None, replies_of({"a": [4.0], "b": [8.0]}, samples=samples), limits=FREE)

        assert found.aggregates[2].tolist() == [7.0]
        assert found.aggregates[2:].equal(strategy.general_model(state, 1.0).expand(2, 1))

    def test_without_memory_every_absent_site_receives_the_general_model(self):
        strategy = fedsca(1, memory=False, prior="uniform")
        state, _ = step(strategy, None, replies_of({"a": [1.0], "b": [1.0]}))

        _, found = step(strategy, state, replies_of({"b": [5.0]}, round_=2))

        assert found.aggregates[0].tolist() == [3.0]

    def test_absent_sites_are_not_mixed_in(self):
        strategy = fedsca(1)
        state, _ = step(strategy, None, replies_of({"a": [1.0], "b": [1.0], "c": [5.0]}))

        _, found = step(strategy, state, replies_of({"a": [2.0], "b": [2.0]}, round_=2))

        assert found.aggregates[:2].tolist() == [[2.0], [2.0]]

    @pytest.mark.parametrize("weighting", ["gate", "simplex", "softmax", "uniform"])
    def test_with_any_sites_absent_every_row_is_a_finite_mix(self, weighting):
        strategy = fedsca(5, weighting=weighting)
        draw = torch.Generator().manual_seed(2)
        state = None
        for present in ("ab", "cd", "a", "bcd"):
            updates = {site: torch.randn(5, generator=draw).tolist() for site in present}
            state, found = step(strategy, state, replies_of(updates))

            low, high = state.local_models[state.trained].amin(dim=0), state.local_models[state.trained].amax(dim=0)
            assert (found.aggregates >= low - 1e-5).all()
            assert (found.aggregates <= high + 1e-5).all()


class TestGeneralModel:
    state, _ = step(fedsca(1), None, replies_of({"a": [4.0], "c": [8.0]}, samples={"c": 30}))

    def test_it_is_the_mean_by_prior_of_all_sites_that_ever_trained(self):
        assert fedsca(1).general_model(self.state, 1.0).tolist() == [7.0]
        assert fedsca(1).general_model(self.state, 1.0, "uniform").tolist() == [6.0]
        assert fedsca(1, prior="uniform").general_model(self.state, 1.0).tolist() == [6.0]

    def test_no_site_has_more_of_it_than_the_largest_share(self):
        assert fedsca(1).general_model(self.state, 0.7).tolist() == pytest.approx([0.3 * 4 + 0.7 * 8])

    def test_before_any_training_it_is_refused(self):
        with pytest.raises(NoValidSite, match="no general model"):
            build_strategy("local", {}, flat_layout(3)).general_model(ServerState.initial(2, 3, 1), 1.0)


class TestDefaults:
    layout = TensorLayout((("x",), ("y",)), ("d",), {"x": (2,), "y": (3,), "d": (4,)})

    def test_everything_trains_and_local_training_shares_nothing(self):
        local = build_strategy("local", {}, self.layout)

        assert local.trained() == ("x", "y", "d")
        assert local.shared() == ()
        assert local.groups() == ()
        assert local.local_rule({}, {}).penalty({}, local.phases()[0]) is None

    @pytest.mark.parametrize("strategy", ["local", "fedsca", "fedavg"])
    def test_if_nothing_is_shared_the_weights_are_the_identity(self, strategy, caplog):
        built = build_strategy(strategy, {}, flat_layout())

        with caplog.at_level(logging.WARNING):
            state, found = step(built, None, replies_of({"a": [], "b": []}))
            _, again = step(built, state, replies_of({"b": [], "c": []}, round_=2))

        assert found.accepted == ("a", "b")
        assert found.aggregates.shape == (4, 0)
        assert found.weights.tolist() == [[[1, 0], [0, 1]]]
        assert found.similarity.shape == (1, 2, 2)
        assert found.spread.tolist() == [0, 0]
        assert again.accepted == ("b", "c")
        assert not caplog.records
        assert built.general_model(state, 1.0).shape == (0,)


class TestWarning:
    def test_a_warning_says_that_sites_train_almost_alone(self, caplog):
        sharp = fedsca(1, weighting="softmax", softmax_self=0.97)

        with caplog.at_level(logging.WARNING):
            step(sharp, None, replies_of({"a": [1.0], "b": [1.0]}))

        assert "mean self weight of fedsca is 0.97" in caplog.text

    @pytest.mark.parametrize("updates", [{"a": [1.0], "b": [1.0]}, {"a": [1.0]}])
    def test_a_mix_or_a_single_site_causes_no_warning(self, updates, caplog):
        with caplog.at_level(logging.WARNING):
            step(fedsca(1), None, replies_of(updates))

        assert not caplog.records
