"""What strategies for LoRA adapters have in common."""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.sharing import BlockOptions, BlockStrategy, LoraMerge


class LoraOptions(BlockOptions):
    """Options of a strategy that decides itself how LoRA factors are merged."""


class LoraStrategy(Averaging, BlockStrategy):
    """FedAvg of LoRA factors, merged by the rule of the class."""

    Options: ClassVar[type[LoraOptions]] = LoraOptions
    options: LoraOptions
    adapter_methods: ClassVar[frozenset[str]] = frozenset({"lora"})
    merge_rule: ClassVar[LoraMerge]

    @property
    def lora_merge(self) -> LoraMerge:
        """The rule of the class."""
        return self.merge_rule
