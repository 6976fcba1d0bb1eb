"""The coordinate-wise median: less than half of the sites, whatever they send, cannot move it beyond the others.

Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, ICML 2018, definition 1.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.sharing import (
    SHARE_DECODER_HELP,
    BlockOptions,
    BlockStrategy,
    ShareDecoder,
)

_COLUMNS = 1 << 16  # values of every site that are sorted at a time, so that they stay in the processor's caches


class RobustOptions(BlockOptions):
    """Options of a strategy that withstands hostile sites: the images that a site claims to have give it no weight."""

    share_decoder: ShareDecoder = Field(True, description=SHARE_DECODER_HELP)
    prior: Literal["uniform"] = Field("uniform", description="uniform")


class CoordinateWise(Averaging, BlockStrategy):
    """One aggregate for all sites, each value of it computed from the sorted values of this round's sites."""

    Options: ClassVar[type[RobustOptions]] = RobustOptions

    def merge(self, mixed: Tensor, weights: Tensor, local_models: Tensor) -> Tensor:
        """Return ``middle`` of the sites with a weight, in every row of ``mixed``."""
        if len(weights):
            rows = weights[0, 0].nonzero().flatten()
            for start in range(0, mixed.shape[1], _COLUMNS):
                columns = slice(start, start + _COLUMNS)
                mixed[:, columns] = self.middle(local_models[rows, columns].sort(dim=0).values)
        return mixed

    @abstractmethod
    def middle(self, ordered: Tensor) -> Tensor:
        """Return the aggregate [W] of values [A, W] that rise along the first axis."""


class Median(CoordinateWise):
    """The median of adapters and decoder; of an even number of sites the mean of the two middle values."""

    name: ClassVar[str] = "median"

    def middle(self, ordered: Tensor) -> Tensor:
        """Return the middle row, or the mean of the two middle rows."""
        count = len(ordered)
        return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
