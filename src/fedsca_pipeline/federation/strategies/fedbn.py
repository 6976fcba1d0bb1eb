"""FedBN: normalisation layers train and stay at the site; everything else that trains is averaged.

Li et al., *FedBN: Federated Learning on Non-IID Features via Local Batch Normalization*, ICLR 2021. Transformers have
layer norms instead of batch norms; the batch norms of a foundation are folded into its convolutions.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.fedavg import FedAvg


class FedBn(FedAvg):
    """FedAvg of adapters and decoder without norms; the norms of encoder and decoder train locally."""

    name: ClassVar[str] = "fedbn"

    def trained(self) -> tuple[str, ...]:
        """Return adapters, decoder and the encoder's norms."""
        efficient = super().trained()
        # Adapters may contain norms too (PEFT's modules_to_save).
        return efficient + tuple(name for name in self.layout.norms if name not in set(efficient))

    def shared(self) -> tuple[str, ...]:
        """Return what FedAvg shares, without norms."""
        return tuple(name for name in super().shared() if name not in set(self.layout.norms))
