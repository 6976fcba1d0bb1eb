"""pFedGraph: a collaboration graph, inferred each round from the directions in which the sites' models have moved.

Ye et al., *Personalized Federated Learning with Inferred Collaboration Graphs*, ICML 2023: the graph's rows solve
``min_w alpha |w - p|^2 - <w, c>`` on the simplex, where c are the cosines of ``theta - theta_0``. A local step pulls
towards the direction of the aggregate (the paper's equation; the published code has the opposite sign).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import LocalModels, LocalRule, Phase
from fedsca_pipeline.federation.strategies.sharing import (
    SHARE_DECODER_HELP,
    ShareDecoder,
    SharingOptions,
    SharingStrategy,
)
from fedsca_pipeline.federation.strategies.weighting import simplex_weights


class PFedGraphOptions(SharingOptions):
    """``strategies.pfedgraph``."""

    share_decoder: ShareDecoder = Field(True, description=SHARE_DECODER_HELP)
    alpha: float = Field(0.8, ge=1e-3, le=1e6, description="1e-3 <= alpha <= 1e6, the graph's pull towards the prior")
    pull: float = Field(0.01, ge=0.0, le=1e6, description="0 or more, the paper's lambda of the local loss")


class PFedGraph(SharingStrategy):
    """The simplex weighting over everything that is trained."""

    name: ClassVar[str] = "pfedgraph"
    Options: ClassVar[type[PFedGraphOptions]] = PFedGraphOptions
    options: PFedGraphOptions

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull towards the aggregate's direction."""
        return DirectionRule(received, state, self.options.pull)

    def compare(self, grams: Tensor, models: LocalModels) -> Tensor:
        """Return the cosines of the distances from the start values."""
        return models.cosines(from_start=True)

    def weights(self, similarity: Tensor, partners: Tensor, prior: Tensor) -> Tensor:
        """Return the rows of the graph."""
        return simplex_weights(similarity, partners, prior, penalty=self.options.alpha)


class DirectionRule(LocalRule):
    """Adds ``- lambda cos(theta, received)`` over the tensors that are both received and trained."""

    def __init__(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor], pull: float) -> None:
        super().__init__(received, state)
        self.pull = pull

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return the term, a scalar; None if ``pull`` is 0 or no tensor is both received and trained."""
        common = sorted(parameters.keys() & self.received.keys())
        if not self.pull or not common:
            return None
        mine, theirs = (torch.cat([part[name].flatten() for name in common]) for part in (parameters, self.received))
        return -self.pull * torch.cosine_similarity(mine, theirs, dim=0)
