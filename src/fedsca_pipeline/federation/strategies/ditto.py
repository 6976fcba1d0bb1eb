"""Ditto: a personal model at each site, held near the global one.

Li et al., *Ditto: Fair and Robust Federated Learning Through Personalization*, ICML 2021, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.fedavg import FedAvg, FedAvgOptions
from fedsca_pipeline.federation.strategies.fedprox import ProximalRule
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.model.layout import TensorLayout


class DittoOptions(FedAvgOptions):
    """``strategies.ditto``."""

    pull: float = Field(
        0.1, ge=0.0, le=1e6, description="0 or more, the paper's lambda: the pull of the personal model to the global"
    )


class Ditto(FedAvg):
    """FedAvg, and after its steps as many on a copy that stays: twice the work of a round."""

    name: ClassVar[str] = "ditto"
    Options: ClassVar[type[DittoOptions]] = DittoOptions
    options: DittoOptions

    def phases(self, layout: TensorLayout) -> tuple[Phase, ...]:
        """Return the global model's steps, then the personal one's."""
        return Phase(self.trained(layout)), Phase(self.trained(layout), personal=True)

    def local_rule(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull of the personal model."""
        return DittoRule(received, kept, self.options.pull)


class DittoRule(ProximalRule):
    """``lambda / 2 |v - received|^2`` in the personal phase, nothing in the other."""

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return the term, a scalar; None for the global model."""
        return super().penalty(parameters, phase) if phase.personal else None
