"""Opacus' optimiser with noise from the site's secret.

It is imported only with differential privacy, because importing Opacus takes seconds.
"""

from __future__ import annotations

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from fedsca_pipeline.model.batch import to_device


# Opacus has no types, so mypy sees its class as Any.
class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips each unit's gradient, sums, adds Gaussian noise and divides by the expected number of units, as Opacus.

    The noise comes from ``draws``, not from a torch generator, which uses only 32 bits of its seed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, draws: np.random.Generator, **options: float) -> None:
        super().__init__(optimizer, **options)
        self._draws = draws

    @property
    def params(self) -> list[torch.nn.Parameter]:
        """The parameters with a learning rate above 0; the others would only use up a part of the clip norm."""
        groups = (group for group in self.param_groups if group.get("initial_lr", group["lr"]) > 0)
        return [parameter for group in groups for parameter in group["params"]]

    def add_noise(self) -> None:
        """Set each parameter's ``grad`` to the noised sum of the clipped gradients."""
        scale = self.noise_multiplier * self.max_grad_norm
        sizes = [parameter.numel() for parameter in self.params]
        # All at once, for a single copy to the device; the values are those of one draw per parameter.
        drawn = self._draws.standard_normal(sum(sizes), dtype=np.float32) * np.float32(scale)
        noise = to_device(torch.from_numpy(drawn), self.params[0].device)
        for parameter, own in zip(self.params, torch.split(noise, sizes), strict=True):
            # Opacus adds summed_grad to parameters.
            summed: torch.Tensor = parameter.summed_grad  # type: ignore[attr-defined]
            parameter.grad = summed + own.view_as(summed)
