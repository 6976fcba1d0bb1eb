"""SAM's ViT image encoder at any image size, from transformers' modules.

Source: Kirillov et al., *Segment Anything*, arXiv 2304.02643. A checkpoint is made for one image size (1024). For
another size its absolute positions are resized bilinearly, and the relative positions of global blocks linearly, as
segment-anything and MedSAM do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionLayer, SamVisionSdpaAttention

from fedsca_pipeline.model.foundation.blocks import BlockPaths, block_paths


class RelativeAttention(SamVisionSdpaAttention):
    """transformers' attention with relative positions that are found on the device.

    transformers computes their indices on the CPU in every pass, and a GPU that needs them waits for the copy.
    """

    offsets: Tensor

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
        """Return the relative positions [q_size, k_size, C] of a table [L, C]."""
        if (q_size, k_size) == self.offsets.shape:
            return rel_pos[self.offsets]
        # A map of another size, as of a block that is tried out alone.
        positions: Tensor = super().get_rel_pos(q_size, k_size, rel_pos)
        return positions


class SamViT(nn.Module):
    """Image encoder, normalised pixels [B, 3, S, S] -> embeddings [B, output, S/16, S/16].

    It reuses the modules of ``vision`` and resizes their position tables in place.
    """

    def __init__(self, vision: SamVisionEncoder, image_size: int) -> None:
        super().__init__()
        # transformers allows a list or tuple as patch size; SAM uses an int.
        side = image_size // vision.config.patch_size  # type: ignore[operator]
        self.patch_embed = vision.patch_embed
        self.patch_embed.image_size = (image_size, image_size)
        self.pos_embed = None if vision.pos_embed is None else _resized_map(vision.pos_embed, side)
        self.layers = vision.layers
        self.neck = vision.neck
        for layer in self.layers:
            if isinstance(layer, SamVisionLayer):
                _resize_relative(layer, side)
                _find_offsets(layer, side)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return embeddings [B, output, S/16, S/16] of normalised pixels [B, 3, S, S]."""
        x = self.stem(pixels)
        for module in self.trunk():
            x = module(x)
        return x

    def stem(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings plus positions, [B, S/16, S/16, C]."""
        x: Tensor = self.patch_embed(pixels)
        return x if self.pos_embed is None else x + self.pos_embed

    def trunk(self) -> tuple[nn.Module, ...]:
        """Return the transformer blocks and the neck."""
        return (*self.layers, self.neck)


def sam_vit_blocks(encoder: SamViT) -> tuple[BlockPaths, ...]:
    """Return the paths of the transformer blocks, from the input."""
    linears = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    return tuple(
        block_paths(f"layers.{number}", linears, layer.attn.proj.out_features)
        for number, layer in enumerate(encoder.layers)
        if isinstance(layer, SamVisionLayer)
    )


def _resize_relative(layer: SamVisionLayer, side: int) -> None:
    # A windowed block attends within its window at any image size, so its tables fit already.
    if layer.window_size == 0 and layer.attn.use_rel_pos:
        layer.attn.rel_pos_h = _resized_table(layer.attn.rel_pos_h, 2 * side - 1)
        layer.attn.rel_pos_w = _resized_table(layer.attn.rel_pos_w, 2 * side - 1)


def _find_offsets(layer: SamVisionLayer, side: int) -> None:
    # A windowed block attends within its window at any image size.
    places = torch.arange(layer.window_size or side)
    layer.attn.register_buffer("offsets", places[:, None] - places + len(places) - 1, persistent=False)
    layer.attn.__class__ = RelativeAttention


def _resized_map(positions: nn.Parameter, side: int) -> nn.Parameter:
    """Return positions [1, H, W, C] resized to [1, side, side, C]; unchanged if they have that size."""
    if positions.shape[1:3] == (side, side):
        return positions
    resized = F.interpolate(positions.detach().permute(0, 3, 1, 2), size=(side, side), mode="bilinear")
    return nn.Parameter(resized.permute(0, 2, 3, 1).contiguous())


def _resized_table(table: nn.Parameter, length: int) -> nn.Parameter:
    """Return a table [L, C] resized to [length, C]; unchanged if it has that length."""
    if table.shape[0] == length:
        return table
    return nn.Parameter(F.interpolate(table.detach().T[None], size=length, mode="linear")[0].T.contiguous())
