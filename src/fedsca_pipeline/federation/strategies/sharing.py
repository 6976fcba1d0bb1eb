"""Strategies that share whole blocks: options for blocks, decoder, prior and the merging of LoRA factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies.base import Prior, Strategy, StrategyOptions
from fedsca_pipeline.federation.strategies.merge import is_lora_b, lora_pairs, merge_products

LoraMerge = Literal["a_only", "svd", "naive"]
ShareDecoder = bool | Literal["head"]
BlockNumbers = tuple[Annotated[int, Field(ge=0, strict=True)], ...]
SharedBlocks = Literal["low", "high", "all", "none"] | BlockNumbers

SHARED_BLOCKS_HELP = (
    "low (the first ceil(L/2) of the L adapted blocks), high (the others), all, none, or a list of block numbers from 0"
)
SHARE_DECODER_HELP = (
    "true, false, or head: share the mask decoder, or only its head (tokens, upscaling and hypernetworks)"
)
PRIOR_HELP = "samples (in proportion to the number of training images) or uniform"
LORA_MERGE_HELP = (
    "for adapters.method lora: a_only (only A crosses the wire), svd (products B A are mixed and reduced to the rank) "
    "or naive (A and B are mixed separately, which differs from mixing their products)"
)

_NAMED_BLOCKS: Mapping[str, Callable[[int], range]] = MappingProxyType(
    {
        "low": lambda count: range((count + 1) // 2),
        "high": lambda count: range((count + 1) // 2, count),
        "all": range,
        "none": lambda _: range(0),
    }
)


class BlockOptions(StrategyOptions):
    """Options of a strategy that shares whole blocks."""

    shared_blocks: SharedBlocks = Field("all", description=SHARED_BLOCKS_HELP)
    share_decoder: ShareDecoder = Field(False, description=SHARE_DECODER_HELP)
    prior: Prior = Field("samples", description=PRIOR_HELP)

    @field_validator("shared_blocks")
    @classmethod
    def _sorted_and_distinct(cls, blocks: SharedBlocks) -> SharedBlocks:
        if isinstance(blocks, str):
            return blocks
        if len(set(blocks)) < len(blocks):
            raise ValueError("a block is listed twice")
        return tuple(sorted(blocks))


class BlockStrategy(Strategy):
    """A strategy that shares the adapters of some blocks and, as an option, the decoder."""

    Options: ClassVar[type[BlockOptions]] = BlockOptions
    options: BlockOptions

    @property
    def prior(self) -> Prior:
        """The option ``prior``."""
        return self.options.prior

    @property
    def lora_merge(self) -> LoraMerge:
        """How LoRA factors are merged. Default: value by value."""
        return "naive"

    def shared(self) -> tuple[str, ...]:
        """Return the shared blocks' adapters from the input on, then the decoder; without LoRA's B for ``a_only``.

        Raises ConfigError if ``shared_blocks`` lists a block that the model does not have.
        """
        return tuple(name for part in self.parts() for name in part)

    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Return the shared names block by block, the decoder last; blocks that share nothing are left out."""
        parts = [self.layout.blocks[number] for number in self._shared_numbers()]
        if self.options.share_decoder:
            parts.append(self.layout.head if self.options.share_decoder == "head" else self.layout.decoder)
        if self.lora_merge == "a_only":
            parts = [tuple(name for name in part if not is_lora_b(name)) for part in parts]
        return tuple(part for part in parts if self.layout.size(part))

    def merge(self, mixed: Tensor, weights: Tensor, local_models: Tensor) -> Tensor:
        """Replace LoRA pairs by factors of their mixed products for ``lora_merge: svd``."""
        groups = self.groups()
        if self.lora_merge != "svd" or not groups:
            return mixed
        return merge_products(mixed, weights, local_models, groups, lora_pairs(self.shared(), self.layout.shapes))

    def _shared_numbers(self) -> Sequence[int]:
        blocks, count = self.options.shared_blocks, len(self.layout.blocks)
        numbers = _NAMED_BLOCKS[blocks](count) if isinstance(blocks, str) else blocks
        if beyond := [number for number in numbers if number >= count]:
            raise ConfigError(
                f"strategies.{self.name}.shared_blocks lists {', '.join(map(str, beyond))}, but the model has {count} "
                f"adapted blocks. Allowed: " + (f"0 to {count - 1}, or a name" if count else "none")
            )
        return numbers


class SharingOptions(BlockOptions):
    """Options of a strategy for any adapters, LoRA among them."""

    lora_merge: LoraMerge = Field("naive", description=LORA_MERGE_HELP)


class SharingStrategy(BlockStrategy):
    """A strategy for any adapters, with a choice of how LoRA factors are merged."""

    Options: ClassVar[type[SharingOptions]] = SharingOptions
    options: SharingOptions

    @property
    def lora_merge(self) -> LoraMerge:
        """The option ``lora_merge``."""
        return self.options.lora_merge
