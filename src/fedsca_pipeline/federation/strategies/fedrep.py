"""FedRep: FedPer whose sites train first the head, then the body.

Collins et al., *Exploiting Shared Representations for Personalized Federated Learning*, ICML 2021, algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.federation.strategies.base import Phase
from fedsca_pipeline.federation.strategies.fedper import FedPer
from fedsca_pipeline.federation.strategies.sharing import SharingOptions


class FedRepOptions(SharingOptions):
    """``strategies.fedrep``."""

    head_share: float = Field(
        0.5, gt=0.0, lt=1.0, description="above 0, below 1: share of a round's steps that train the private tensors"
    )


class FedRep(FedPer):
    """The private tensors train first, on the received body; then the shared ones train."""

    name: ClassVar[str] = "fedrep"
    Options: ClassVar[type[FedRepOptions]] = FedRepOptions
    options: FedRepOptions

    def phases(self) -> tuple[Phase, ...]:
        """Return head, then body; if one of them is empty, the other alone with all steps."""
        body = self.shared()
        head = tuple(name for name in self.trained() if name not in set(body))
        shares = ((head, self.options.head_share), (body, 1 - self.options.head_share))
        return tuple(Phase(names, share if head and body else 1.0) for names, share in shares if names)
