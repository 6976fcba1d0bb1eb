"""Phases and local rules: the defaults change nothing."""

from __future__ import annotations

import torch

from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase


def test_a_phase_has_all_steps_and_trains_the_shared_model_by_default():
    phase = Phase(("x",))

    assert (phase.share, phase.personal) == (1.0, False)


def test_the_default_rule_changes_no_step_and_has_no_state():
    rule = LocalRule({"x": torch.ones(1)}, {"x": torch.ones(1)})
    x = torch.zeros(1, requires_grad=True)
    x.grad = torch.ones(1)

    rule.correct({"x": x}, Phase(("x",)))

    assert rule.penalty({"x": x}, Phase(("x",))) is None
    assert x.grad.item() == 1.0
    assert rule.next_state() == rule.extra_tensors() == {}
