"""FedBN: normalisation layers are trained and stay at the site, everything else that is trained is averaged.

Li et al., *FedBN: Federated Learning on Non-IID Features via Local Batch Normalization*, ICLR 2021. Transformers have
layer norms in the place of batch norms; a foundation's batch norms are folded into its convolutions.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.fedavg import FedAvg
from fedsca_pipeline.model.layout import TensorLayout


class FedBn(FedAvg):
    """FedAvg of adapters and decoder, without the norms of encoder and decoder, which train locally."""

    name: ClassVar[str] = "fedbn"

    def trained(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return adapters, decoder and the encoder's norms."""
        efficient = super().trained(layout)
        # Adapters may hold norms, too (PEFT's modules_to_save).
        return efficient + tuple(name for name in layout.norms if name not in set(efficient))

    def shared(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return what FedAvg shares, without norms."""
        return tuple(name for name in super().shared(layout) if name not in set(layout.norms))
