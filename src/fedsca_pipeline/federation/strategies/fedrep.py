"""FedRep: FedPer whose sites train head and body in turn.

Collins et al., *Exploiting Shared Representations for Personalized Federated Learning*, ICML 2021, algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.federation.strategies.fedper import FedPer
from fedsca_pipeline.federation.strategies.rules import Phase
from fedsca_pipeline.federation.strategies.sharing import SharingOptions
from fedsca_pipeline.model.layout import TensorLayout


class FedRepOptions(SharingOptions):
    """``strategies.fedrep``."""

    head_share: float = Field(
        0.5, gt=0.0, lt=1.0, description="above 0, below 1: share of a round's steps in which the private tensors train"
    )


class FedRep(FedPer):
    """First the private tensors alone, on the body as received; then the shared ones alone."""

    name: ClassVar[str] = "fedrep"
    Options: ClassVar[type[FedRepOptions]] = FedRepOptions
    options: FedRepOptions

    def phases(self, layout: TensorLayout) -> tuple[Phase, ...]:
        """Return head, then body; one of them only where the other is empty."""
        body = self.shared(layout)
        head = tuple(name for name in self.trained(layout) if name not in set(body))
        shares = ((head, self.options.head_share), (body, 1 - self.options.head_share))
        return tuple(Phase(names, share if head and body else 1.0) for names, share in shares if names)
