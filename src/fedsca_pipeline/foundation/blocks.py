"""Where the transformer blocks of an image encoder are, for whoever attaches adapters to them."""

from __future__ import annotations

from dataclasses import dataclass


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
