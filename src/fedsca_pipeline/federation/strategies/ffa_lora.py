"""FFA-LoRA: LoRA's A is frozen at its random start, so that averaging B averages the products B A exactly.

Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.lora import LoraStrategy
from fedsca_pipeline.federation.strategies.merge import is_lora_a
from fedsca_pipeline.federation.strategies.sharing import LoraMerge
from fedsca_pipeline.model.layout import TensorLayout


class FfaLora(LoraStrategy):
    """B trains and travels; A, drawn from ``adapters.seed``, is the same everywhere."""

    name: ClassVar[str] = "ffa_lora"
    merge_rule: ClassVar[LoraMerge] = "naive"

    def trained(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return B and the decoder."""
        return tuple(name for name in super().trained(layout) if not is_lora_a(name))

    def shared(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return B, and the decoder where it is shared."""
        return tuple(name for name in super().shared(layout) if not is_lora_a(name))
