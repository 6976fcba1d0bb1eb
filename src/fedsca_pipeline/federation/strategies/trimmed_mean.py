"""The coordinate-wise trimmed mean: each value's smallest and largest are left out of its mean.

Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, ICML 2018, definition 2.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.median import CoordinateWise, RobustOptions


class TrimmedMeanOptions(RobustOptions):
    """``strategies.trimmed_mean``."""

    trim: float = Field(0.25, ge=0.0, lt=0.5, description="0 <= trim < 0.5, the share of sites left out at each end")


class TrimmedMean(CoordinateWise):
    """The mean of adapters and decoder without the outer ``trim`` of the sites at each end, rounded down."""

    name: ClassVar[str] = "trimmed_mean"
    Options: ClassVar[type[TrimmedMeanOptions]] = TrimmedMeanOptions
    options: TrimmedMeanOptions

    def middle(self, ordered: Tensor) -> Tensor:
        """Return the mean of the rows that are left."""
        count = len(ordered)
        outer = int(self.options.trim * count)
        return ordered[outer : count - outer].mean(dim=0)
