"""FedSCA's ablations apart from its weighting: comparing weights, a pull of local steps, LAT without SGCA."""

from __future__ import annotations

import pytest
import torch
from server_steps import FREE, flat_layout

from fedsca_pipeline.federation.strategies import build_strategy, kernels
from fedsca_pipeline.federation.strategies.rules import Phase
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState

SITES = ("a", "b", "c")
GROUPS = (slice(0, 8), slice(8, 20))


def aggregate(options, seed=0):
    draw = torch.Generator().manual_seed(seed)
    bases, updates = (torch.randn(3, 20, generator=draw) for _ in range(2))
    options = {"granularity": "block", "shared_blocks": "all", **options}
    _, found = build_strategy("fedsca", options, flat_layout(8, 12)).aggregate(
        ServerState.initial(3, 20, 2),
        Replies(1, SITES, bases, updates.clone(), torch.ones(3).double()),
        sites=SITES,
        initial=torch.randn(20, generator=draw),
        limits=FREE,
    )
    return found, bases, updates


@pytest.mark.parametrize("columns", [3, 1 << 17])
@pytest.mark.parametrize("compare", ["updates", "weights"])
def test_similarities_are_cosines_of_updates_or_weights_in_each_group(compare, columns, monkeypatch):
    monkeypatch.setattr(kernels, "_COLUMNS", columns)

    found, bases, updates = aggregate({"compare": compare})

    compared = (updates if compare == "updates" else bases + updates).double()
    for similarity, group in zip(found.similarity, GROUPS, strict=True):
        part = compared[:, group]
        expected = torch.nn.functional.cosine_similarity(part[:, None], part[None], dim=2)
        torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=1e-6)


def test_mu_pulls_the_shared_tensors_to_the_aggregate():
    trained = {"low": torch.tensor([1.0, 3.0]), "private": torch.ones(2)}

    rule = build_strategy("fedsca", {"mu": 0.5}, flat_layout()).local_rule({"low": torch.tensor([0.0, 1.0])}, {})

    assert rule.penalty(trained, Phase(tuple(trained))).item() == 0.25 * 5
    plain = build_strategy("fedsca", {}, flat_layout()).local_rule({"low": torch.zeros(2)}, {})
    assert plain.penalty(trained, Phase(tuple(trained))) is None


def test_mu_changes_a_run_and_defaults_to_zero(federate):
    plain, zero, held = (federate("fedsca", options).bits() for options in ({}, {"mu": 0.0}, {"mu": 100.0}))

    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert any(not torch.equal(plain[key], held[key]) for key in plain)


def test_fedavg_low_is_fedavg_of_the_tensors_that_fedsca_sends(federate, make_layout):
    layout = make_layout()
    low, fedsca = (build_strategy(name, {}, layout) for name in ("fedavg_low", "fedsca"))

    assert low.wire_shapes() == fedsca.wire_shapes()
    one = federate("fedavg_low").bits()
    other = federate("fedavg", {"shared_blocks": "low", "share_decoder": False}).bits()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_step_multiplies_every_update():
    found, bases, updates = aggregate({"weighting": "uniform", "step": 2.0})

    torch.testing.assert_close(found.aggregates, (bases + 2 * updates).mean(dim=0).expand(3, -1))
