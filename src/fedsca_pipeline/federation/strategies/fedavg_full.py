"""FedAvg of the whole foundation, without adapters: FedSAM of FedFMS.

Liu et al., *FedFMS: Exploring Federated Foundation Models for Medical Image Segmentation*, MICCAI 2024.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.federation.strategies.base import Prior, StrategyOptions
from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.sharing import PRIOR_HELP


class FedAvgFullOptions(StrategyOptions):
    """``strategies.fedavg_full``."""

    prior: Prior = Field("samples", description=PRIOR_HELP)


class FedAvgFull(Averaging):
    """FedAvg of encoder and decoder; adapters are attached as always, but stay at their start, which has no effect."""

    name: ClassVar[str] = "fedavg_full"
    Options: ClassVar[type[FedAvgFullOptions]] = FedAvgFullOptions
    options: FedAvgFullOptions

    @property
    def prior(self) -> Prior:
        """The option ``prior``."""
        return self.options.prior

    def trained(self) -> tuple[str, ...]:
        """Return the foundation's own tensors, encoder and decoder."""
        return self.layout.encoder + self.layout.decoder

    def shared(self) -> tuple[str, ...]:
        """Return everything that is trained."""
        return self.trained()
