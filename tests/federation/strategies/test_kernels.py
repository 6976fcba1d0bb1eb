"""Kernels: inner products and cosines in closed form, local models and mixes for any width of block."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from server_steps import double

from fedsca_pipeline.federation.strategies import kernels
from fedsca_pipeline.federation.strategies.kernels import LocalModels, Results, cosines, gram, runs


class TestGramAndCosines:
    def test_they_agree_with_float64_over_several_chunks_and_groups(self):
        updates = torch.randn(5, 70_001, generator=torch.Generator().manual_seed(0))
        groups = (slice(0, 40_000), slice(40_000, 70_001))

        found = gram(updates, groups)

        for matrix, group in zip(found, groups, strict=True):
            exact = updates[:, group].double() @ updates[:, group].double().T
            torch.testing.assert_close(cosines(matrix), cosines(exact), atol=1e-6, rtol=0)
            # The error of sums of 40,000 products in fp32 depends on the processor's kernel: 1e-7 to 1e-6.
            torch.testing.assert_close(matrix.diagonal(), exact.diagonal(), atol=0, rtol=4e-6)
        assert torch.equal(found, found.mT)

    def test_closed_form(self):
        updates = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0], [0.0, 0.0]])

        found = cosines(gram(updates, (slice(0, 2),)))[0]

        expected = [[1, 0.96, -1, 0], [0.96, 1, -0.96, 0], [-1, -0.96, 1, 0], [0, 0, 0, 0]]
        torch.testing.assert_close(found, double(*expected))

    @pytest.mark.parametrize(("length", "cosine"), [(2e-12, 1.0), (5e-13, 0.0)])
    def test_an_update_shorter_than_1e_12_has_no_direction(self, length, cosine):
        found = cosines(gram(torch.tensor([[length], [1.0]]), (slice(0, 1),)))

        assert found[0, 0, 1] == pytest.approx(cosine)

    def test_nan_affects_only_its_own_row_and_column(self):
        found = gram(torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [2.0, 1.0]]), (slice(0, 2),))[0]

        assert found[[0, 2]][:, [0, 2]].tolist() == [[5, 4], [4, 5]]


@settings(max_examples=40, deadline=None)
@given(
    values=st.integers(1, 70),
    columns=st.integers(1, 80),
    band=st.integers(1, 6),
    present=st.sets(st.integers(0, 3), min_size=1),
    seed=st.integers(0, 1000),
)
def test_any_block_width_gives_the_results_of_undivided_products(values, columns, band, present, seed):
    draw = torch.Generator().manual_seed(seed)
    rows, previous, bases = (
        sorted(present),
        torch.randn(4, values, generator=draw),
        torch.randn(4, values, generator=draw),
    )
    updates, weights = torch.randn(len(rows), values, generator=draw), torch.rand(1, 4, 4, generator=draw).double()
    groups = (slice(0, values),)
    models = LocalModels(bases, updates, torch.tensor(rows), torch.arange(len(rows)), torch.zeros(values), groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_COLUMNS", columns)
        patch.setattr(kernels, "_CACHED", columns * 4)
        patch.setattr(kernels, "_KERNEL", band)
        out = Results.fresh(4, values)
        products, distances = gram(updates, groups)[0], models.mix(previous, weights, out)

    accepted = bases[rows].double() + updates.double()
    latest = previous.double().index_copy(0, torch.tensor(rows), accepted)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(products, updates.double() @ updates.double().T, **close)
    torch.testing.assert_close(out.local_models.double(), latest, **close)
    torch.testing.assert_close(out.aggregates.double(), weights[0] @ latest, **close)
    torch.testing.assert_close(distances, (accepted - accepted.mean(dim=0)).norm(dim=1), **close)


def mixed(weights, local_models, groups, initial):
    """Mix local models, the first of which is its base plus a zero update."""
    out, first = Results.fresh(*local_models.shape), torch.tensor([0])
    models = LocalModels(local_models, torch.zeros(1, local_models.shape[1]), first, first, initial, groups)
    models.mix(local_models, weights, out)
    return out.aggregates


class TestMix:
    local_models = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    groups = (slice(0, 2), slice(2, 3))

    def test_each_group_has_its_own_weights(self):
        weights = double([[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [0.25, 0.75]])

        assert mixed(weights, self.local_models, self.groups, torch.zeros(3)).tolist() == [[3, 4, 3], [5, 6, 6]]

    def test_a_unit_row_returns_its_local_model_bit_for_bit(self):
        models = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))

        assert torch.equal(mixed(torch.eye(3).double()[None], models, (slice(0, 1000),), torch.zeros(1000)), models)

    def test_a_row_without_any_weight_gets_the_initial_values_never_zeros(self):
        weights = double([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])

        found = mixed(weights, self.local_models, self.groups, double(-1, -2, -3).float())

        assert found[1].tolist() == [-1, -2, -3]


class TestRuns:
    @given(st.lists(st.booleans(), min_size=1), st.data())
    def test_they_cover_the_accepted_sites_in_as_few_runs_as_there_are_gaps(self, answered, data):
        rows = [row for row, present in enumerate(answered) if present]
        valid = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
        reply_rows = [reply for reply, good in enumerate(valid) if good]
        if not reply_rows:
            return
        rows = [rows[reply] for reply in reply_rows]

        found = list(runs(torch.tensor(rows), torch.tensor(reply_rows)))

        assert [row for part, _, _ in found for row in range(part.start, part.stop)] == rows
        assert [reply for _, part, _ in found for reply in range(part.start, part.stop)] == reply_rows
        assert [position for *_, part in found for position in range(part.start, part.stop)] == list(range(len(rows)))
        assert len(found) == 1 + sum(b - a > 1 for a, b in pairwise(rows))

    def test_with_every_site_present_there_is_one_run(self):
        assert list(runs(torch.arange(5), torch.arange(5))) == [(slice(0, 5),) * 3]
