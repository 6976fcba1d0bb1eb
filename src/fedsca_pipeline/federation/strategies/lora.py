"""What strategies for LoRA adapters have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.federation.strategies.base import StrategyOptions
from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.server_step import Prior
from fedsca_pipeline.federation.strategies.sharing import (
    PRIOR_HELP,
    SHARE_DECODER_HELP,
    SHARED_BLOCKS_HELP,
    LoraMerge,
    SharedBlocks,
    ShareDecoder,
    SharingStrategy,
)


class LoraOptions(StrategyOptions):
    """Options of a strategy that says itself how LoRA factors are shared."""

    shared_blocks: SharedBlocks = Field("all", description=SHARED_BLOCKS_HELP)
    share_decoder: ShareDecoder = Field(False, description=SHARE_DECODER_HELP)
    prior: Prior = Field("samples", description=PRIOR_HELP)


class LoraStrategy(Averaging, SharingStrategy):
    """FedAvg of LoRA factors, merged by the class's own rule."""

    Options: ClassVar[type[LoraOptions]] = LoraOptions
    adapter_methods: ClassVar[frozenset[str]] = frozenset({"lora"})
    options: LoraOptions
    merge_rule: ClassVar[LoraMerge]

    @property
    def lora_merge(self) -> LoraMerge:
        """The class's rule."""
        return self.merge_rule
