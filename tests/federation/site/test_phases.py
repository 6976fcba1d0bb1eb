"""The length of a round, when it is validated, and tuning for an unseen site."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.federation.site.steps import PlainSteps, phase_lengths
from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.model.layout import TensorLayout

EPOCH = 3  # batches of two of five images


class Rule(LocalRule):
    """Records every call, and stores the number of rounds."""

    def __init__(self, received, state, calls) -> None:
        super().__init__(received, state)
        self.calls = calls

    def penalty(self, parameters, phase):
        self.calls.append(("penalty", phase.share, tuple(parameters)))

    def correct(self, parameters, phase) -> None:
        self.calls.append(("correct", phase.share, tuple(parameters)))

    def next_state(self):
        return {"rounds": self.state.get("rounds", torch.zeros(1)) + 1}


def batches_of(worker, data):
    from fedsca_pipeline.federation.site.batches import SiteBatches
    from fedsca_pipeline.federation.site.prefix import FeatureCache

    return SiteBatches(data, worker._embed, worker.settings.training.augment, FeatureCache(Path("unused"), (), (), 0))


@pytest.mark.parametrize("steps", [1, 2, EPOCH, 7])
def test_a_round_has_the_configured_steps_whatever_the_number_of_images(steps: int, federate) -> None:
    losses: list[torch.Tensor] = []

    def watch(worker) -> None:
        run_phase = worker._run_phase
        worker._run_phase = lambda *given: run_phase(*given[:-1], lambda loss: (losses.append(loss), given[-1](loss)))

    run = federate("fedavg", rounds=1, steps_per_round=steps, local_epochs=9, change=watch)

    assert run.replies[1, "a"].manifest.metrics["steps"] == steps
    assert len(losses) == 2 * steps


def test_each_epoch_has_new_augmentation(make_worker, make_site) -> None:
    worker, data = make_worker(steps_per_round=7), make_site("a")
    batches = batches_of(worker, data)

    plain = PlainSteps(worker.settings, "a", 1, worker.device)
    found = list(islice(plain.batches(batches), 2 * EPOCH))

    for epoch in range(2):
        expected = list(batches.training(2, seed=0, site="a", round_=1, epoch=epoch))
        for batch, other in zip(found[epoch * EPOCH :], expected, strict=False):
            assert torch.equal(batch.inputs, other.inputs)
            assert torch.equal(batch.masks, other.masks)
    assert not all(torch.equal(one.masks, other.masks) for one, other in zip(found, found[EPOCH:], strict=False))


def test_steps_and_epochs_give_the_same_bits_if_their_numbers_agree(federate) -> None:
    by_steps = federate("fedsca", steps_per_round=2 * EPOCH).bits()
    by_epochs = federate("fedsca", local_epochs=2).bits()

    assert all(torch.equal(by_steps[key], by_epochs[key]) for key in by_steps)


@pytest.mark.parametrize(("every", "rounds"), [(1, 2), (2, 3), (2, 4), (3, 4), (100, 3)])
def test_models_of_every_nth_round_and_of_the_last_are_validated(every: int, rounds: int, federate) -> None:
    run = federate("fedavg", rounds=rounds, steps_per_round=1, settings={"validate_every": every})

    # A record holds the validation of the round before, and that right after its own training.
    for record in run.records[:-1]:
        for site in record.sites.values():
            assert (site.dice_validation is not None) == ((record.round - 1) % every == 0)
            assert (site.dice_local is not None) == (record.round % every == 0)
    assert run.records[-1].final
    assert all(site.dice_validation is not None for site in run.records[-1].sites.values())
    assert run.store("a").snapshot("last").round == rounds
    assert run.store("a").snapshot("best").round in {*range(every, rounds, every), rounds}


def test_validation_changes_no_weight_and_can_be_disabled_after_training(federate) -> None:
    often = federate("ditto", settings={"validate_every": 1})
    seldom = federate("ditto", settings={"validate_every": 9, "validate_after_training": False})

    assert all(site.dice_local is not None for r in often.records[:-1] for site in r.sites.values())
    assert all(site.dice_local is None for record in seldom.records for site in record.sites.values())
    one, other = often.bits(), seldom.bits()
    assert all(torch.equal(one[key], other[key]) for key in one)


class TestRules:
    def test_a_rule_is_called_once_per_step_with_its_phase_s_tensors_and_stores_its_state(self, federate) -> None:
        calls: list[tuple] = []

        def ruled(worker) -> None:
            decoder = tuple(name for name in worker.parameters if name in worker.decoder)
            rest = tuple(name for name in worker.parameters if name not in worker.decoder)
            worker.phases = (Phase(decoder, 0.25), Phase(rest, 0.75))
            worker.strategy.local_rule = lambda received, state: Rule(received, state, calls)

        run = federate("fedavg", steps_per_round=4, change=ruled, absent={"b": [2]})

        decoder, rest = (
            tuple(n for n in run.worker.parameters if (n in run.worker.decoder) == d) for d in (True, False)
        )
        one = [(kind, 0.25, decoder) for kind in ("penalty", "correct")]
        three = [(kind, 0.75, rest) for _ in range(3) for kind in ("penalty", "correct")]
        assert calls == 3 * (one + three)
        assert run.store("a").state_at(8).rule_state["rounds"].item() == 2
        assert run.store("b").state_at(8).rule_state["rounds"].item() == 1

    def test_the_default_rule_changes_nothing_and_stores_nothing(self) -> None:
        rule = Strategy(StrategyOptions(), TensorLayout((), (), {})).local_rule({"x": torch.ones(1)}, {})
        x = torch.zeros(1, requires_grad=True)
        x.grad = torch.ones(1)

        rule.correct({"x": x}, Phase(("x",)))

        assert rule.penalty({"x": x}, Phase(("x",))) is None
        assert x.grad.item() == 1.0
        assert rule.next_state() == rule.extra_tensors() == {}

    def test_a_rule_state_that_is_not_finite_fails_the_site(self, federate) -> None:
        class Broken(LocalRule):
            def next_state(self):
                return {"x": torch.tensor([torch.nan])}

        def broken(worker) -> None:
            worker.strategy.local_rule = lambda received, state: (
                Broken(received, state) if worker.rounds.pop() else LocalRule(received, state)
            )
            worker.rounds = [True, False]

        run = federate("fedavg", rounds=1, change=broken)

        assert "not finite" in run.records[0].sites["b"].absent
        assert run.store("b").state_at(8) is None


class TestTuning:
    def tuned(self, make_worker, data, steps=4, strategy="fedavg", options=None, part="decoder"):
        worker = make_worker(strategy, options=options)
        names = worker.decoder if part == "decoder" else set(worker.parameters) - worker.decoder
        start = {name: tensor + 0.01 for name, tensor in worker.initial.items()}
        return start, names, worker.tune(data, start, names, steps, site="new")

    @pytest.mark.parametrize("part", ["decoder", "adapters"])
    def test_only_the_named_tensors_move(self, part: str, make_worker, make_site) -> None:
        start, names, found = self.tuned(make_worker, make_site("new"), part=part)

        assert found.keys() == start.keys()
        moved = {name for name in found if not torch.equal(found[name], start[name])}
        assert moved
        assert moved <= set(names)

    def test_zero_steps_change_no_tensor(self, make_worker, make_site) -> None:
        start, _, found = self.tuned(make_worker, make_site("new"), steps=0)

        assert all(torch.equal(found[name], start[name]) for name in start)

    def test_tuning_gives_the_same_bits_whatever_was_drawn_before(self, make_worker, make_site) -> None:
        data = make_site("new")

        one = self.tuned(make_worker, data)[2]
        torch.rand(5)
        other = self.tuned(make_worker, data)[2]

        assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "ditto", "fedrep"])
    def test_the_strategy_does_not_change_tuning(self, strategy: str, make_worker, make_site) -> None:
        data = make_site("new")

        plain, other = self.tuned(make_worker, data)[2], self.tuned(make_worker, data, strategy=strategy)[2]

        assert all(torch.equal(plain[name], other[name]) for name in plain)

    def test_tuning_uses_training_images_only(self, make_worker, make_site) -> None:
        data = make_site("new")
        few, whole = data.with_splits({"train": [0, 1]}), data.with_splits({"train": [0, 1], "test": [2, 3, 4, 5]})

        one, other = (self.tuned(make_worker, d)[2] for d in (few, whole))
        different = self.tuned(make_worker, data.with_splits({"train": [2, 3]}))[2]

        assert all(torch.equal(one[name], other[name]) for name in one)
        assert any(not torch.equal(one[name], different[name]) for name in one)

    def test_tuning_does_not_change_later_rounds(self, federate, make_site) -> None:
        def tune_first(worker) -> None:
            worker.tune(make_site("new"), worker.initial, worker.decoder, 2, site="new")

        plain, tuned = federate("fedsca").bits(), federate("fedsca", change=tune_first).bits()

        assert all(torch.equal(plain[key], tuned[key]) for key in plain)


@given(st.floats(0.05, 0.95), st.integers(2, 40))
def test_two_phases_share_the_steps_of_a_round(share: float, steps: int) -> None:
    lengths = phase_lengths([Phase(("a",), share), Phase(("b",), 1 - share)], steps)

    assert min(lengths) >= 1
    assert sum(lengths) == steps + (round(share * steps) in (0, steps))


def test_a_personal_copy_has_as_many_steps_as_the_model() -> None:
    assert phase_lengths([Phase(("a",)), Phase(("a",), personal=True)], 7) == [7, 7]
