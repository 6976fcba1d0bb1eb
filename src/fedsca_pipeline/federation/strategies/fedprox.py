"""FedProx: FedAvg whose sites are held near what they received.

Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020, equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.fedavg import FedAvg, FedAvgOptions
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase

MU_HELP = "0 or more, the pull towards what the site received"


class FedProxOptions(FedAvgOptions):
    """``strategies.fedprox``."""

    mu: float = Field(0.01, ge=0.0, le=1e6, description=MU_HELP)


class FedProx(FedAvg):
    """The loss has ``mu / 2 |theta - received|^2`` more, over the shared tensors."""

    name: ClassVar[str] = "fedprox"
    Options: ClassVar[type[FedProxOptions]] = FedProxOptions
    options: FedProxOptions

    def local_rule(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> LocalRule:
        """Return the proximal term."""
        return ProximalRule(received, kept, self.options.mu)


class ProximalRule(LocalRule):
    """``mu / 2 |theta - received|^2`` over the tensors that are both received and trained; ``mu`` 0 is no term."""

    def __init__(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor], mu: float) -> None:
        super().__init__(received, kept)
        self.mu = mu

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return the term, a scalar; None where there is nothing to hold."""
        held = parameters.keys() & self.received.keys()
        if not self.mu or not held:
            return None
        return self.mu / 2 * sum((parameters[n] - self.received[n]).square().sum() for n in sorted(held))
