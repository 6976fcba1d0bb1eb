"""Ditto: a personal model beside the global one."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from server_steps import flat_layout

from fedsca_pipeline.data.arrays import known_classes
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.rules import Phase

STEPS = 3


def distance(one, other):
    return sum((one[name] - other[name]).square().sum() for name in other) ** 0.5


def after_the_first_phase(worker):
    """Start a worker's rounds with the batches that follow those of a first phase."""
    local_steps = worker._local_steps

    def later(this):
        steps = local_steps(this)
        stream = steps.batches
        steps.batches = lambda batches: islice(stream(batches), STEPS, None)
        return steps

    worker._local_steps = later


def test_the_second_of_two_equally_long_phases_is_personal(make_layout):
    layout = make_layout()

    assert build_strategy("ditto", {}, layout).phases() == (
        Phase(layout.efficient),
        Phase(layout.efficient, share=1.0, personal=True),
    )


def test_only_in_the_personal_phase_the_pull_is_half_lambda_times_the_squared_distance():
    rule = build_strategy("ditto", {"pull": 3.0}, flat_layout()).local_rule({"x": torch.tensor([1.0, 1.0])}, {})
    parameters = {"x": torch.tensor([2.0, -1.0])}

    assert rule.penalty(parameters, Phase(("x",))) is None
    assert rule.penalty(parameters, Phase(("x",), personal=True)).item() == 3.0 / 2 * 5.0


@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_the_global_model_is_fedavgs_bit_for_bit(wire_dtype, federate):
    ditto, fedavg = (federate(name, rounds=3, wire_dtype=wire_dtype) for name in ("ditto", "fedavg"))

    for messages, others in ((ditto.sent, fedavg.sent), (ditto.replies, fedavg.replies)):
        assert messages.keys() == others.keys()
        for place, message in messages.items():
            assert all(torch.equal(t, others[place].tensors[name]) for name, t in message.tensors.items())
    assert torch.equal(ditto.checkpoint().aggregates, fedavg.checkpoint().aggregates)


def test_validation_uses_the_personal_copy(federate):
    run = federate("ditto")
    state, last = run.store("a").state_at(8), run.last("a")

    assert state.personal.keys() == last.keys() == run.worker.parameters.keys()
    assert all(torch.equal(last[name], tensor) for name, tensor in state.personal.items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in run.sent[3, "a"].tensors.items())
    run.worker.install(last)
    data = run.fleet.data["a"]
    this = SimpleNamespace(
        batches=run.worker._batches(data, run.store("a")),
        known_classes=known_classes(data, run.worker.settings.classes),
    )
    assert run.records[-1].sites["a"].dice_validation == run.worker._validate(this)


def test_without_a_pull_the_personal_copy_trains_like_a_local_model(federate):
    ditto = federate("ditto", {"pull": 0.0})
    alone = federate("local", change=after_the_first_phase)

    for site in "ab":
        personal, own = ditto.last(site), alone.last(site)
        assert personal.keys() == own.keys()
        assert all(torch.equal(tensor, own[name]) for name, tensor in personal.items())


def test_a_strong_pull_keeps_the_personal_copy_near_the_received_model(federate, make_site):
    data = {"a": make_site("a")}

    def gap(pull):
        run = federate("ditto", {"pull": pull}, rounds=1, local_epochs=10, data=data)
        return distance(run.store("a").state_at(1).personal, run.sent[1, "a"].tensors)

    assert 0 < gap(1e4) < gap(0.0) / 3


def test_the_reported_steps_are_those_of_the_global_model(federate, make_site):
    metrics = federate("ditto", rounds=1, data={"a": make_site("a")}).replies[1, "a"].manifest.metrics

    assert metrics["steps"] == STEPS


def test_an_absent_site_resumes_from_its_personal_copy(federate):
    run = federate("ditto", {"pull": 0.0}, rounds=3, absent={"b": [2]})
    alone = federate("local", rounds=3, absent={"b": [2]}, change=after_the_first_phase)

    assert all(torch.equal(tensor, alone.last("b")[name]) for name, tensor in run.last("b").items())
