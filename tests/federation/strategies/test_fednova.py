"""FedNova: updates scaled to the same number of steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_steps import FREE, flat_layout

from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState

SITES = ("a", "b", "c", "d")
LAYOUT = flat_layout(5)
seeds, counts = st.integers(0, 999), st.integers(1, 60)


def aggregate(strategy, steps, samples, seed=0, sites=SITES, updates=None):
    draw = torch.Generator().manual_seed(seed)
    bases, drawn = torch.randn(4, 5, generator=draw), torch.randn(len(sites), 5, generator=draw)
    replies = Replies(
        round=1,
        sites=sites,
        bases=bases,
        updates=drawn if updates is None else updates,
        samples=torch.tensor(samples).double(),
        steps=None if steps is None else torch.tensor(steps).double(),
    )
    _, found = strategy.aggregate(
        ServerState.initial(4, 5, 1),
        replies,
        sites=SITES,
        initial=torch.zeros(5),
        limits=FREE,
    )
    return found, replies


@given(seed=seeds, steps=counts, samples=st.lists(counts, min_size=4, max_size=4))
def test_equal_steps_are_fedavg_bit_for_bit(seed, steps, samples):
    nova, _ = aggregate(build_strategy("fednova", {}, LAYOUT), [steps] * 4, samples, seed)
    average, _ = aggregate(build_strategy("fedavg", {}, LAYOUT), [steps] * 4, samples, seed)

    assert torch.equal(nova.aggregates, average.aggregates)


def test_unknown_steps_count_as_equal_steps():
    nova, _ = aggregate(build_strategy("fednova", {}, LAYOUT), None, [1, 2, 3, 4])
    average, _ = aggregate(build_strategy("fedavg", {}, LAYOUT), None, [1, 2, 3, 4])

    assert torch.equal(nova.aggregates, average.aggregates)


@pytest.mark.parametrize("prior", ["samples", "uniform"])
@given(data=st.data(), seed=seeds, size=st.integers(1, 4))
def test_the_closed_form_with_unequal_steps_and_samples(prior, data, seed, size):
    sites = tuple(sorted(data.draw(st.permutations(SITES))[:size]))
    some = st.lists(counts, min_size=size, max_size=size)
    steps, samples = data.draw(some), data.draw(some)

    found, replies = aggregate(build_strategy("fednova", {"prior": prior}, LAYOUT), steps, samples, seed, sites)

    p = torch.tensor(samples if prior == "samples" else [1] * size).double()
    p, tau = p / p.sum(), torch.tensor(steps).double()
    bases = replies.bases[[SITES.index(site) for site in sites]].double()
    expected = p @ bases + (p @ tau) * ((p / tau) @ replies.updates.double())
    torch.testing.assert_close(found.aggregates.double(), expected.expand(4, 5), rtol=1e-4, atol=1e-4)


@given(steps=st.lists(counts, min_size=4, max_size=4), samples=st.lists(counts, min_size=4, max_size=4))
def test_sites_with_the_same_step_move_by_the_mean_number_of_steps(steps, samples):
    way = torch.tensor([1.0, -2.0, 0.5, 0.0, 4.0])
    updates = torch.tensor(steps, dtype=torch.float32)[:, None] * way

    found, replies = aggregate(build_strategy("fednova", {}, LAYOUT), steps, samples, updates=updates)

    p = torch.tensor(samples).double() / sum(samples)
    moved = found.aggregates.double() - p @ replies.bases.double()
    expected = (p @ torch.tensor(steps).double()) * way
    torch.testing.assert_close(moved, expected.expand(4, 5).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [0.0, -1.0, 0.5, float("nan"), float("inf")])
def test_a_site_with_an_unusable_number_of_steps_is_rejected_alone(steps):
    found, _ = aggregate(build_strategy("fednova", {}, LAYOUT), [3.0, steps, 3.0, 3.0], [1, 1, 1, 1])

    assert found.accepted == ("a", "c", "d")
    assert "steps" in found.rejected["b"]
    assert found.aggregates.isfinite().all()


def test_a_run_of_sites_with_unequal_images_follows_the_closed_form(federate, write_site):
    counts = {"a": 3, "b": 8, "c": 5}
    data = {name: SiteArrays(*write_site(name, seed, count)) for seed, (name, count) in enumerate(counts.items())}

    run = federate("fednova", data=data, rounds=1)

    replies = [run.replies[1, site] for site in counts]
    steps, samples = ([r.manifest.metrics["steps"] for r in replies], [r.manifest.samples for r in replies])
    assert (steps, samples) == ([2, 4, 3], [3, 8, 5])
    shares = [count / sum(samples) for count in samples]
    tau = sum(share * number for share, number in zip(shares, steps, strict=True))
    for name, received in run.sent[2, "a"].tensors.items():
        expected = run.sent[1, "a"].tensors[name] + sum(
            share * tau / number * reply.tensors[name]
            for share, number, reply in zip(shares, steps, replies, strict=True)
        )
        torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-7)
