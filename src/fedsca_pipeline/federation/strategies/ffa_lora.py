"""FFA-LoRA: LoRA's A is frozen at its random start, so that averaging B averages the products B A exactly.

Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.lora import LoraStrategy
from fedsca_pipeline.federation.strategies.merge import is_lora_a
from fedsca_pipeline.federation.strategies.sharing import LoraMerge


class FfaLora(LoraStrategy):
    """B trains and crosses the wire; A, drawn from ``adapters.seed``, is the same at every site."""

    name: ClassVar[str] = "ffa_lora"
    merge_rule: ClassVar[LoraMerge] = "naive"

    def trained(self) -> tuple[str, ...]:
        """Return B and the decoder."""
        return tuple(name for name in super().trained() if not is_lora_a(name))

    def shared(self) -> tuple[str, ...]:
        """Return B, and the decoder if it is shared."""
        return tuple(name for name in super().shared() if not is_lora_a(name))
