"""FedAvg: one average for every site."""

from __future__ import annotations

import torch
from server_steps import FREE, flat_layout

from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState
from fedsca_pipeline.model.layout import TensorLayout

SITES = ("a", "b", "c")


def aggregate(strategy, state, sites, updates, samples):
    updates = torch.tensor(updates)
    replies = Replies(1, sites, torch.ones(len(SITES), 2), updates, torch.tensor(samples, dtype=torch.float64))
    return strategy.aggregate(state, replies, sites=SITES, initial=torch.zeros(2), limits=FREE)


def test_every_site_receives_the_average_weighted_by_training_images():
    fedavg = build_strategy("fedavg", {}, flat_layout(2))

    _, found = aggregate(fedavg, ServerState.initial(3, 2, 1), ("a", "b"), [[1.0, 0.0], [-3.0, 4.0]], [30, 10])

    assert found.aggregates.tolist() == [[1.0, 2.0]] * 3
    assert found.weights.tolist() == [[[0.75, 0.25], [0.75, 0.25]]]


def test_absent_sites_receive_this_rounds_average_without_being_in_it():
    fedavg = build_strategy("fedavg", {"prior": "uniform"}, flat_layout(2))
    state, _ = aggregate(fedavg, ServerState.initial(3, 2, 1), SITES, [[1.0, 1.0]] * 3, [1, 1, 1])

    state, found = aggregate(fedavg, state, ("b", "c"), [[2.0, 2.0], [4.0, 4.0]], [1, 9])

    assert found.aggregates.tolist() == [[4.0, 4.0]] * 3
    torch.testing.assert_close(fedavg.general_model(state, 1.0), state.local_models.mean(dim=0))


def test_a_zero_update_counts_like_any_other():
    _, found = aggregate(
        build_strategy("fedavg", {}, flat_layout(2)),
        ServerState.initial(3, 2, 1),
        ("a", "b"),
        [[0.0, 0.0], [2.0, 4.0]],
        [1, 1],
    )

    assert found.aggregates.tolist() == [[2.0, 3.0]] * 3


def test_it_shares_all_adapters_and_the_decoder_by_default():
    layout = TensorLayout((("x",), ("y",)), ("d",), {"x": (2,), "y": (3,), "d": (4,)})

    assert build_strategy("fedavg", {}, layout).shared() == ("x", "y", "d")
    assert build_strategy("fedavg", {}, layout).groups() == (slice(0, 9),)
    assert build_strategy("fedavg", {"shared_blocks": "low", "share_decoder": False}, layout).shared() == ("x",)
