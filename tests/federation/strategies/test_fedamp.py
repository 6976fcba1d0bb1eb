"""FedAMP and pFedGraph: similarities of the weights or of their distances from the start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from server_steps import FREE, flat_layout

from fedsca_pipeline.federation.strategies import build_strategy, kernels
from fedsca_pipeline.federation.strategies.rules import Phase
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState

both = pytest.mark.parametrize("name", ["fedamp", "pfedgraph"])


@st.composite
def rounds(draw, least=1, most=5):
    """Draw replies of whole numbers, so that ties, equal and zero updates are common."""
    count, values = draw(st.integers(least, most)), draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3).map(float), min_size=values, max_size=values)
    rows = st.lists(row, min_size=count, max_size=count)
    samples = st.lists(st.integers(1, 50), min_size=count, max_size=count)
    return make(draw(rows), draw(rows), draw(samples)), torch.tensor(draw(row))


def make(updates, bases, samples=None):
    updates = torch.as_tensor(updates)
    samples = torch.ones(len(updates)) if samples is None else torch.tensor(samples)
    sites = tuple(f"s{i}" for i in range(len(updates)))
    return Replies(1, sites, torch.as_tensor(bases), updates, samples.double())


def aggregate(name, replies, initial, sites=None, options=None):
    values = replies.updates.shape[1]
    sites = sites or replies.sites
    return build_strategy(name, options or {}, flat_layout(values)).aggregate(
        ServerState.initial(len(sites), values, 1),
        replies,
        sites=sites,
        initial=initial,
        limits=FREE,
    )[1]


def drawn(count=4, values=50, seed=0):
    draw = torch.Generator().manual_seed(seed)
    updates, bases = (torch.randn(count, values, generator=draw) for _ in range(2))
    return make(updates, bases, [10, 20, 30, 40][:count]), torch.randn(values, generator=draw)


def cosines_of(vectors):
    return torch.nn.functional.cosine_similarity(vectors[:, None].double(), vectors[None].double(), dim=2)


class TestLaws:
    @both
    @given(drawn=rounds())
    def test_rows_sum_to_one_and_none_is_negative(self, name, drawn):
        weights = aggregate(name, *drawn).weights[0]

        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)).double())

    @both
    @given(drawn=rounds(), data=st.data())
    def test_permuting_sites_permutes_the_result(self, name, drawn, data):
        replies, initial = drawn
        order = torch.tensor(data.draw(st.permutations(range(len(replies.sites)))))
        permuted = make(replies.updates[order], replies.bases[order], replies.samples[order].tolist())

        before, after = aggregate(name, replies, initial), aggregate(name, permuted, initial)

        torch.testing.assert_close(after.weights[0], before.weights[0][order][:, order])
        torch.testing.assert_close(after.aggregates, before.aggregates[order], atol=1e-5, rtol=1e-5)

    @both
    @given(drawn=rounds())
    def test_an_aggregate_is_the_sum_of_the_local_models_by_the_row_of_weights(self, name, drawn):
        replies, initial = drawn

        found = aggregate(name, replies, initial)

        theta = (replies.bases + replies.updates).double()
        torch.testing.assert_close(found.aggregates.double(), found.weights[0] @ theta, atol=1e-5, rtol=1e-5)

    @both
    def test_a_single_site_receives_its_own_model(self, name):
        replies, initial = drawn(count=1)

        assert aggregate(name, replies, initial).weights.tolist() == [[[1.0]]]

    @both
    def test_an_absent_site_receives_the_general_model(self, name):
        replies, initial = drawn(count=2)
        bases = torch.cat([replies.bases, torch.zeros(1, 50)])
        found = aggregate(name, make(replies.updates, bases, [10, 30]), initial, sites=("s0", "s1", "s2"))

        theta = replies.bases + replies.updates
        torch.testing.assert_close(found.aggregates[2], 0.25 * theta[0] + 0.75 * theta[1])


class TestSimilarity:
    @pytest.mark.parametrize("columns", [7, 1 << 17])
    def test_fedamp_compares_weights(self, columns, monkeypatch):
        monkeypatch.setattr(kernels, "_COLUMNS", columns)
        replies, initial = drawn()

        found = aggregate("fedamp", replies, initial).similarity[0]

        torch.testing.assert_close(found, cosines_of(replies.bases + replies.updates), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("columns", [7, 1 << 17])
    def test_pfedgraph_compares_distances_from_the_start(self, columns, monkeypatch):
        monkeypatch.setattr(kernels, "_COLUMNS", columns)
        replies, initial = drawn()

        found = aggregate("pfedgraph", replies, initial).similarity[0]

        torch.testing.assert_close(found, cosines_of(replies.bases + replies.updates - initial), atol=1e-6, rtol=1e-6)

    @both
    def test_only_accepted_sites_are_compared(self, name):
        replies, initial = drawn()
        replies.updates[1] = torch.nan
        rest = [0, 2, 3]

        found = aggregate(name, replies, initial)

        theta = (replies.bases + replies.updates - (initial if name == "pfedgraph" else 0))[rest]
        assert found.accepted == ("s0", "s2", "s3")
        torch.testing.assert_close(found.similarity[0], cosines_of(theta), atol=1e-6, rtol=1e-6)
        assert found.aggregates.isfinite().all()


class TestFedAmp:
    @given(drawn=rounds(least=2), own=st.floats(0, 1), temperature=st.floats(0.05, 10))
    def test_a_softmax_of_the_cosines_divides_the_rest_among_the_others(self, drawn, own, temperature):
        replies, initial = drawn
        assume(replies.updates.any(dim=1).all())
        options = {"self_weight": own, "temperature": temperature}

        found = aggregate("fedamp", replies, initial, options=options)

        others = found.similarity[0].fill_diagonal_(-torch.inf) / temperature
        expected = own * torch.eye(len(others)) + (1 - own) * others.softmax(dim=1)
        torch.testing.assert_close(found.weights[0], expected)

    def test_local_steps_are_pulled_to_the_mix(self):
        rule = build_strategy("fedamp", {"mu": 2.0}, flat_layout()).local_rule({"x": torch.zeros(2)}, {})

        assert rule.penalty({"x": torch.tensor([1.0, 2.0])}, Phase(("x",))).item() == 5.0


class TestPFedGraph:
    @pytest.mark.parametrize("alpha", [0.1, 0.8, 5.0])
    @pytest.mark.parametrize("seed", range(4))
    def test_a_row_solves_the_papers_objective(self, alpha, seed):
        replies, initial = drawn(seed=seed, values=3)

        found = aggregate("pfedgraph", replies, initial, options={"alpha": alpha})

        prior = (replies.samples / replies.samples.sum()).numpy()
        for row, c in zip(found.weights[0].numpy(), found.similarity[0].numpy(), strict=True):
            best = minimize(
                lambda w, c=c: alpha * ((w - prior) ** 2).sum() - w @ c,
                prior,
                bounds=[(0, 1)] * len(c),
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                tol=1e-12,
            )
            assert best.success
            assert row == pytest.approx(best.x, abs=1e-4)

    def test_a_strong_pull_to_the_prior_is_fedavg(self):
        replies, initial = drawn()

        found = aggregate("pfedgraph", replies, initial, options={"alpha": 1e6})

        torch.testing.assert_close(found.weights[0], (replies.samples / 100).repeat(4, 1), atol=1e-5, rtol=1e-5)

    @given(seed=st.integers(0, 999), pull=st.floats(1e-3, 10))
    def test_the_local_term_is_minus_lambda_times_the_cosine_with_the_received_tensors(self, seed, pull):
        draw = torch.Generator().manual_seed(seed)
        mine = {n: torch.randn(2, 3, generator=draw).double().requires_grad_() for n in ("x", "y", "own")}
        theirs = {n: torch.randn(2, 3, generator=draw).double() for n in ("y", "x", "not trained")}

        term = (
            build_strategy("pfedgraph", {"pull": pull}, flat_layout())
            .local_rule(theirs, {})
            .penalty(mine, Phase(tuple(mine)))
        )
        term.backward()

        a, b = (torch.cat([part[n].detach().flatten() for n in ("x", "y")]) for part in (mine, theirs))
        cosine = a @ b / (a.norm() * b.norm())
        gradient = -pull * (b / (a.norm() * b.norm()) - cosine * a / a.norm() ** 2)
        torch.testing.assert_close(term.detach(), -pull * cosine)
        torch.testing.assert_close(torch.cat([mine[n].grad.flatten() for n in ("x", "y")]), gradient)
        assert mine["own"].grad is None

    def test_there_is_no_term_if_the_pull_is_zero_or_no_tensor_is_common(self):
        x = {"x": torch.ones(2)}

        assert (
            build_strategy("pfedgraph", {"pull": 0}, flat_layout()).local_rule(x, {}).penalty(x, Phase(("x",))) is None
        )
        assert (
            build_strategy("pfedgraph", {}, flat_layout())
            .local_rule({"y": torch.ones(2)}, {})
            .penalty(x, Phase(("x",)))
            is None
        )

    def test_at_the_start_of_a_round_the_term_has_no_gradient(self):
        x = torch.tensor([3.0, -4.0], requires_grad=True)

        build_strategy("pfedgraph", {}, flat_layout()).local_rule({"x": x.detach()}, {}).penalty(
            {"x": x}, Phase(("x",))
        ).backward()

        torch.testing.assert_close(x.grad, torch.zeros(2), atol=1e-8, rtol=0)

    def test_received_zeros_give_no_direction_and_no_nan(self):
        x = torch.tensor([3.0, -4.0], requires_grad=True)

        build_strategy("pfedgraph", {}, flat_layout()).local_rule({"x": torch.zeros(2)}, {}).penalty(
            {"x": x}, Phase(("x",))
        ).backward()

        assert x.grad.tolist() == [0.0, 0.0]
