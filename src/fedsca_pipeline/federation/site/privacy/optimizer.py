"""Opacus' optimiser with the site's own noise. Imported where differential privacy is on, for Opacus takes seconds."""

from __future__ import annotations

import numpy as np
import torch
from opacus.optimizers import DPOptimizer


class NoisyOptimizer(DPOptimizer):
    """Cuts each unit's gradient, sums, adds Gaussian noise and divides by the expected number of units, as Opacus does.

    The noise is drawn from ``draws`` instead of a torch generator, which keeps no more than 32 bits of its seed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, draws: np.random.Generator, **options: float) -> None:
        super().__init__(optimizer, **options)
        self._draws = draws

    @property
    def params(self) -> list[torch.nn.Parameter]:
        """What moves; a tensor whose rate is 0 would use up a part of the norm for nothing."""
        groups = (group for group in self.param_groups if group.get("initial_lr", group["lr"]) > 0)
        return [parameter for group in groups for parameter in group["params"]]

    def add_noise(self) -> None:
        """Put the noised sum of the cut gradients into each parameter's ``grad``."""
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = self._draws.standard_normal(parameter.shape, dtype=np.float32) * np.float32(scale)
            parameter.grad = parameter.summed_grad + torch.from_numpy(np.asarray(noise)).to(parameter.summed_grad)
