"""The whole foundation trained and sent, without adapters: FedSAM of FedFMS.

Liu et al., *FedFMS: Exploring Federated Foundation Models for Medical Image Segmentation*, MICCAI 2024.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.federation.strategies.base import StrategyOptions
from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.server_step import Prior
from fedsca_pipeline.federation.strategies.sharing import PRIOR_HELP
from fedsca_pipeline.model.layout import TensorLayout


class FedAvgFullOptions(StrategyOptions):
    """``strategies.fedavg_full``."""

    prior: Prior = Field("samples", description=PRIOR_HELP)


class FedAvgFull(Averaging):
    """FedAvg of encoder and decoder; adapters are attached as always, but never move from doing nothing."""

    name: ClassVar[str] = "fedavg_full"
    Options: ClassVar[type[FedAvgFullOptions]] = FedAvgFullOptions

    def __init__(self, options: FedAvgFullOptions) -> None:
        super().__init__(options)
        self.prior = options.prior

    def trained(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return the foundation's own tensors, encoder and decoder."""
        return layout.encoder + layout.decoder

    def shared(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return all that is trained."""
        return self.trained(layout)
