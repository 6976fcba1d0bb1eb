"""The server's step: validation, Gram matrix, state, mixing, catching up, the general model."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedsca_pipeline.errors import NoValidSite, ResumeError
from fedsca_pipeline.federation.strategies import build_strategy, kernels
from fedsca_pipeline.federation.strategies.kernels import Replies, Results, cosines, gram, renew_and_mix, runs
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState, partners, site_prior
from fedsca_pipeline.model.layout import TensorLayout

SITES = ("a", "b", "c", "d")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def bases_of(bases, values):
    """The bases of all SITES from {site: base}, zeros for the others."""
    return torch.tensor([bases.get(site, [0.0] * values) for site in SITES], dtype=torch.float32).reshape(4, values)


def replies_of(updates, bases=None, samples=None, round_=1):
    """Replies from {site: update}; bases default to zeros, samples to ten each."""
    sites = tuple(sorted(updates))
    stacked = torch.tensor([updates[site] for site in sites], dtype=torch.float32)
    return Replies(
        round=round_,
        sites=sites,
        bases=bases_of(bases or {}, stacked.shape[1]),
        updates=stacked,
        samples=double(*((samples or {}).get(site, 10) for site in sites)),
    )


def step(strategy, state, replies, sites=SITES, groups=None, **more):
    values = replies.updates.shape[1]
    groups = ((slice(0, values),) if values else ()) if groups is None else groups
    state = state or ServerState.initial(len(sites), values, len(groups))
    asked = {"initial": torch.full((values,), -7.0), "max_norm_ratio": 10.0, **more}
    return strategy.aggregate(state, replies, sites=sites, groups=groups, **asked)


class TestValidation:
    fedsca = build_strategy("fedsca", {})

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_value_that_is_not_finite_rejects_its_site_alone(self, bad):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0, 0.0], "b": [bad, 0.0], "c": [1.0, 0.1]}))

        assert found.accepted == ("a", "c")
        assert "not finite" in found.rejected["b"]
        assert found.aggregates.isfinite().all()

    def test_infinities_that_cancel_are_still_seen(self):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0, 1.0], "b": [torch.inf, -torch.inf]}))

        assert "not finite" in found.rejected["b"]

    def test_a_norm_whose_square_leaves_fp32_is_rejected(self):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1e30]}))

        assert found.accepted == ("a",)

    @pytest.mark.parametrize("samples", [0, -3, torch.nan])
    def test_a_sample_count_below_one_rejects_its_site(self, samples):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1.0]}, samples={"b": samples}))

        assert "sample count" in found.rejected["b"]

    def test_of_several_faults_the_values_come_before_the_norm(self):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0, 0], "b": [1e5, torch.nan]}))

        assert "not finite" in found.rejected["b"]

    @pytest.mark.parametrize(("norm", "accepted"), [(10.0, ("a", "b", "c")), (10.1, ("a", "b"))])
    def test_a_norm_may_be_ten_medians_long_and_no_longer(self, norm, accepted):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1.0], "c": [norm]}))

        assert found.accepted == accepted

    def test_of_two_sites_in_the_first_round_the_huge_one_does_not_protect_itself(self):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1000.0]}))

        assert found.accepted == ("a",)
        assert "1e+03 is above 10" in found.rejected["b"]

    def test_half_of_four_sites_do_not_lift_the_bar_either(self):
        _, found = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1.0], "c": [1000.0], "d": [1000.0]}))

        assert found.accepted == ("a", "b")

    def test_a_zero_update_does_not_have_the_others_rejected(self):
        state, found = step(self.fedsca, None, replies_of({"a": [1.0], "b": [0.0], "c": [0.0]}))

        assert found.accepted == ("a", "b", "c")
        assert state.norms.tolist() == [1.0]

    def test_a_lone_first_site_is_taken(self):
        assert step(self.fedsca, None, replies_of({"a": [1000.0]}))[1].accepted == ("a",)

    def test_earlier_rounds_count_and_rejected_norms_do_not(self):
        state, _ = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1.0], "c": [50.0]}))

        assert state.norms.tolist() == [1.0, 1.0]
        with pytest.raises(NoValidSite, match="c: update norm 50 is above 10"):
            step(self.fedsca, state, replies_of({"c": [50.0]}, round_=2))

    def test_no_valid_site_raises_and_leaves_the_state_as_it_was(self):
        state, _ = step(self.fedsca, None, replies_of({"a": [1.0], "b": [1.0]}))
        before = {name: tensor.clone() for name, tensor in state.as_tensors().items()}

        with pytest.raises(NoValidSite, match=r"round 2.*a: values are not finite"):
            step(self.fedsca, state, replies_of({"a": [torch.nan]}, round_=2))

        for name, tensor in state.as_tensors().items():
            assert torch.equal(tensor.nan_to_num(-9), before[name].nan_to_num(-9))

    def test_a_rejected_site_keeps_its_master_and_catches_up_like_an_absent_one(self):
        state, _ = step(self.fedsca, None, replies_of({"a": [1.0, 0.0], "b": [1.0, 0.0]}))

        after, found = step(self.fedsca, state, replies_of({"a": [3.0, 0.0], "b": [torch.nan, 0.0]}, round_=2))

        assert after.masters[1].tolist() == [1.0, 0.0]
        assert found.aggregates[1].tolist() == [2.0, 0.0]


def dense(state, replies, weights):
    """The step's matrix products, undivided, in float64: Gram matrix, masters, aggregates, spread."""
    updates, masters = replies.updates.double(), state.masters.double()
    rows = [SITES.index(site) for site in replies.sites]
    thetas = replies.bases[rows].double() + updates
    masters = masters.index_copy(0, torch.tensor(rows), thetas)
    apart = (thetas - thetas.mean(dim=0)).norm(dim=1) / updates.norm(dim=1)
    return updates @ updates.T, masters, weights @ masters, apart


class TestBlocks:
    @settings(max_examples=40, deadline=None)
    @given(
        values=st.integers(1, 70),
        columns=st.integers(1, 80),
        band=st.integers(1, 6),
        present=st.sets(st.sampled_from(SITES), min_size=1),
        seed=st.integers(0, 1000),
    )
    def test_any_width_of_block_gives_what_undivided_products_give(self, values, columns, band, present, seed):
        draw = torch.Generator().manual_seed(seed)
        state = replace(ServerState.initial(4, values, 1), masters=torch.randn(4, values, generator=draw))
        sites = tuple(sorted(present))
        bases = torch.randn(4, values, generator=draw)
        updates = torch.randn(len(sites), values, generator=draw)
        replies = Replies(1, sites, bases, updates, torch.full((len(sites),), 10.0).double())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_COLUMNS", columns)
            patch.setattr(kernels, "_CACHED", columns * len(SITES))
            patch.setattr(kernels, "_KERNEL", band)
            after, found = step(build_strategy("fedsca", {"weighting": "uniform"}), state, replies, max_norm_ratio=1e6)
            products = gram(updates, (slice(0, values),))[0]
            weights = build_strategy("fedsca", {"weighting": "uniform"}).site_weights(
                after, torch.tensor([SITES.index(site) for site in sites]), torch.ones(1, len(sites)) > 0
            )[0]

        exact, masters, aggregates, apart = dense(state, replies, weights)
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(products, exact, **close)
        torch.testing.assert_close(after.masters.double(), masters, **close)
        torch.testing.assert_close(found.aggregates.double(), aggregates, **close)
        torch.testing.assert_close(found.spread, apart, **close)

    def test_results_are_written_where_asked_to_with_the_same_bits(self):
        draw = torch.Generator().manual_seed(5)
        bases, updates = torch.randn(2, 4, 20_000, generator=draw)
        replies = Replies(1, ("a", "b", "d"), bases, updates[:3], torch.ones(3).double())
        fedsca = build_strategy("fedsca", {})
        out = Results.around(torch.full((4, 20_000), torch.nan), torch.full((4, 20_000), torch.nan))

        state, found = step(fedsca, None, replies)
        same_state, same = step(fedsca, None, replies, out=out)

        assert same_state.masters is out.masters
        assert same.aggregates is out.aggregates
        assert torch.equal(out.masters, state.masters)
        assert torch.equal(out.aggregates, found.aggregates)
        assert torch.equal(same.spread, found.spread)

    def test_masters_may_take_the_place_of_the_updates(self, monkeypatch):
        monkeypatch.setattr(kernels, "_CACHED", 4 * 1024)
        draw = torch.Generator().manual_seed(6)
        bases, updates = torch.randn(2, 4, 20_000, generator=draw)
        fedsca = build_strategy("fedsca", {})
        groups = (slice(0, 7_000), slice(7_000, 20_000))
        before, _ = step(fedsca, None, Replies(1, SITES, bases, updates, torch.ones(4).double()), groups=groups)
        updates[0, 0] = torch.nan
        replies = Replies(2, ("a", "b", "d"), bases, updates[:3], torch.ones(3).double())
        state, found = step(fedsca, before, replies, groups=groups)

        out = Results.around(updates, torch.empty(4, 20_000))
        same_state, same = step(fedsca, before, replies, groups=groups, out=out)

        assert found.accepted == ("b", "d")
        assert torch.equal(same_state.masters, state.masters)
        assert torch.equal(same.aggregates, found.aggregates)
        assert torch.equal(same.spread, found.spread)

    def test_a_round_that_fails_writes_nothing(self):
        out = Results.around(torch.full((4, 1), 7.0), torch.full((4, 1), 7.0))

        with pytest.raises(NoValidSite):
            step(build_strategy("fedsca", {}), None, replies_of({"a": [torch.nan]}), out=out)

        assert out.masters.eq(7).all()
        assert out.aggregates.eq(7).all()


class TestState:
    def test_a_round_does_not_change_the_state_it_was_given(self):
        state = ServerState.initial(4, 2, 1)

        step(build_strategy("fedsca", {}), state, replies_of({"a": [1.0, 2.0], "b": [2.0, 1.0]}))

        assert not state.trained.any()
        assert not state.masters.any()
        assert state.memory.isnan().all()

    def test_masters_are_base_plus_update_and_stay_for_sites_that_are_absent(self):
        fedsca = build_strategy("fedsca", {})
        state, _ = step(fedsca, None, replies_of({"a": [1.0], "b": [2.0]}, bases={"a": [10.0], "b": [20.0]}))
        state, _ = step(fedsca, state, replies_of({"a": [3.0]}, samples={"a": 4}, round_=2))

        assert state.masters.tolist() == [[3.0], [22.0], [0.0], [0.0]]
        assert state.trained.tolist() == [True, True, False, False]
        assert state.samples.tolist() == [4, 10, 0, 0]
        assert state.norms.tolist() == [1.0, 2.0, 3.0]

    @pytest.mark.parametrize("values", [0, 3])
    def test_it_survives_safetensors(self, values):
        updates = {"a": [1.0] * values, "b": [0.5] * values}
        state, _ = step(build_strategy("fedsca", {}), None, replies_of(updates))

        again = ServerState.from_tensors(load(save(state.as_tensors())))

        for name, tensor in state.as_tensors().items():
            stored = getattr(again, name)
            assert stored.dtype == tensor.dtype
            assert stored.numpy().tobytes() == tensor.numpy().tobytes()

    def test_a_missing_tensor_is_named(self):
        tensors = ServerState.initial(2, 3, 1).as_tensors()
        del tensors["memory"]

        with pytest.raises(ResumeError, match="memory"):
            ServerState.from_tensors(tensors)


class TestGramAndCosines:
    def test_it_agrees_with_float64_over_several_chunks_and_groups(self):
        updates = torch.randn(5, 70_001, generator=torch.Generator().manual_seed(0))
        groups = (slice(0, 40_000), slice(40_000, 70_001))

        found = gram(updates, groups)

        for matrix, group in zip(found, groups, strict=True):
            exact = updates[:, group].double() @ updates[:, group].double().T
            torch.testing.assert_close(cosines(matrix), cosines(exact), atol=1e-6, rtol=0)
            # Sums of 40,000 products in fp32: how far they err depends on the processor's kernel, 1e-7 to 1e-6.
            torch.testing.assert_close(matrix.diagonal(), exact.diagonal(), atol=0, rtol=4e-6)
        assert torch.equal(found, found.mT)

    def test_closed_form(self):
        updates = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0], [0.0, 0.0]])

        found = cosines(gram(updates, (slice(0, 2),)))[0]

        expected = [[1, 0.96, -1, 0], [0.96, 1, -0.96, 0], [-1, -0.96, 1, 0], [0, 0, 0, 0]]
        torch.testing.assert_close(found, double(*expected))

    @pytest.mark.parametrize(("length", "cosine"), [(2e-12, 1.0), (5e-13, 0.0)])
    def test_an_update_shorter_than_1e_12_has_no_direction(self, length, cosine):
        found = cosines(gram(torch.tensor([[length], [1.0]]), (slice(0, 1),)))

        assert found[0, 0, 1] == pytest.approx(cosine)

    def test_nan_spoils_its_own_row_and_column_only(self):
        found = gram(torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [2.0, 1.0]]), (slice(0, 2),))[0]

        assert found[[0, 2]][:, [0, 2]].tolist() == [[5, 4], [4, 5]]


class TestPartners:
    def test_the_present_mix_with_the_moved_and_the_absent_with_those_they_know(self):
        present = torch.tensor([True, True, True, False, False])
        moved = torch.tensor([True, True, False, False, False])
        known = torch.zeros(5, 5, dtype=torch.bool)
        known[3, 0] = known[0, 3] = known[3, 3] = known[4, 4] = True

        found = partners(present, moved, known)

        assert found.int().tolist() == [
            [1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [0, 0, 0, 0, 0],
        ]

    def test_an_absent_site_that_knows_none_but_unmoved_ones_keeps_to_itself(self):
        present = torch.tensor([True, False, False])
        known = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])

        found = partners(present, torch.zeros(3, dtype=torch.bool), known)

        assert found.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def mixed(weights, masters, groups, initial):
    """Mix masters to which the one reply, a zero update of the first site, adds nothing."""
    out, first = Results.fresh(*masters.shape), torch.tensor([0])
    replies = Replies(1, ("a",), masters, torch.zeros(1, masters.shape[1]), double(10))
    renew_and_mix(masters, replies, first, first, weights, groups, initial, out)
    return out.aggregates


class TestRenewAndMix:
    masters = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    groups = (slice(0, 2), slice(2, 3))

    def test_each_group_has_its_own_weights(self):
        weights = double([[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [0.25, 0.75]])

        assert mixed(weights, self.masters, self.groups, torch.zeros(3)).tolist() == [[3, 4, 3], [5, 6, 6]]

    def test_a_unit_row_returns_its_master_bit_for_bit(self):
        masters = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))

        assert torch.equal(mixed(torch.eye(3).double()[None], masters, (slice(0, 1000),), torch.zeros(1000)), masters)

    def test_a_row_without_any_weight_gets_the_initial_values_never_zeros(self):
        weights = double([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])

        assert mixed(weights, self.masters, self.groups, double(-1, -2, -3).float())[1].tolist() == [-1, -2, -3]

    def test_only_what_a_site_that_answered_trained_from_is_read(self):
        replies = replies_of({"a": [1.0], "c": [1.0]}, bases={"a": [1.0], "b": [torch.nan], "d": [torch.nan]})

        state, found = step(build_strategy("fedsca", {}), None, replies)

        assert state.masters.flatten().tolist() == [2, 0, 1, 0]
        assert found.aggregates.isfinite().all()


class TestRuns:
    @given(st.lists(st.booleans(), min_size=1), st.data())
    def test_they_cover_what_was_accepted_in_as_few_pieces_as_there_are_gaps(self, answered, data):
        rows = [row for row, here in enumerate(answered) if here]
        valid = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
        kept = [reply for reply, good in enumerate(valid) if good]
        if not kept:
            return
        rows = [rows[reply] for reply in kept]

        found = list(runs(torch.tensor(rows), torch.tensor(kept)))

        assert [row for part, _, _ in found for row in range(part.start, part.stop)] == rows
        assert [reply for _, part, _ in found for reply in range(part.start, part.stop)] == kept
        assert [place for *_, part in found for place in range(part.start, part.stop)] == list(range(len(rows)))
        assert len(found) == 1 + sum(b - a > 1 for a, b in pairwise(rows))

    def test_nobody_absent_is_one_piece(self):
        assert list(runs(torch.arange(5), torch.arange(5))) == [(slice(0, 5),) * 3]


class TestSpread:
    def test_it_is_the_distance_from_the_mean_in_updates_and_0_for_a_zero_update(self):
        updates = {"a": [2.0, 0.0], "b": [0.0, 0.0], "c": [0.0, 1.0]}
        bases = {"a": [-2.0, 0.0], "b": [6.0, 8.0], "c": [3.0, 3.0]}

        assert step(build_strategy("fedsca", {}), None, replies_of(updates, bases))[1].spread.tolist() == [2.5, 0, 0]

    def test_sites_that_did_not_take_part_are_no_part_of_the_mean(self):
        fedsca = build_strategy("fedsca", {})
        state, _ = step(fedsca, None, replies_of({"b": [900.0, 0.0]}))

        replies = replies_of({"a": [600.0, 0.0], "c": [0.0, 900.0]}, {"a": [-600.0, 0.0], "c": [6.0, -892.0]})

        assert step(fedsca, state, replies)[1].spread.tolist() == pytest.approx([5 / 600, 5 / 900])


class TestCatchUp:
    def test_an_absent_site_receives_the_latest_masters_by_its_remembered_similarities(self):
        fedsca = build_strategy("fedsca", {"prior": "uniform"})
        state, _ = step(fedsca, None, replies_of({"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 1.0]}))

        _, found = step(fedsca, state, replies_of({"b": [2.0, 4.0], "c": [0.0, 9.0]}, round_=2))

        # a knows b (similarity 1, the best) and c (0): half its own master, half b's latest.
        assert found.aggregates[0].tolist() == [1.5, 2.0]

    def test_a_site_that_resembled_nobody_goes_on_from_its_own_master(self):
        fedsca = build_strategy("fedsca", {})
        state, _ = step(fedsca, None, replies_of({"a": [1.0], "b": [-1.0]}))

        _, found = step(fedsca, state, replies_of({"b": [-1.0]}, round_=2))

        assert found.aggregates[0].tolist() == [1.0]

    def test_a_site_nobody_has_met_receives_the_general_model(self):
        fedsca = build_strategy("fedsca", {})
        samples = {"a": 10, "b": 30}

        state, found = step(fedsca, None, replies_of({"a": [4.0], "b": [8.0]}, samples=samples))

        assert found.aggregates[2].tolist() == [7.0]
        assert found.aggregates[2:].equal(fedsca.general_model(state).expand(2, 1))

    def test_without_memory_every_absent_site_receives_the_general_model(self):
        fedsca = build_strategy("fedsca", {"memory": False, "prior": "uniform"})
        state, _ = step(fedsca, None, replies_of({"a": [1.0], "b": [1.0]}))

        _, found = step(fedsca, state, replies_of({"b": [5.0]}, round_=2))

        assert found.aggregates[0].tolist() == [3.0]

    def test_the_absent_are_not_mixed_in(self):
        fedsca = build_strategy("fedsca", {})
        state, _ = step(fedsca, None, replies_of({"a": [1.0], "b": [1.0], "c": [5.0]}))

        _, found = step(fedsca, state, replies_of({"a": [2.0], "b": [2.0]}, round_=2))

        assert found.aggregates[:2].tolist() == [[2.0], [2.0]]

    @pytest.mark.parametrize("weighting", ["gate", "simplex", "softmax", "uniform"])
    def test_every_row_is_finite_and_a_mix_whoever_is_absent(self, weighting):
        fedsca = build_strategy("fedsca", {"weighting": weighting})
        draw = torch.Generator().manual_seed(2)
        state = None
        for present in ("ab", "cd", "a", "bcd"):
            updates = {site: torch.randn(5, generator=draw).tolist() for site in present}
            state, found = step(fedsca, state, replies_of(updates))

            low, high = state.masters[state.trained].amin(dim=0), state.masters[state.trained].amax(dim=0)
            assert (found.aggregates >= low - 1e-5).all()
            assert (found.aggregates <= high + 1e-5).all()


class TestGeneralModel:
    state, _ = step(build_strategy("fedsca", {}), None, replies_of({"a": [4.0], "c": [8.0]}, samples={"c": 30}))

    def test_it_is_the_priors_mean_of_all_that_ever_trained(self):
        fedsca = build_strategy("fedsca", {})

        assert fedsca.general_model(self.state).tolist() == [7.0]
        assert fedsca.general_model(self.state, "uniform").tolist() == [6.0]
        assert build_strategy("fedsca", {"prior": "uniform"}).general_model(self.state).tolist() == [6.0]

    def test_the_prior_leaves_out_who_never_trained(self):
        assert site_prior(self.state, "uniform").tolist() == [0.5, 0.0, 0.5, 0.0]
        assert site_prior(ServerState.initial(2, 1, 1), "uniform").tolist() == [0.0, 0.0]

    def test_before_any_training_there_is_none(self):
        with pytest.raises(NoValidSite, match="no general model"):
            build_strategy("local", {}).general_model(ServerState.initial(2, 3, 1))


class TestDefaults:
    layout = TensorLayout((("x",), ("y",)), ("d",), {"x": (2,), "y": (3,), "d": (4,)})

    def test_all_train_and_local_shares_nothing(self):
        local = build_strategy("local", {})

        assert local.trained(self.layout) == ("x", "y", "d")
        assert local.shared(self.layout) == ()
        assert local.groups(self.layout) == ()
        assert local.local_rule({}, {}).penalty({}, local.phases(self.layout)[0]) is None

    @pytest.mark.parametrize("strategy", ["local", "fedsca", "fedavg"])
    def test_where_nothing_is_shared_the_weights_are_the_identity(self, strategy, caplog):
        built = build_strategy(strategy, {})

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
        assert built.general_model(state).shape == (0,)


class TestWarning:
    def test_sites_that_train_almost_alone_are_warned_of(self, caplog):
        sharp = build_strategy("fedsca", {"weighting": "softmax", "softmax_self": 0.97})

        with caplog.at_level(logging.WARNING):
            step(sharp, None, replies_of({"a": [1.0], "b": [1.0]}))

        assert "mean self weight of fedsca is 0.97" in caplog.text

    @pytest.mark.parametrize("updates", [{"a": [1.0], "b": [1.0]}, {"a": [1.0]}])
    def test_a_mix_or_a_lone_site_is_no_reason_to_warn(self, updates, caplog):
        with caplog.at_level(logging.WARNING):
            step(build_strategy("fedsca", {}), None, replies_of(updates))

        assert not caplog.records
