"""FedSA-LoRA, FFA-LoRA and FLAP-SAM: which factors train, which are shared, and their averages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from server_steps import FREE

from fedsca_pipeline.config import AdaptersConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies import STRATEGIES, build_strategy, strategy_class, strategy_options
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState
from fedsca_pipeline.model.layout import TensorLayout

LORA = AdaptersConfig(method="lora", options={"r": 2})
A, B = "blocks.0.qkv.lora_A.default.weight", "blocks.0.qkv.lora_B.default.weight"
LAYOUT = TensorLayout(((A, B),), ("d",), {A: (2, 5), B: (4, 2), "d": (3,)})
FOR_LORA = ("fedsa_lora", "ffa_lora", "flap_sam")
every = pytest.mark.parametrize("name", FOR_LORA)
SITES = ("a", "b", "c")


def aggregate(name, thetas, samples):
    """Return the vector that every site receives; ``thetas`` [3, V] are in the order of the strategy's wire."""
    strategy = build_strategy(name, {}, LAYOUT)
    replies = Replies(1, SITES, torch.zeros_like(thetas), thetas, torch.tensor(samples).double())
    _, found = strategy.aggregate(
        ServerState.initial(3, thetas.shape[1], len(strategy.groups())),
        replies,
        sites=SITES,
        initial=torch.zeros(thetas.shape[1]),
        limits=FREE,
    )
    torch.testing.assert_close(found.aggregates, found.aggregates[:1].expand(3, -1))
    return found.aggregates[0]


@pytest.mark.parametrize(
    ("name", "trained", "shared"),
    [
        ("fedsa_lora", (A, B, "d"), (A,)),
        ("ffa_lora", (B, "d"), (B,)),
        ("flap_sam", (A, B, "d"), (A, B)),
    ],
)
def test_which_factors_train_and_which_are_shared(name, trained, shared):
    strategy, whole = build_strategy(name, {}, LAYOUT), build_strategy(name, {"share_decoder": True}, LAYOUT)

    assert strategy.trained() == trained
    assert strategy.shared() == shared
    assert whole.shared() == (*shared, "d")


@every
@pytest.mark.parametrize("method", ["fel", "ia3"])
def test_refusing_other_adapters_names_both_keys(name, method):
    with pytest.raises(ConfigError, match=rf"federation\.strategy {name} needs adapters\.method lora.*{method!r}"):
        strategy_class(name).check_use(strategy_options(name, {}), method)
    strategy_class(name).check_use(strategy_options(name, {}), "LoRA")


@pytest.mark.parametrize("method", ["fel", "lora"])
def test_all_other_strategies_accept_any_adapters(method):
    for name in set(STRATEGIES) - set(FOR_LORA):
        options = strategy_options(name, {"allow_pooling": True} if name == "centralised" else {})
        strategy_class(name).check_use(options, method)


@every
def test_they_have_no_option_for_merging_factors(name):
    with pytest.raises(ConfigError, match=rf"strategies\.{name}\.lora_merge is no option"):
        strategy_options(name, {"lora_merge": "svd"})


@settings(max_examples=30)
@given(seed=st.integers(0, 999), samples=st.lists(st.integers(1, 50), min_size=3, max_size=3))
def test_ffas_average_of_b_gives_the_average_of_the_products(seed, samples):
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, generator=draw), torch.randn(3, 4, 2, generator=draw)

    found = aggregate("ffa_lora", b.flatten(1), samples).reshape(4, 2)

    shares = torch.tensor(samples).double() / sum(samples)
    expected = torch.einsum("s,skl->kl", shares, (b @ a).double())
    torch.testing.assert_close((found @ a).double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), samples=st.lists(st.integers(1, 50), min_size=3, max_size=3))
def test_flap_sams_merge_is_the_truncated_svd_of_the_averaged_product(seed, samples):
    thetas = torch.randn(3, 18, generator=torch.Generator().manual_seed(seed))
    products = thetas[:, 10:].reshape(3, 4, 2) @ thetas[:, :10].reshape(3, 2, 5)

    found = aggregate("flap_sam", thetas, samples)

    shares = torch.tensor(samples).double() / sum(samples)
    u, s, v = torch.linalg.svd(torch.einsum("s,skl->kl", shares, products.double()))
    merged = found[10:].reshape(4, 2) @ found[:10].reshape(2, 5)
    torch.testing.assert_close(merged.double(), u[:, :2] * s[:2] @ v[:2], atol=1e-4, rtol=1e-4)


def test_fedsa_averages_a():
    thetas = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(
        aggregate("fedsa_lora", thetas, [1, 1, 2]), (thetas * torch.tensor([[0.25], [0.25], [0.5]])).sum(0)
    )


@every
def test_after_a_run_shared_factors_are_equal_and_private_ones_are_not(name, federate):
    run = federate(name, adapters=LORA)
    one, other = run.last("a"), run.last("b")
    shared = run.worker.strategy.shared()

    assert all(torch.equal(one[n], other[n]) for n in shared)
    assert any(not torch.equal(one[n], run.worker.initial[n]) for n in shared)
    private = [n for n in one if n not in shared]
    assert any(not torch.equal(one[n], other[n]) for n in private)
    if name == "fedsa_lora":
        assert any(not torch.equal(one[n], other[n]) for n in private if ".lora_B." in n)


def test_ffas_a_stays_at_the_start_that_all_sites_share(federate, make_worker):
    run = federate("ffa_lora", adapters=LORA)
    fresh = dict(make_worker("flap_sam", adapters=LORA).model.named_parameters())

    found = {n: p for n, p in run.worker.model.named_parameters() if ".lora_A." in n}
    assert found
    assert all(torch.equal(p, fresh[n]) for n, p in found.items())
    assert all(p.any() for p in found.values())
    assert not found.keys() & run.last("a").keys()
