"""Where the transformer blocks of an image encoder are, for whoever attaches adapters to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Encoder(Protocol):
    """An image encoder that can be entered half-way: ``forward(x)`` is the trunk, module by module, on ``stem(x)``."""

    def stem(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, S, S] to what the first transformer block takes. Never carries adapters."""
        ...

    def trunk(self) -> tuple[nn.Module, ...]:
        """Return what follows the stem, in order; adapters stand inside these modules."""
        ...


@dataclass(frozen=True)
class BlockPaths:
    """Dotted module paths of one transformer block, relative to the encoder."""

    block: str
    attention: str
    mlp: str
    linears: tuple[str, ...]
    width: int


def block_paths(block: str, linears: tuple[str, ...], width: int) -> BlockPaths:
    """Name the parts of a block whose children are ``attn`` and ``mlp``; ``linears`` are relative to the block."""
    return BlockPaths(block, f"{block}.attn", f"{block}.mlp", tuple(f"{block}.{name}" for name in linears), width)
