"""FedProx: FedAvg whose sites are held near what they received.

Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020, equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import LocalRule, Phase
from fedsca_pipeline.federation.strategies.fedavg import FedAvg, FedAvgOptions

MU_HELP = "0 or more, the pull towards what the site received"


class FedProxOptions(FedAvgOptions):
    """``strategies.fedprox``."""

    mu: float = Field(0.01, ge=0.0, le=1e6, description=MU_HELP)


class FedProx(FedAvg):
    """FedAvg with ``mu / 2 |theta - received|^2`` in the loss, over the shared tensors."""

    name: ClassVar[str] = "fedprox"
    Options: ClassVar[type[FedProxOptions]] = FedProxOptions
    options: FedProxOptions

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the proximal term."""
        return ProximalRule(received, state, self.options.mu)


class ProximalRule(LocalRule):
    """Adds ``mu / 2 |theta - received|^2`` over the tensors that are both received and trained."""

    def __init__(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor], mu: float) -> None:
        super().__init__(received, state)
        self.mu = mu

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return the term, a scalar; None if ``mu`` is 0 or no tensor is both received and trained."""
        common = sorted(parameters.keys() & self.received.keys())
        if not self.mu or not common:
            return None
        squares = [(parameters[name] - self.received[name]).square().sum() for name in common]
        return self.mu / 2 * reduce(torch.add, squares)
