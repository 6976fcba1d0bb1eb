"""LAT without SGCA: only the low adapters are sent, and FedAvg averages them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.federation.strategies.fedavg import Averaging
from fedsca_pipeline.federation.strategies.sharing import (
    LORA_MERGE_HELP,
    SHARED_BLOCKS_HELP,
    LoraMerge,
    SharedBlocks,
    SharingOptions,
    SharingStrategy,
)


class FedAvgLowOptions(SharingOptions):
    """``strategies.fedavg_low``."""

    shared_blocks: SharedBlocks = Field("low", description=SHARED_BLOCKS_HELP)
    lora_merge: LoraMerge = Field("a_only", description=LORA_MERGE_HELP)


class FedAvgLow(Averaging, SharingStrategy):
    """FedAvg of the tensors that FedSCA sends."""

    name: ClassVar[str] = "fedavg_low"
    Options: ClassVar[type[FedAvgLowOptions]] = FedAvgLowOptions
