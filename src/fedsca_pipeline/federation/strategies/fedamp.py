"""FedAMP: each site receives a mix of models like its own, and is held near it.

Huang et al., *Personalized Cross-Silo Federated Learning on Non-IID Data*, AAAI 2021, its heuristic form: a fixed
weight for the site itself, a softmax of the cosines of the *weights* over the others (equation 8). Local training
starts from the mix, as every strategy's does here; the paper leaves the start open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.fedprox import MU_HELP, ProximalRule
from fedsca_pipeline.federation.strategies.kernels import Groups, Masters
from fedsca_pipeline.federation.strategies.rules import LocalRule
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
    temperature: float = Field(0.1, ge=1e-3, le=1e6, description="1e-3 <= t <= 1e6, low follows the nearest")


class FedAmp(SharingStrategy):
    """Attentive message passing over all that is trained."""

    name: ClassVar[str] = "fedamp"
    Options: ClassVar[type[FedAmpOptions]] = FedAmpOptions
    options: FedAmpOptions

    def local_rule(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull towards the mix."""
        return ProximalRule(received, kept, self.options.mu)

    def compare(self, grams: Tensor, masters: Masters, groups: Groups) -> Tensor:
        """Return the cosines of the weights."""
        return masters.cosines(groups, from_start=False)

    def weights(self, similarity: Tensor, mates: Tensor, prior: Tensor) -> Tensor:
        """Return the softmax."""
        return softmax_weights(
            similarity, mates, self_weight=self.options.self_weight, temperature=self.options.temperature
        )
