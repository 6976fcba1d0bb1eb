"""FedAvg: every site receives the same average, weighted by training images.

McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017. With adapters
and decoder it is FedMSA of FedFMS (Liu et al., MICCAI 2024).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.federation.strategies.sharing import (
    SHARE_DECODER_HELP,
    ShareDecoder,
    SharingOptions,
    SharingStrategy,
)


class Averaging(Strategy):
    """The average over this round's sites by their prior, also for absent sites."""

    def partners(self, present: Tensor, moved: Tensor, known: Tensor) -> Tensor:
        """Return the sites that took part, for every row."""
        return present.repeat(len(present), 1)


class FedAvgOptions(SharingOptions):
    """``strategies.fedavg``, and the base for variants of FedAvg."""

    share_decoder: ShareDecoder = Field(True, description=SHARE_DECODER_HELP)


class FedAvg(Averaging, SharingStrategy):
    """FedAvg of adapters and decoder."""

    name: ClassVar[str] = "fedavg"
    Options: ClassVar[type[FedAvgOptions]] = FedAvgOptions
