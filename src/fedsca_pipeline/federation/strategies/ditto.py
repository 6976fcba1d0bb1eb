"""Ditto: a personal model at each site that is held near the global one.

Li et al., *Ditto: Fair and Robust Federated Learning Through Personalization*, ICML 2021, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import LocalRule, Phase
from fedsca_pipeline.federation.strategies.fedavg import FedAvg, FedAvgOptions
from fedsca_pipeline.federation.strategies.fedprox import ProximalRule


class DittoOptions(FedAvgOptions):
    """``strategies.ditto``."""

    pull: float = Field(
        0.1, ge=0.0, le=1e6, description="0 or more, the paper's lambda: pull of the personal model to the global one"
    )


class Ditto(FedAvg):
    """FedAvg, followed by as many steps on a personal copy: twice the work per round."""

    name: ClassVar[str] = "ditto"
    Options: ClassVar[type[DittoOptions]] = DittoOptions
    options: DittoOptions

    def phases(self) -> tuple[Phase, ...]:
        """Return the phase of the global model, then that of the personal one."""
        return Phase(self.trained()), Phase(self.trained(), personal=True)

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull of the personal model."""
        return DittoRule(received, state, self.options.pull)


class DittoRule(ProximalRule):
    """Adds ``lambda / 2 |v - received|^2`` in the personal phase."""

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return the term, a scalar; None for the global model."""
        return super().penalty(parameters, phase) if phase.personal else None
