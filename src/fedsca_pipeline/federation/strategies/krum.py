"""Krum and Multi-Krum: the models of the sites whose updates lie closest to those of the others.

Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, NeurIPS 2017, section 4.
With more than ``2 hostile + 2`` sites, no ``hostile`` of them can drag the choice away from the others.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import LocalModels
from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.median import RobustOptions
from fedsca_pipeline.federation.strategies.sharing import BlockStrategy


class KrumOptions(RobustOptions):
    """``strategies.krum``."""

    hostile: int = Field(1, ge=0, description="0 or more, f: the sites of a round that may be hostile")
    chosen: int = Field(1, ge=1, description="1 or more, m: the sites whose mean all receive; above 1, Multi-Krum")


class Krum(Averaging, BlockStrategy):
    """The mean of the ``chosen`` sites with the smallest sum of squared distances to their closest others."""

    name: ClassVar[str] = "krum"
    Options: ClassVar[type[KrumOptions]] = KrumOptions
    options: KrumOptions

    def compare(self, grams: Tensor, models: LocalModels) -> Tensor:
        """Return minus the squared distances of the updates, the same in every group."""
        gram = grams.sum(dim=0)
        squares = gram.diagonal()
        return (2 * gram - squares[:, None] - squares).clamp(max=0).expand_as(grams)

    def weights(self, similarity: Tensor, partners: Tensor, prior: Tensor) -> Tensor:
        """Return equal weights of the chosen sites, the same in every row."""
        # Every row has the same partners: the sites that took part.
        present = partners[0]
        count = int(present.sum())
        others = present[:, None] & present & ~torch.eye(len(present), dtype=torch.bool)
        distances = (-similarity).masked_fill(~others, torch.inf).sort(dim=1).values
        closest = min(max(count - self.options.hostile - 2, 1), count - 1)
        scores = distances[:, :closest].sum(dim=1).masked_fill(~present, torch.inf)
        chosen = scores.argsort(stable=True)[: min(self.options.chosen, count)]
        return similarity.new_zeros(len(present)).index_fill(0, chosen, 1 / len(chosen)).expand_as(similarity)
