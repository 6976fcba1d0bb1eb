"""FedPer: the body is shared, the head is private.

Arivazhagan et al., *Federated Learning with Personalization Layers*, arXiv 1912.00818.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.sharing import SharingStrategy


class FedPer(Averaging, SharingStrategy):
    """FedAvg of all adapters; the decoder is private."""

    name: ClassVar[str] = "fedper"
