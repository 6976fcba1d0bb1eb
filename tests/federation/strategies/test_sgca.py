"""SGCA: the laws of docs/method.md for every weighting, and closed forms computed by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from server_steps import FREE, flat_layout

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies import build_strategy, strategy_options
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState
from fedsca_pipeline.federation.strategies.sgca import (
    WEIGHTINGS,
    FedScaOptions,
    remember,
)
from fedsca_pipeline.federation.strategies.weighting import project_on_simplex, simplex_weights
from fedsca_pipeline.model.layout import TensorLayout

VARIANTS = [
    {"weighting": "gate"},
    {"weighting": "gate", "gate": "hard"},
    {"weighting": "gate", "rho": 0.0, "trust": 1.0},
    {"weighting": "simplex"},
    {"weighting": "softmax"},
    {"weighting": "uniform"},
]
every_weighting = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
every_gate = pytest.mark.parametrize("gate", ["continuous", "hard"])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def make(updates, samples=None, bases=None):
    """Return replies of sites s0, s1, ... from rows of updates."""
    updates = torch.as_tensor(updates, dtype=torch.float32)
    count = len(updates)
    return Replies(
        round=1,
        sites=tuple(f"s{i}" for i in range(count)),
        bases=torch.zeros_like(updates) if bases is None else torch.as_tensor(bases, dtype=torch.float32),
        updates=updates,
        samples=torch.ones(count, dtype=torch.float64) if samples is None else double(*samples),
    )


def run(options, replies, state=None, groups=None, sites=None):
    values = replies.updates.shape[1]
    sites = sites or replies.sites
    groups = groups or (slice(0, values),)
    state = state or ServerState.initial(len(sites), values, len(groups))
    options = {"granularity": "block", "shared_blocks": "all", **options}
    layout = flat_layout(*(group.stop - group.start for group in groups))
    return build_strategy("fedsca", options, layout).aggregate(
        state, replies, sites=sites, initial=torch.zeros(values), limits=FREE
    )


def weights_of(options, replies):
    return run(options, replies)[1].weights[0]


@st.composite
def rounds(draw, least=1, most=5):
    """Draw small whole numbers, so that ties, opposed, equal and zero updates are common and products exact."""
    count, values = draw(st.integers(least, most)), draw(st.integers(1, 4))
    rows = st.lists(st.lists(st.integers(-3, 3), min_size=values, max_size=values), min_size=count, max_size=count)
    samples = st.lists(st.integers(1, 50), min_size=count, max_size=count)
    return make(draw(rows), draw(samples), draw(rows))


class TestLawsOfEveryWeighting:
    @every_weighting
    @given(replies=rounds())
    def test_rows_sum_to_one_and_none_is_negative(self, options, replies):
        weights = weights_of(options, replies)

        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)).double())

    @every_weighting
    @given(replies=rounds(), data=st.data())
    def test_permuting_sites_permutes_the_result(self, options, replies, data):
        order = torch.tensor(data.draw(st.permutations(range(len(replies.sites)))))
        permuted = make(replies.updates[order], replies.samples[order], replies.bases[order])

        _, before = run(options, replies)
        _, after = run(options, permuted)

        torch.testing.assert_close(after.weights[0], before.weights[0][order][:, order])
        torch.testing.assert_close(after.aggregates, before.aggregates[order], atol=1e-5, rtol=1e-5)

    @every_weighting
    @given(replies=rounds(), power=st.integers(-20, 20))
    def test_scaling_all_updates_changes_no_weight(self, options, replies, power):
        scaled = make(replies.updates * 2.0**power, replies.samples, replies.bases)

        torch.testing.assert_close(weights_of(options, scaled), weights_of(options, replies))

    @every_weighting
    @given(replies=rounds())
    def test_a_site_with_a_zero_update_keeps_its_model_and_is_mixed_into_no_other(self, options, replies):
        zero = ~replies.updates.any(dim=1)

        weights = weights_of(options, replies)

        assert torch.equal(weights[zero], torch.eye(len(zero)).double()[zero])
        assert not weights[~zero][:, zero].any()

    @every_weighting
    @given(replies=rounds(), later=st.data())
    def test_the_laws_hold_with_a_memory(self, options, replies, later):
        count = len(replies.sites)
        again = make(later.draw(st.permutations(replies.updates.tolist())), replies.samples, replies.bases)
        again.updates[later.draw(st.integers(0, count - 1))] = 0

        state, _ = run(options, replies)
        _, found = run(options, again, state)

        zero = ~again.updates.any(dim=1)
        weights = found.weights[0]
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(count).double())
        assert torch.equal(weights[zero], torch.eye(count).double()[zero])
        assert not weights[~zero][:, zero].any()

    @every_weighting
    @given(replies=rounds(least=2), later=st.data())
    def test_a_zero_update_is_not_mixed_into_absent_sites(self, options, replies, later):
        count = len(replies.sites)
        here = later.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
        zero = torch.tensor(later.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        updates = replies.updates.masked_fill(zero[:, None], 0)
        elsewhere = replies.bases + 100 * (~updates.any(dim=1))[:, None]
        state, _ = run(options, replies)

        def aggregates_from(bases):
            answered = [row for row in range(count) if here[row]]
            again = Replies(
                round=2,
                sites=tuple(replies.sites[row] for row in answered),
                bases=bases,
                updates=updates[answered],
                samples=replies.samples[answered],
            )
            return run(options, again, state, sites=replies.sites)[1].aggregates

        absent = ~torch.tensor(here)
        assert torch.equal(aggregates_from(replies.bases)[absent], aggregates_from(elsewhere)[absent])

    @every_weighting
    def test_a_single_site_keeps_its_model(self, options):
        _, found = run(options, make([[1.0, 2.0]], bases=[[3.0, 3.0]]))

        assert found.weights.tolist() == [[[1.0]]]
        assert found.aggregates.tolist() == [[4.0, 5.0]]


class TestLawsOfTheGate:
    @every_gate
    @given(replies=rounds(least=2), row=st.lists(st.integers(-3, 3), min_size=4, max_size=4))
    def test_identical_updates_give_every_site_the_same_average_of_weights(self, gate, replies, row):
        update = torch.tensor(row[: replies.updates.shape[1]], dtype=torch.float32)
        assume(update.any())
        same = make(update.expand_as(replies.updates), replies.samples, replies.bases)

        _, found = run({"gate": gate, "memory": False}, same)

        prior = replies.samples / replies.samples.sum()
        torch.testing.assert_close(found.weights[0], prior.expand(len(prior), -1), atol=1e-6, rtol=0)
        average = prior.float() @ (same.bases + same.updates)
        torch.testing.assert_close(found.aggregates, average.expand_as(found.aggregates), atol=1e-5, rtol=1e-5)

    @every_gate
    @pytest.mark.parametrize(
        "updates", [[[1.0, 2.0], [-2.0, -4.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]]
    )
    def test_opposed_zero_and_unrelated_updates_give_the_identity(self, gate, updates):
        replies = make(updates, bases=[[1.0, 2.0], [3.0, 4.0]])

        _, found = run({"gate": gate, "memory": False}, replies)

        assert torch.equal(found.weights[0], torch.eye(2).double())
        assert torch.equal(found.aggregates, replies.bases + replies.updates)

    @given(shift=st.floats(-1e-9, 1e-9))
    def test_the_continuous_gate_does_not_jump_at_its_threshold(self, shift):
        similarity = double([1, 0.8, 0.4 + shift], [0.8, 1, 0], [0.4 + shift, 0, 1])
        options = FedScaOptions()

        found = WEIGHTINGS["gate"](similarity, torch.ones(3, 3, dtype=torch.bool), torch.ones(3).double() / 3, options)

        assert found[0, 2] <= 1e-8


class TestClosedForms:
    similarity = double([1.0, 0.8, 0.6, -0.5], [0.8, 1.0, 0.1, 0.0], [0.6, 0.1, 1.0, 0.15], [-0.5, 0.0, 0.15, 1.0])
    everyone = torch.ones(4, 4, dtype=torch.bool)
    prior = double(0.1, 0.2, 0.3, 0.4)

    def weigh(self, **options):
        chosen = FedScaOptions(**options)
        return WEIGHTINGS[chosen.weighting](self.similarity, self.everyone, self.prior, chosen)

    def test_gate(self):
        found = self.weigh()

        # Row 0: b = .8; g = .8, (.8 - .4) / .5 = .8, (.6 - .4) / .5 = .4, 0; p g = .08, .16, .12, 0; lambda = 1.
        torch.testing.assert_close(found[0], double(0.08, 0.16, 0.12, 0) / 0.36)
        # Row 3: b = .15; g = 0, 0, (.15 - .075) / .5 = .15, .15; p g = .045 and .06; lambda = .5.
        torch.testing.assert_close(found[3], double(0, 0, 0.5 * 0.045 / 0.105, 0.5 * 0.06 / 0.105 + 0.5))

    def test_hard_gate(self):
        found = self.weigh(gate="hard")

        # Row 0: b = .8 and .8, .6 >= .4 stay; p g = .08, .16, .18.
        torch.testing.assert_close(found[0], double(0.08, 0.16, 0.18, 0) / 0.42)

    def test_trust_and_rho(self):
        found = self.weigh(rho=0.25, trust=1.0)

        # Row 0: lambda = .8; g = .8, .8, (.6 - .2) / .75 = .5333.
        mixed = double(0.08, 0.16, 0.16, 0) / 0.40
        torch.testing.assert_close(found[0], 0.8 * mixed + 0.2 * double(1, 0, 0, 0))

    def test_softmax(self):
        found = self.weigh(weighting="softmax")

        rest = double(0.8, 0.6, -0.5).div(0.1).exp()
        torch.testing.assert_close(found[0], torch.cat([double(0.3), 0.7 * rest / rest.sum()]))

    def test_uniform(self):
        assert torch.equal(self.weigh(weighting="uniform"), torch.full((4, 4), 0.25).double())

    def test_simplex(self):
        found = self.weigh(weighting="simplex")

        # Row 0: p + c / 1.6 = .725, .7, .675, .0875; three are in, the threshold is (2.1 - 1) / 3.
        torch.testing.assert_close(found[0], double(0.725, 0.7, 0.675, 0) - double(1.1, 1.1, 1.1, 0) / 3)

    def test_simplex_renormalises_the_prior_over_the_partners(self):
        partners = torch.tensor([[True, True, False, False]]).expand(4, 4) | torch.eye(4, dtype=torch.bool)

        found = simplex_weights(self.similarity, partners, self.prior, penalty=FedScaOptions().simplex_penalty)

        # 1/3 + 1/1.6 and 2/3 + .8/1.6 differ by .2083: (1 -+ .2083) / 2.
        first, second = 1 / 3 + 1 / 1.6, 2 / 3 + 0.8 / 1.6
        torch.testing.assert_close(found[0], double((1 + first - second) / 2, (1 + second - first) / 2, 0, 0))


class TestSimplexProjection:
    @given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.data())
    def test_it_is_the_nearest_point_of_the_simplex(self, point, data):
        allowed = torch.tensor([True] + [data.draw(st.booleans()) for _ in point[1:]])

        found = project_on_simplex(double(*point)[None], allowed[None])[0]

        # Of a closed convex set the nearest point x is the one with (point - x) . (y - x) <= 0 for every vertex y.
        assert found.sum() == pytest.approx(1)
        assert (found >= 0).all()
        assert not found[~allowed].any()
        away = double(*point) - found
        for vertex in torch.eye(len(point)).double()[allowed]:
            assert (away @ (vertex - found)).item() <= 1e-9

    def test_it_agrees_with_a_quadratic_solver(self):
        points = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).double()

        found = project_on_simplex(points, torch.ones(5, 4, dtype=torch.bool))

        for point, nearest in zip(points.numpy(), found, strict=True):
            solved = minimize(
                lambda x, point=point: ((x - point) ** 2).sum(),
                [0.25] * 4,
                bounds=[(0, 1)] * 4,
                constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-14},
            )
            torch.testing.assert_close(nearest, torch.from_numpy(solved.x), atol=1e-5, rtol=0)


class TestMemory:
    def test_a_pair_has_its_first_value_then_the_mean(self):
        memory = torch.full((1, 2, 2), torch.nan).double()
        rows = torch.tensor([0, 1])

        for value, expected in [(0.8, 0.8), (0.4, 0.6), (-0.2, 0.2)]:
            memory = remember(memory, double([[1, value], [value, 1]]), rows)
            assert memory[0, 0, 1] == pytest.approx(expected)

    def test_a_pair_that_did_not_take_part_together_keeps_its_value(self):
        memory = double([[1, 0.5, torch.nan], [0.5, 1, 0.3], [torch.nan, 0.3, 1]])

        found = remember(memory, double([[1, 0.9], [0.9, 1]]), torch.tensor([0, 2]))[0]

        assert found[0].tolist() == [1, 0.5, 0.9]
        assert found[1].tolist() == [0.5, 1, 0.3]

    def test_rounds_average_and_the_weights_use_the_average(self):
        state, _ = run({}, make([[1.0, 0.0], [1.0, 0.0]]))
        state, found = run({}, make([[1.0, 0.0], [0.0, 1.0]]), state)

        assert found.similarity[0, 0, 1] == pytest.approx(0.5)
        assert found.weights[0].flatten().tolist() == pytest.approx([0.5] * 4)

    def test_without_memory_only_this_round_counts(self):
        state, _ = run({"memory": False}, make([[1.0, 0.0], [1.0, 0.0]]))
        _, found = run({"memory": False}, make([[1.0, 0.0], [0.0, 1.0]]), state)

        assert found.similarity[0, 0, 1] == 0
        assert torch.equal(found.weights[0], torch.eye(2).double())

    def test_with_any_memory_a_zero_update_is_not_mixed(self):
        state, _ = run({}, make([[1.0], [1.0], [1.0]]))
        _, found = run({}, make([[1.0], [1.0], [0.0]]), state)

        torch.testing.assert_close(found.weights[0], double([0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]))
        assert found.similarity[0, 0, 2] == pytest.approx(0.5)


class TestGranularity:
    layout = TensorLayout(
        (("b0",), ("b1", "b1x"), ("b2",)),
        ("d0", "d1"),
        {"b0": (2,), "b1": (3,), "b1x": (), "b2": (5,), "d0": (2, 2), "d1": ()},
    )

    def test_model_gives_one_range_and_block_one_per_shared_block(self):
        everything = {"shared_blocks": "all", "share_decoder": True}

        assert build_strategy("fedsca", everything, self.layout).groups() == (slice(0, 16),)
        assert build_strategy("fedsca", {**everything, "granularity": "block"}, self.layout).groups() == (
            slice(0, 2),
            slice(2, 6),
            slice(6, 11),
            slice(11, 16),
        )
        assert build_strategy("fedsca", {"granularity": "block"}, self.layout).groups() == (slice(0, 2), slice(2, 6))
        assert build_strategy("fedsca", {"granularity": "block", "shared_blocks": "none"}, self.layout).groups() == ()

    @every_weighting
    @given(replies=rounds(), split=st.integers(1, 3))
    def test_each_block_has_the_weights_of_a_model_of_that_block(self, options, replies, split):
        values = replies.updates.shape[1]
        groups = tuple(g for g in (slice(0, min(split, values)), slice(min(split, values), values)) if g.start < g.stop)

        _, both = run(options, replies, groups=groups)

        for index, group in enumerate(groups):
            part = make(replies.updates[:, group], replies.samples, replies.bases[:, group])
            _, alone = run(options, part)
            assert torch.equal(both.weights[index], alone.weights[0])
            torch.testing.assert_close(both.aggregates[:, group], alone.aggregates)

    def test_absent_sites_catch_up_block_by_block(self):
        groups, sites = (slice(0, 1), slice(1, 2)), ("s0", "s1", "s2")
        state, _ = run({}, make([[1.0, 1.0], [1.0, -1.0]]), groups=groups, sites=sites)
        later = Replies(2, ("s1",), torch.zeros(3, 2), torch.tensor([[3.0, -3.0]]), double(1))

        _, found = run({}, later, state, groups=groups, sites=sites)

        # s0 resembled s1 in the first block and opposed it in the second; s2 never took part.
        assert found.aggregates[0].tolist() == [2.0, 1.0]
        assert found.aggregates[2].tolist() == [2.0, -1.0]


class TestSharedBlocks:
    blocks = tuple((f"b{i}",) for i in range(5))
    layout = TensorLayout(blocks, ("d", "h"), {**{f"b{i}": (1,) for i in range(5)}, "d": (2,), "h": (3,)}, head=("h",))

    @pytest.mark.parametrize(
        ("chosen", "names"),
        [
            ("low", "b0 b1 b2"),
            ("high", "b3 b4"),
            ("all", "b0 b1 b2 b3 b4"),
            ("none", ""),
            ([4, 1], "b1 b4"),
            ([], ""),
        ],
    )
    def test_a_name_or_a_list_chooses_blocks(self, chosen, names):
        assert build_strategy("fedsca", {"shared_blocks": chosen}, self.layout).shared() == tuple(names.split())

    def test_by_default_the_low_blocks_are_shared_and_the_decoder_is_private(self):
        assert build_strategy("fedsca", {}, self.layout).shared() == ("b0", "b1", "b2")
        assert build_strategy("fedsca", {"share_decoder": True}, self.layout).shared() == ("b0", "b1", "b2", "d", "h")

    @pytest.mark.parametrize("name", ["fedsca", "fedavg", "fedper", "fedsa_lora"])
    def test_the_head_of_the_decoder_can_be_shared_alone(self, name):
        strategy = build_strategy(name, {"share_decoder": "head", "shared_blocks": "none"}, self.layout)

        assert strategy.shared() == ("h",)

    def test_the_error_for_another_part_of_the_decoder_says_what_is_allowed(self):
        with pytest.raises(ConfigError, match=r"strategies\.fedsca\.share_decoder is 'tail': .*true, false, or head"):
            strategy_options("fedsca", {"share_decoder": "tail"})

    def test_the_error_for_a_missing_block_names_it_and_its_key(self):
        with pytest.raises(ConfigError, match=r"strategies\.fedsca\.shared_blocks lists 5, 9, .*Allowed: 0 to 4"):
            build_strategy("fedsca", {"shared_blocks": [9, 0, 5]}, self.layout).shared()
