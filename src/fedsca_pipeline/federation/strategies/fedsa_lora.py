"""FedSA-LoRA: LoRA's A holds what the sites have in common and is averaged; B stays at the site.

Guo et al., *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, ICLR 2025.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.lora import LoraStrategy
from fedsca_pipeline.federation.strategies.sharing import LoraMerge


class FedSaLora(LoraStrategy):
    """A and B train; only A crosses the wire."""

    name: ClassVar[str] = "fedsa_lora"
    merge_rule: ClassVar[LoraMerge] = "a_only"
