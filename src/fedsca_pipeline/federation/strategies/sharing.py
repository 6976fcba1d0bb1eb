"""What fedsca and fedavg have in common: a choice of shared blocks, of the prior and of how LoRA factors are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions
from fedsca_pipeline.federation.strategies.kernels import Groups
from fedsca_pipeline.federation.strategies.merge import is_lora_b, lora_pairs, merge_products
from fedsca_pipeline.federation.strategies.server_step import Prior
from fedsca_pipeline.model.layout import TensorLayout

LoraMerge = Literal["a_only", "svd", "naive"]
ShareDecoder = bool | Literal["head"]
BlockNumbers = tuple[Annotated[int, Field(ge=0, strict=True)], ...]
SharedBlocks = Literal["low", "high", "all", "none"] | BlockNumbers

SHARED_BLOCKS_HELP = (
    "low (the first ceil(L/2) of the L adapted blocks), high (the others), all, none, or a list of block numbers from 0"
)
SHARE_DECODER_HELP = (
    "true, false, or head: whether the mask decoder crosses the wire, too, or of it tokens, upscaling and hypernetworks"
)
PRIOR_HELP = "samples (in proportion to the number of training images) or uniform"
LORA_MERGE_HELP = (
    "for adapters.method lora: a_only (only A travels), svd (products B A are mixed and cut back to the rank) or naive "
    "(A and B are mixed apart, which is not mixing their products)"
)

_NAMED_BLOCKS: Mapping[str, Callable[[int], range]] = MappingProxyType(
    {
        "low": lambda count: range((count + 1) // 2),
        "high": lambda count: range((count + 1) // 2, count),
        "all": range,
        "none": lambda _: range(0),
    }
)


class SharingOptions(StrategyOptions):
    """Options of a strategy that shares whole blocks."""

    shared_blocks: SharedBlocks = Field("all", description=SHARED_BLOCKS_HELP)
    share_decoder: ShareDecoder = Field(False, description=SHARE_DECODER_HELP)
    prior: Prior = Field("samples", description=PRIOR_HELP)
    lora_merge: LoraMerge = Field("naive", description=LORA_MERGE_HELP)

    @field_validator("shared_blocks")
    @classmethod
    def _once_each(cls, blocks: SharedBlocks) -> SharedBlocks:
        if isinstance(blocks, str):
            return blocks
        if len(set(blocks)) < len(blocks):
            raise ValueError("a block is listed twice")
        return tuple(sorted(blocks))


class SharingStrategy(Strategy):
    """A strategy that shares the adapters of some blocks and, if asked to, the decoder."""

    Options: ClassVar[type[SharingOptions]] = SharingOptions
    options: SharingOptions

    def __init__(self, options: SharingOptions) -> None:
        super().__init__(options)
        self.prior = options.prior

    @property
    def lora_merge(self) -> LoraMerge:
        """How LoRA factors are merged."""
        return self.options.lora_merge

    def shared(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return the shared blocks' adapters from the input on, then the decoder; without LoRA's B for ``a_only``.

        Raises ConfigError where ``shared_blocks`` lists a block that the model does not have.
        """
        return tuple(name for part in self.parts(layout) for name in part)

    def parts(self, layout: TensorLayout) -> tuple[tuple[str, ...], ...]:
        """Return the shared names block by block, the decoder last; blocks that share nothing are left out."""
        parts = [layout.blocks[number] for number in self._numbers(len(layout.blocks))]
        if self.options.share_decoder:
            parts.append(layout.head if self.options.share_decoder == "head" else layout.decoder)
        if self.lora_merge == "a_only":
            parts = [tuple(name for name in part if not is_lora_b(name)) for part in parts]
        return tuple(part for part in parts if layout.size(part))

    def merge(
        self, mixed: Tensor, weights: Tensor, masters: Tensor, groups: Groups, layout: TensorLayout | None
    ) -> Tensor:
        """Put merged products in the place of LoRA pairs for ``lora_merge: svd``."""
        if self.lora_merge != "svd" or not groups:
            return mixed
        if layout is None:
            raise ConfigError(
                f"strategies.{self.name}.lora_merge is 'svd': aggregate() needs the layout to find the pairs"
            )
        return merge_products(mixed, weights, masters, groups, lora_pairs(self.shared(layout), layout.shapes))

    def _numbers(self, count: int) -> tuple[int, ...]:
        blocks = self.options.shared_blocks
        numbers = tuple(_NAMED_BLOCKS[blocks](count)) if isinstance(blocks, str) else blocks
        if beyond := [number for number in numbers if number >= count]:
            raise ConfigError(
                f"strategies.{self.name}.shared_blocks lists {', '.join(map(str, beyond))}, but the model has {count} "
                f"adapted blocks. Allowed: " + (f"0 to {count - 1}, or a name" if count else "none")
            )
        return numbers
