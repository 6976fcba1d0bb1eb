"""LoRA factors: which are shared, and merged products as products of the mix."""

from __future__ import annotations

import pytest
import torch
from server_steps import LIMITS

from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.merge import is_lora_b, lora_pairs, merge_products
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState
from fedsca_pipeline.model.layout import TensorLayout

A, B, OTHER = "blocks.0.qkv.lora_A.default.weight", "blocks.0.qkv.lora_B.default.weight", "blocks.0.norm.weight"
SHAPES = {A: (2, 5), B: (4, 2), OTHER: (3,)}
LAYOUT = TensorLayout(((A, OTHER, B),), (), SHAPES)
GROUPS = (slice(0, 21),)


def local_models_of(count, seed=0):
    return torch.randn(count, 21, generator=torch.Generator().manual_seed(seed))


def factors(vectors):
    return vectors[:, :10].reshape(-1, 2, 5), vectors[:, 13:].reshape(-1, 4, 2)


def product(vectors):
    a, b = factors(vectors)
    return b @ a


def merged(weights, local_models):
    mixed = weights[0].float() @ local_models
    return merge_products(mixed.clone(), weights, local_models, GROUPS, lora_pairs((A, OTHER, B), SHAPES)), mixed


def best_fit(weights, local_models, rank=2):
    left, values, right = torch.linalg.svd(torch.einsum("ij,jkl->ikl", weights[0].float(), product(local_models)))
    return left[:, :, :rank] * values[:, None, :rank] @ right[:, :rank]


def test_names_of_factors_are_recognised_and_paired():
    (pair,) = lora_pairs((A, OTHER, B), SHAPES)

    assert (pair.a, pair.b, pair.rank) == (slice(0, 10), slice(13, 21), 2)
    assert is_lora_b(B)
    assert is_lora_b("x.lora_B")
    assert not is_lora_b(A)
    assert not is_lora_b("x.lora_Bend")
    assert lora_pairs((B, OTHER), SHAPES) == ()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_product_is_the_best_fit_of_the_mixed_products(count):
    local_models = local_models_of(count)
    weights = torch.rand(1, count, count, generator=torch.Generator().manual_seed(1)).double()
    weights /= weights.sum(dim=2, keepdim=True)

    found, mixed = merged(weights, local_models)

    torch.testing.assert_close(product(found), best_fit(weights, local_models), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[:, 10:13], mixed[:, 10:13])


def test_sites_with_the_same_a_average_exactly_and_keep_its_length():
    local_models = local_models_of(3)
    local_models[:, :10] = local_models[0, :10]
    weights = torch.full((1, 3, 3), 1 / 3).double()

    found, _ = merged(weights, local_models)

    torch.testing.assert_close(product(found), product(local_models).mean(dim=0).expand(3, 4, 5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :10].norm(dim=1), local_models[0, :10].norm().expand(3))


def test_rows_that_receive_one_local_model_stay_as_they_are():
    local_models = local_models_of(3)

    assert torch.equal(merged(torch.eye(3).double()[None], local_models)[0], local_models)


def test_products_of_zero_leave_an_a_that_can_still_learn():
    local_models = local_models_of(2)
    local_models[:, 13:] = 0

    found, _ = merged(torch.full((1, 2, 2), 0.5).double(), local_models)

    a, b = factors(found)
    assert not b.any()
    assert torch.linalg.matrix_rank(a).tolist() == [2, 2]


def test_a_rank_above_the_width_of_the_layer_keeps_the_product():
    shapes = {"lora_A": (4, 3), "lora_B": (2, 4)}
    local_models = torch.randn(2, 20, generator=torch.Generator().manual_seed(4))
    weights = torch.full((1, 2, 2), 0.5).double()

    found = merge_products(
        local_models.mean(dim=0).repeat(2, 1), weights, local_models, (slice(0, 20),), lora_pairs(tuple(shapes), shapes)
    )

    def products(vectors):
        return vectors[:, 12:].reshape(2, 2, 4) @ vectors[:, :12].reshape(2, 4, 3)

    torch.testing.assert_close(
        products(found), products(local_models).mean(dim=0).expand(2, 2, 3), atol=1e-5, rtol=1e-5
    )


class TestThroughAStrategy:
    replies = Replies(1, ("a", "b"), torch.zeros(2, 21), local_models_of(2), torch.ones(2).double())

    def aggregate(self, strategy):
        return strategy.aggregate(
            ServerState.initial(2, 21, 1),
            self.replies,
            sites=("a", "b"),
            initial=torch.zeros(21),
            limits=LIMITS,
        )

    def test_a_only_sends_no_b(self):
        assert build_strategy("fedsca", {"lora_merge": "a_only"}, LAYOUT).shared() == (A, OTHER)
        assert build_strategy("fedsca", {"lora_merge": "naive"}, LAYOUT).shared() == (A, OTHER, B)

    def test_svd_merges_products_in_aggregates_and_in_the_general_model(self):
        fedavg = build_strategy("fedavg", {"lora_merge": "svd"}, LAYOUT)

        state, found = self.aggregate(fedavg)

        expected = best_fit(torch.full((1, 2, 2), 0.5), state.local_models)
        torch.testing.assert_close(product(found.aggregates), expected, atol=1e-5, rtol=1e-5)
        general = fedavg.general_model(state, 1.0)
        torch.testing.assert_close(product(general[None]), expected[:1], atol=1e-5, rtol=1e-5)

    def test_naive_mixes_the_factors(self):
        state, found = self.aggregate(build_strategy("fedavg", {}, LAYOUT))

        torch.testing.assert_close(found.aggregates[0], state.local_models.mean(dim=0))
