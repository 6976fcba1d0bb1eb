"""SCAFFOLD: controls computed by hand, the server's control, and the values on the wire."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_steps import FREE

from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.site.steps import ignore_step
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.rules import Phase
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState
from fedsca_pipeline.model.layout import TensorLayout, hash_tensors

SITES = ("a", "b", "c")
LAYOUT = TensorLayout((("x",),), ("d",), {"x": (2,), "d": (1,)})
PHASE = Phase(("x", "d"))
strategy = build_strategy("scaffold", {"share_decoder": False}, LAYOUT)
whole = st.integers(-8, 8).map(float)
vectors = st.lists(whole, min_size=2, max_size=2)


def drive(rule, gradients):
    """Give a rule one gradient of ``x`` per step; return the corrected gradients."""
    x, found = torch.zeros(2, requires_grad=True), []
    for gradient in gradients:
        x.grad = torch.tensor(gradient)
        rule.correct({"x": x, "d": torch.zeros(1, requires_grad=True)}, PHASE)
        found.append(x.grad)
    return torch.stack(found)


def aggregate(state, updates, bases, sites=SITES, chosen=strategy):
    """Return state and result of a step; ``updates`` [S, 4] are of two weights and their two controls."""
    replies = Replies(
        1, sites, bases, torch.as_tensor(updates), torch.tensor([10.0, 30.0, 50.0]).double()[: len(sites)]
    )
    return chosen.aggregate(
        state or ServerState.initial(3, 4, 2),
        replies,
        sites=SITES,
        initial=torch.zeros(4),
        limits=FREE,
    )


class TestRule:
    @given(gradients=st.lists(vectors, min_size=1, max_size=6), server=vectors, own=vectors)
    def test_a_gradient_becomes_g_minus_the_sites_control_plus_the_servers(self, gradients, server, own):
        received = {"x": torch.zeros(2), "control:x": torch.tensor(server)}
        rule = strategy.local_rule(received, {"x": torch.tensor(own)})

        found = drive(rule, gradients)

        assert torch.equal(found, torch.tensor(gradients) - torch.tensor(own) + torch.tensor(server))

    @given(gradients=st.lists(vectors, min_size=1, max_size=6), server=vectors, own=vectors)
    def test_the_new_control_is_the_mean_of_raw_gradients_and_its_change_is_sent(self, gradients, server, own):
        received = {"x": torch.zeros(2), "control:x": torch.tensor(server)}
        rule = strategy.local_rule(received, {"x": torch.tensor(own)})

        drive(rule, gradients)

        mean = torch.tensor(gradients).mean(dim=0)
        torch.testing.assert_close(rule.next_state()["x"], mean)
        torch.testing.assert_close(rule.extra_tensors()["control:x"] - torch.tensor(server), mean - torch.tensor(own))

    def test_without_any_control_gradients_stay_as_they_are(self):
        rule = strategy.local_rule({"x": torch.ones(2), "control:x": torch.zeros(2)}, {})

        assert drive(rule, [[1.0, -2.0]]).tolist() == [[1.0, -2.0]]

    def test_private_tensors_and_those_without_a_gradient_stay_as_they_are(self):
        rule = strategy.local_rule({"x": torch.zeros(2), "control:x": torch.ones(2)}, {})
        parameters = {"x": torch.zeros(2, requires_grad=True), "d": torch.zeros(1, requires_grad=True)}
        parameters["d"].grad = torch.ones(1)

        rule.correct(parameters, PHASE)

        assert parameters["x"].grad is None
        assert parameters["d"].grad.tolist() == [1.0]
        assert rule.next_state().keys() == {"x"}


class TestServer:
    @given(
        start=vectors,
        rows=st.lists(st.tuples(vectors, vectors), min_size=1, max_size=3),
        which=st.permutations(SITES),
    )
    def test_its_control_moves_by_the_sum_of_changes_divided_by_the_number_of_all_sites(self, start, rows, which):
        present = tuple(sorted(which[: len(rows)]))
        updates = torch.tensor([weights + controls for weights, controls in rows])
        bases = torch.tensor([1.0, 2.0, *start]).repeat(3, 1)

        _, found = aggregate(None, updates, bases, present)

        weights, controls = found.aggregates.split(2, dim=1)
        torch.testing.assert_close(controls, (torch.tensor(start) + updates[:, 2:].sum(dim=0) / 3).expand(3, 2))
        torch.testing.assert_close(weights, (torch.tensor([1.0, 2.0]) + updates[:, :2].mean(dim=0)).expand(3, 2))

    def test_a_rejected_site_counts_as_absent(self):
        updates = torch.ones(3, 4)
        updates[1] = torch.nan

        _, found = aggregate(None, updates, torch.zeros(3, 4))

        torch.testing.assert_close(found.aggregates, torch.tensor([1.0, 1.0, 2 / 3, 2 / 3]).expand(3, 4))

    def test_sites_with_the_same_gradients_are_not_corrected(self):
        bases, kept, state = torch.zeros(3, 4), {}, None
        for gradients in ([[1.0, 2.0], [3.0, -4.0]], [[0.5, 0.0]], [[2.0, 2.0]]):
            base = {"x": bases[0, :2], "control:x": bases[0, 2:]}
            rule = strategy.local_rule(base, kept)

            corrected = drive(rule, gradients)

            torch.testing.assert_close(corrected, torch.tensor(gradients), rtol=0, atol=1e-6)
            kept, change = rule.next_state(), rule.extra_tensors()["control:x"] - base["control:x"]
            state, found = aggregate(state, torch.cat([torch.ones(2), change]).repeat(3, 1), bases)
            bases = found.aggregates.clone()
            torch.testing.assert_close(bases[0, 2:], kept["x"])

    @given(
        rounds=st.lists(st.sets(st.sampled_from(SITES), min_size=1), min_size=1, max_size=5), seed=st.integers(0, 99)
    )
    def test_its_control_is_the_mean_of_all_sites_controls_with_any_sites_absent(self, rounds, seed):
        generator = torch.Generator().manual_seed(seed)
        kept, bases, state = {site: torch.zeros(2) for site in SITES}, torch.zeros(3, 4), None
        for present in map(sorted, rounds):
            updates = []
            for site in present:
                rule = strategy.local_rule({"control:x": bases[0, 2:]}, {"x": kept[site]})
                drive(rule, torch.randn(3, 2, generator=generator).tolist())
                kept[site] = rule.next_state()["x"]
                updates.append(torch.cat([torch.zeros(2), rule.extra_tensors()["control:x"] - bases[0, 2:]]))
            state, found = aggregate(state, torch.stack(updates), bases, tuple(present))
            bases = found.aggregates.clone()

        torch.testing.assert_close(bases[:, 2:], torch.stack(list(kept.values())).mean(dim=0).expand(3, 2))


class TestRun:
    def test_twice_as_many_values_as_in_fedavg_cross_the_wire(self, federate, make_layout):
        run = federate("scaffold")
        sizes = {
            name: sum(
                torch.Size(shape).numel() for shape in build_strategy(name, {}, make_layout()).wire_shapes().values()
            )
            for name in ("fedavg", "scaffold")
        }

        assert sizes["scaffold"] == 2 * sizes["fedavg"]
        for messages in (run.sent, run.replies):
            values = sum(tensor.numel() for tensor in messages[2, "a"].tensors.values())
            assert values == sizes["scaffold"]

    def test_controls_start_as_zeros_and_the_servers_is_the_mean_of_the_sites(self, federate):
        run = federate("scaffold")

        first = {n: t for n, t in run.sent[1, "a"].tensors.items() if n.startswith("control:")}
        final = {n.removeprefix("control:"): t for n, t in run.sent[3, "a"].tensors.items() if n.startswith("control:")}
        kept = [run.store(site).state_at(8).rule_state for site in "ab"]
        assert first
        assert not any(tensor.any() for tensor in first.values())
        assert final.keys() == kept[0].keys()
        for name, control in final.items():
            torch.testing.assert_close(control, (kept[0][name] + kept[1][name]) / 2, rtol=1e-5, atol=1e-6)
        assert any(tensor.any() for tensor in final.values())

    def test_the_first_round_equals_fedavg_and_the_second_does_not(self, federate):
        runs = [federate(name, {"prior": "uniform"}) for name in ("scaffold", "fedavg")]

        for name, update in runs[1].replies[1, "a"].tensors.items():
            assert torch.equal(update, runs[0].replies[1, "a"].tensors[name])
        one, other = (run.replies[2, "a"].tensors for run in runs)
        assert any(not torch.equal(update, one[name]) for name, update in other.items())

    @pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
    def test_a_repeated_round_gets_the_same_answer(self, wire_dtype, make_worker, make_site, tmp_path):
        worker, data, store = make_worker("scaffold", wire_dtype), make_site("a"), SiteStore(tmp_path / "a", "run")

        def answer(round_):
            tensors = {name: worker.initial.get(name, torch.full(s, 0.01)) for name, s in worker.shapes.items()}
            manifest = Manifest(
                kind="aggregate",
                run="run",
                round=round_,
                site="a",
                base_hash=hash_tensors(tensors),
                samples=0,
                # A site that has no base gets no difference: not even int8 sends one to begin with.
                dtype="fp32" if wire_dtype == "fp32" else "fp16",
                relative=False,
            )
            return decode(worker.work(encode(manifest, tensors), round_, "a", data, store, ignore_step)).tensors

        answer(1)
        first, second = answer(2), answer(2)

        assert all(torch.equal(first[name], second[name]) for name in first)
