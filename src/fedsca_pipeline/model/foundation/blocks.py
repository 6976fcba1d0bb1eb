"""Paths of an image encoder's transformer blocks, to which adapters are attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Encoder(Protocol):
    """An image encoder in two parts, so that it can be cut anywhere: ``forward(x)`` runs the trunk on ``stem(x)``."""

    def stem(self, pixels: Tensor) -> Tensor:
        """Return the first transformer block's input for normalised pixels [B, 3, S, S]; never has adapters."""
        ...

    def trunk(self) -> tuple[nn.Module, ...]:
        """Return the modules after the stem, in order; adapters are inside them."""
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
    """Return the paths of a block whose children are ``attn`` and ``mlp``; ``linears`` are relative to the block."""
    return BlockPaths(block, f"{block}.attn", f"{block}.mlp", tuple(f"{block}.{name}" for name in linears), width)
