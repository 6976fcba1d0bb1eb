"""SAM's ViT image encoder at any image size, from transformers' modules.

Source: Kirillov et al., *Segment Anything*, arXiv 2304.02643. A checkpoint belongs to one image size (1024). At
another one its absolute positions are resized bilinearly and the relative ones of global blocks linearly:
segment-anything's and MedSAM's convention.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionLayer

from fedsca_pipeline.model.foundation.blocks import BlockPaths, block_paths


class SamViT(nn.Module):
    """Image encoder, normalised pixels [B, 3, S, S] -> embeddings [B, output, S/16, S/16].

    Takes over the modules of ``vision``, resizing its position tables in place.
    """

    def __init__(self, vision: SamVisionEncoder, image_size: int) -> None:
        super().__init__()
        side = image_size // vision.config.patch_size
        self.patch_embed = vision.patch_embed
        self.patch_embed.image_size = (image_size, image_size)
        self.pos_embed = None if vision.pos_embed is None else _resized_map(vision.pos_embed, side)
        self.layers = vision.layers
        self.neck = vision.neck
        for layer in self.layers:
            _resize_relative(layer, side)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode; the shapes are the class's."""
        x = self.stem(pixels)
        for module in self.trunk():
            x = module(x)
        return x

    def stem(self, pixels: Tensor) -> Tensor:
        """Embed patches with their positions: [B, S/16, S/16, C]."""
        x = self.patch_embed(pixels)
        return x if self.pos_embed is None else x + self.pos_embed

    def trunk(self) -> tuple[nn.Module, ...]:
        """Return the transformer blocks and the neck."""
        return (*self.layers, self.neck)


def sam_vit_blocks(encoder: SamViT) -> tuple[BlockPaths, ...]:
    """Name the transformer blocks from the input on."""
    linears = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    return tuple(
        block_paths(f"layers.{number}", linears, layer.attn.proj.out_features)
        for number, layer in enumerate(encoder.layers)
    )


def _resize_relative(layer: SamVisionLayer, side: int) -> None:
    # A windowed block attends over its window whatever the image size: its tables fit already.
    if layer.window_size == 0 and layer.attn.use_rel_pos:
        layer.attn.rel_pos_h = _resized_table(layer.attn.rel_pos_h, 2 * side - 1)
        layer.attn.rel_pos_w = _resized_table(layer.attn.rel_pos_w, 2 * side - 1)


def _resized_map(positions: nn.Parameter, side: int) -> nn.Parameter:
    """[1, H, W, C] -> [1, side, side, C]; the same values where the size is the same."""
    if positions.shape[1:3] == (side, side):
        return positions
    resized = F.interpolate(positions.detach().permute(0, 3, 1, 2), size=(side, side), mode="bilinear")
    return nn.Parameter(resized.permute(0, 2, 3, 1).contiguous())


def _resized_table(table: nn.Parameter, length: int) -> nn.Parameter:
    """[L, C] -> [length, C]; the same values where the length is the same."""
    if table.shape[0] == length:
        return table
    return nn.Parameter(F.interpolate(table.detach().T[None], size=length, mode="linear")[0].T.contiguous())
