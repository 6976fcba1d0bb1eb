"""FedProx: closed form of the proximal term, and its effect on a run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_steps import flat_layout

from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase

PHASE = Phase(("x", "y"))
values = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


def parameters(**given_values):
    return {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in given_values.items()}


@given(x=values, y=values, x0=values, mu=st.floats(1e-3, 1e3))
def test_the_term_is_half_mu_times_the_squared_distance_and_its_gradient_mu_times_the_distance(x, y, x0, mu):
    trained, start = parameters(x=x, y=y), torch.tensor(x0, dtype=torch.float64)
    received = {"x": start, "control:x": start, "not trained": start}

    term = build_strategy("fedprox", {"mu": mu}, flat_layout()).local_rule(received, {}).penalty(trained, PHASE)
    term.backward()

    distance = trained["x"].detach() - start
    torch.testing.assert_close(term.detach(), mu / 2 * (distance**2).sum())
    torch.testing.assert_close(trained["x"].grad, mu * distance)
    assert trained["y"].grad is None


def test_there_is_no_term_if_mu_is_zero_or_no_tensor_is_both_received_and_trained():
    trained = parameters(x=[1.0], y=[1.0])

    assert (
        build_strategy("fedprox", {"mu": 0}, flat_layout())
        .local_rule({"x": torch.zeros(1)}, {})
        .penalty(trained, PHASE)
        is None
    )
    assert (
        build_strategy("fedprox", {}, flat_layout()).local_rule({"z": torch.zeros(1)}, {}).penalty(trained, PHASE)
        is None
    )
    assert LocalRule({"x": torch.zeros(1)}, {}).penalty(trained, PHASE) is None


@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_mu_zero_is_fedavg_bit_for_bit(wire_dtype, federate):
    prox = federate("fedprox", {"mu": 0.0}, wire_dtype=wire_dtype).bits()
    plain = federate("fedavg", wire_dtype=wire_dtype).bits()

    assert prox.keys() == plain.keys()
    assert all(torch.equal(prox[key], plain[key]) for key in prox)


def test_a_large_mu_keeps_updates_small(federate, make_site):
    data = {"a": make_site("a")}

    def length(mu):
        run = federate("fedprox", {"mu": mu}, rounds=1, local_epochs=10, data=data)
        return sum(record.update_norm for record in run.records[0].sites.values())

    plain, held = length(0.0), length(1e4)

    assert 0 < held < plain / 3


def test_the_logged_loss_is_finite_and_includes_the_term(federate, make_site):
    data = {"a": make_site("a")}

    def loss(mu):
        return federate("fedprox", {"mu": mu}, rounds=1, data=data).records[0].sites["a"].loss

    assert loss(0.0) < loss(1e4) < float("inf")
