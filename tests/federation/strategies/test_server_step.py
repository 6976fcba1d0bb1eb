"""The parts of a server step: validation, the state, partners and priors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from server_steps import fedsca, replies_of, step

from fedsca_pipeline.errors import NoValidSite, ResumeError
from fedsca_pipeline.federation.strategies.server_step import ServerState, partners, site_prior


class TestValidation:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_value_that_is_not_finite_rejects_its_site_alone(self, bad):
        _, found = step(fedsca(2), None, replies_of({"a": [1.0, 0.0], "b": [bad, 0.0], "c": [1.0, 0.1]}))

        assert found.accepted == ("a", "c")
        assert "not finite" in found.rejected["b"]
        assert found.aggregates.isfinite().all()

    def test_infinities_that_cancel_are_still_found(self):
        _, found = step(fedsca(2), None, replies_of({"a": [1.0, 1.0], "b": [torch.inf, -torch.inf]}))

        assert "not finite" in found.rejected["b"]

    def test_a_norm_whose_square_exceeds_fp32_is_rejected(self):
        _, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1e30]}))

        assert found.accepted == ("a",)

    @pytest.mark.parametrize("samples", [0, -3, torch.nan])
    def test_a_sample_count_below_one_rejects_its_site(self, samples):
        _, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1.0]}, samples={"b": samples}))

        assert "sample count" in found.rejected["b"]

    def test_values_that_are_not_finite_are_reported_before_the_norm(self):
        _, found = step(fedsca(2), None, replies_of({"a": [1.0, 0], "b": [1e5, torch.nan]}))

        assert "not finite" in found.rejected["b"]

    @pytest.mark.parametrize(("norm", "accepted"), [(10.0, ("a", "b", "c")), (10.1, ("a", "b"))])
    def test_a_norm_of_up_to_ten_medians_is_accepted(self, norm, accepted):
        _, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1.0], "c": [norm]}))

        assert found.accepted == accepted

    def test_the_huge_update_of_two_first_sites_does_not_raise_the_limit_above_itself(self):
        _, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1000.0]}))

        assert found.accepted == ("a",)
        assert "1e+03 is above 10" in found.rejected["b"]

    def test_two_huge_updates_of_four_do_not_raise_the_limit_above_themselves(self):
        _, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1.0], "c": [1000.0], "d": [1000.0]}))

        assert found.accepted == ("a", "b")

    def test_a_zero_update_does_not_cause_the_others_to_be_rejected(self):
        state, found = step(fedsca(1), None, replies_of({"a": [1.0], "b": [0.0], "c": [0.0]}))

        assert found.accepted == ("a", "b", "c")
        assert state.norms.tolist() == [1.0]

    def test_a_single_first_site_is_accepted(self):
        assert step(fedsca(1), None, replies_of({"a": [1000.0]}))[1].accepted == ("a",)

    def test_the_median_includes_earlier_rounds_but_no_rejected_norms(self):
        state, _ = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1.0], "c": [50.0]}))

        assert state.norms.tolist() == [1.0, 1.0]
        with pytest.raises(NoValidSite, match="c: update norm 50 is above 10"):
            step(fedsca(1), state, replies_of({"c": [50.0]}, round_=2))

    def test_no_valid_site_raises_and_leaves_the_state_as_it_was(self):
        state, _ = step(fedsca(1), None, replies_of({"a": [1.0], "b": [1.0]}))
        before = {name: tensor.clone() for name, tensor in state.as_tensors().items()}

        with pytest.raises(NoValidSite, match=r"round 2.*a: values are not finite"):
            step(fedsca(1), state, replies_of({"a": [torch.nan]}, round_=2))

        for name, tensor in state.as_tensors().items():
            assert torch.equal(tensor.nan_to_num(-9), before[name].nan_to_num(-9))

    def test_a_rejected_site_keeps_its_local_model_and_catches_up_like_an_absent_one(self):
        state, _ = step(fedsca(2), None, replies_of({"a": [1.0, 0.0], "b": [1.0, 0.0]}))

        after, found = step(fedsca(2), state, replies_of({"a": [3.0, 0.0], "b": [torch.nan, 0.0]}, round_=2))

        assert after.local_models[1].tolist() == [1.0, 0.0]
        assert found.aggregates[1].tolist() == [2.0, 0.0]


class TestState:
    def test_a_step_does_not_change_the_state_it_was_given(self):
        state = ServerState.initial(4, 2, 1)

        step(fedsca(2), state, replies_of({"a": [1.0, 2.0], "b": [2.0, 1.0]}))

        assert not state.trained.any()
        assert not state.local_models.any()
        assert state.memory.isnan().all()

    def test_local_models_are_base_plus_update_and_stay_for_absent_sites(self):
        strategy = fedsca(1)
        state, _ = step(strategy, None, replies_of({"a": [1.0], "b": [2.0]}, bases={"a": [10.0], "b": [20.0]}))
        state, _ = step(strategy, state, replies_of({"a": [3.0]}, samples={"a": 4}, round_=2))

        assert state.local_models.tolist() == [[3.0], [22.0], [0.0], [0.0]]
        assert state.trained.tolist() == [True, True, False, False]
        assert state.samples.tolist() == [4, 10, 0, 0]
        assert state.norms.tolist() == [1.0, 2.0, 3.0]

    @pytest.mark.parametrize("values", [0, 3])
    def test_safetensors_store_it_bit_for_bit(self, values):
        updates = {"a": [1.0] * values, "b": [0.5] * values}
        state, _ = step(fedsca(values), None, replies_of(updates))

        again = ServerState.from_tensors(load(save(state.as_tensors())))

        for name, tensor in state.as_tensors().items():
            stored = getattr(again, name)
            assert stored.dtype == tensor.dtype
            assert stored.numpy().tobytes() == tensor.numpy().tobytes()

    def test_an_error_names_a_missing_tensor(self):
        tensors = ServerState.initial(2, 3, 1).as_tensors()
        del tensors["memory"]

        with pytest.raises(ResumeError, match="memory"):
            ServerState.from_tensors(tensors)


class TestPartners:
    def test_present_sites_mix_with_those_that_moved_and_absent_ones_with_those_they_know(self):
        present = torch.tensor([True, True, True, False, False])
        moved = torch.tensor([True, True, False, False, False])
        known = torch.zeros(5, 5, dtype=torch.bool)
        known[3, 0] = known[0, 3] = known[3, 3] = known[4, 4] = True

        found = partners(present, moved, known)

        assert found.int().tolist() == [
            [1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [0, 0, 0, 0, 0],
        ]

    def test_an_absent_site_that_knows_only_unmoved_ones_receives_its_own_model(self):
        present = torch.tensor([True, False, False])
        known = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])

        found = partners(present, torch.zeros(3, dtype=torch.bool), known)

        assert found.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_the_prior_leaves_out_sites_that_never_trained():
    state, _ = step(fedsca(1), None, replies_of({"a": [4.0], "c": [8.0]}, samples={"c": 30}))

    assert site_prior(state, "uniform").tolist() == [0.5, 0.0, 0.5, 0.0]
    assert site_prior(ServerState.initial(2, 1, 1), "uniform").tolist() == [0.0, 0.0]
