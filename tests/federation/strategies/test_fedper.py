"""FedPer and FedRep: a shared body and a private head, trained together or one after the other."""

from __future__ import annotations

import pytest
import torch

from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.rules import Phase


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_adapters_are_shared_and_the_decoder_is_private(name, make_layout):
    layout = make_layout()
    strategy = build_strategy(name, {}, layout)

    assert strategy.shared() == layout.adapters
    assert strategy.trained() == layout.efficient


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_after_a_run_bodies_are_equal_and_heads_are_not(name, federate):
    run = federate(name)
    one, other = run.last("a"), run.last("b")

    assert all(torch.equal(one[n], other[n]) for n in run.layout.adapters)
    assert any(not torch.equal(one[n], other[n]) for n in run.layout.decoder)


def test_fedper_is_fedavg_without_the_decoder_bit_for_bit(federate):
    one, other = (federate(name, {"share_decoder": False}).bits() for name in ("fedper", "fedavg"))

    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_fedrep_trains_the_head_then_the_body(make_layout):
    layout = make_layout()

    assert build_strategy("fedrep", {"head_share": 0.25}, layout).phases() == (
        Phase(layout.decoder, 0.25),
        Phase(layout.adapters, 0.75),
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [({"shared_blocks": "none"}, "efficient"), ({"share_decoder": True}, "efficient")],
    ids=["no body", "no head"],
)
def test_without_private_or_without_shared_tensors_one_phase_has_all_steps(options, part, make_layout):
    layout = make_layout()

    assert build_strategy("fedrep", options, layout).phases() == (Phase(getattr(layout, part), 1.0),)


@pytest.mark.parametrize(("head_share", "head", "body"), [(0.5, 4, 4), (0.25, 2, 6), (0.01, 1, 8), (0.99, 8, 1)])
def test_a_phase_moves_only_its_tensors_and_has_its_share_of_steps(head_share, head, body, federate):
    seen = []

    def watch(worker):
        run_phase = worker._run_phase

        def watched(phase, stream, *rest):
            before, batches = worker._tensors(), list(stream)
            run_phase(phase, iter(batches), *rest)
            after = worker._tensors()
            moved = {name for name in after if not torch.equal(before[name], after[name])}
            seen.append((phase, len(batches), moved))

        worker._run_phase = watched

    run = federate("fedrep", {"head_share": head_share}, rounds=1, steps_per_round=8, change=watch)

    (first, head_steps, head_moved), (second, body_steps, body_moved) = seen[:2]
    assert (head_steps, body_steps) == (head, body)
    assert first.trained == run.layout.decoder
    assert second.trained == run.layout.adapters
    assert head_moved
    assert head_moved <= set(run.layout.decoder)
    assert body_moved
    assert body_moved <= set(run.layout.adapters)
    assert run.replies[1, "a"].manifest.metrics["steps"] == head + body


def test_the_head_trains_on_the_received_body_and_the_body_on_the_new_head(federate):
    run = federate("fedrep", rounds=1, steps_per_round=4)

    private = run.store("a").state_at(1).private
    assert private.keys() == set(run.layout.decoder)
    assert any(not torch.equal(tensor, run.worker.initial[name]) for name, tensor in private.items())
    assert any(tensor.any() for tensor in run.replies[1, "a"].tensors.values())
