"""FedAMP: each site receives a mix of models similar to its own, and is held near it.

Huang et al., *Personalized Cross-Silo Federated Learning on Non-IID Data*, AAAI 2021, in its heuristic form: a fixed
weight for the site itself, a softmax of the cosines of the *weights* over the others (equation 8). Local training
starts from the mix, as in every strategy here; the paper leaves the start open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import LocalModels, LocalRule
from fedsca_pipeline.federation.strategies.fedprox import MU_HELP, ProximalRule
from fedsca_pipeline.federation.strategies.sharing import (
    SHARE_DECODER_HELP,
    ShareDecoder,
    SharingOptions,
    SharingStrategy,
)
from fedsca_pipeline.federation.strategies.weighting import softmax_weights


class FedAmpOptions(SharingOptions):
    """``strategies.fedamp``."""

    share_decoder: ShareDecoder = Field(True, description=SHARE_DECODER_HELP)
    mu: float = Field(0.01, ge=0.0, le=1e6, description=MU_HELP)
    self_weight: float = Field(0.3, ge=0.0, le=1.0, description="0 to 1, the weight of the site itself")
    temperature: float = Field(0.1, ge=1e-3, le=1e6, description="1e-3 <= t <= 1e6; low favours the most similar site")


class FedAmp(SharingStrategy):
    """Attentive message passing over everything that is trained."""

    name: ClassVar[str] = "fedamp"
    Options: ClassVar[type[FedAmpOptions]] = FedAmpOptions
    options: FedAmpOptions

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull towards the mix."""
        return ProximalRule(received, state, self.options.mu)

    def compare(self, grams: Tensor, models: LocalModels) -> Tensor:
        """Return the cosines of the weights."""
        return models.cosines(from_start=False)

    def weights(self, similarity: Tensor, partners: Tensor, prior: Tensor) -> Tensor:
        """Return the softmax."""
        return softmax_weights(
            similarity, partners, self_weight=self.options.self_weight, temperature=self.options.temperature
        )
