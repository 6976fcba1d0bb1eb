"""The foundation as a segmentation model without prompts: encoder, mask decoder, pixel statistics."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamMaskDecoder

from fedsca_pipeline.model.foundation.blocks import BlockPaths, Encoder

__all__ = ["BlockPaths", "MaskDecoder", "SegmentationModel", "position_map"]

# ImageNet's statistics, with which every SAM was trained; red, green, blue in 0..255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class MaskDecoder(nn.Module):
    """SAM's mask decoder without prompts, embeddings [B, D, g, g] -> low-resolution logits [B, channels, 4g, 4g].

    Channel c starts as mask token and hypernetwork number c mod 4 of the pretrained decoder. All four pretrained tokens
    stay in the sequence, since they attend to one another. Up to four channels are therefore exactly SAM's logits of
    these tokens without a point or mask; one sigmoid class is token 0, SAM's single-mask output. The quality head is
    removed. ``state_dict`` has the trained tensors only.

    Args:
        sam: pretrained decoder, whose modules are reused and changed.
        position_matrix: SAM's random Fourier features, [2, D/2].
        no_mask: SAM's dense embedding for "no mask", [D].
        side: g, the embeddings' height and width.
    """

    position: Tensor
    no_mask: Tensor

    def __init__(
        self, sam: SamMaskDecoder, channels: int, *, position_matrix: Tensor, no_mask: Tensor, side: int
    ) -> None:
        super().__init__()
        pretrained = sam.num_mask_tokens
        tokens = torch.arange(max(pretrained, channels)) % pretrained
        sam.mask_tokens = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]  # torch has no types here
            sam.mask_tokens.weight.detach()[tokens]
        )
        sam.output_hypernetworks_mlps = nn.ModuleList(
            copy.deepcopy(sam.output_hypernetworks_mlps[channel % pretrained]) for channel in range(channels)
        )
        del sam.iou_prediction_head
        self.sam = sam
        self.register_buffer("position", position_map(position_matrix.detach(), side), persistent=False)
        self.register_buffer("no_mask", no_mask.detach().reshape(1, -1, 1, 1).clone(), persistent=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return low-resolution logits [B, channels, 4g, 4g] of embeddings [B, D, g, g]."""
        sam = self.sam
        tokens = torch.cat([sam.iou_token.weight, sam.mask_tokens.weight])
        tokens, image = sam.transformer(
            point_embeddings=tokens.expand(len(embeddings), 1, -1, -1),  # [B, 1, 1 + tokens, D]
            image_embeddings=embeddings + self.no_mask,
            image_positional_embeddings=self.position,
            attention_similarity=None,
        )
        image = image[:, 0].transpose(1, 2).unflatten(2, embeddings.shape[2:])  # [B, D, g, g]
        image = sam.activation(sam.upscale_layer_norm(sam.upscale_conv1(image)))  # [B, D/4, 2g, 2g]
        image = sam.activation(sam.upscale_conv2(image))  # [B, D/8, 4g, 4g]
        weights = [mlp(tokens[:, 0, 1 + channel]) for channel, mlp in enumerate(sam.output_hypernetworks_mlps)]
        logits: Tensor = (torch.stack(weights, dim=1) @ image.flatten(2)).unflatten(2, image.shape[2:])
        return logits


class SegmentationModel(nn.Module):
    """Encoder and decoder: normalised pixels [B, 3, S, S] -> logits [B, channels, S, S], both float32.

    Attributes:
        encoder: pixels -> embeddings [B, D, S/16, S/16]; with adapters it is a ``PeftModel``.
        decoder: embeddings -> logits [B, channels, S/4, S/4].
        image_size: S.
        channels: number of classes (head ``sigmoid``), or of classes and background (head ``softmax``).
        head: ``sigmoid`` or ``softmax``.
        blocks: the encoder's transformer blocks, from the input.
        upsampling: the weights of bilinear interpolation from S/4 to S along one axis, [S, S/4].
        pixel_mean, pixel_std: of red, green and blue in 0..255, [1, 3, 1, 1].
    """

    upsampling: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: MaskDecoder,
        *,
        image_size: int,
        channels: int,
        head: str,
        blocks: tuple[BlockPaths, ...],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.image_size = image_size
        self.channels = channels
        self.head = head
        self.blocks = blocks
        self.register_buffer("upsampling", interpolation_weights(image_size // 4, image_size), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def backbone(self) -> Encoder:
        """The encoder without PEFT's wrapper; adapters are inside its blocks."""
        encoder: Any = self.encoder
        backbone: Encoder = encoder.get_base_model() if hasattr(encoder, "get_base_model") else encoder
        return backbone

    def embed(self, pixels: Tensor) -> Tensor:
        """Return embeddings [B, D, S/16, S/16] of normalised pixels [B, 3, S, S]."""
        embeddings: Tensor = self.encoder(pixels)
        return embeddings

    def decode(self, embeddings: Tensor) -> Tensor:
        """Return logits [B, channels, S, S] of embeddings; the decoder's logits are resized bilinearly from S/4."""
        logits: Tensor = self.decoder(embeddings)
        if logits.is_cuda:
            # F.interpolate is right, too, but its gradient that repeats on CUDA is a slow decomposition.
            return upsampled(logits, self.upsampling)
        return F.interpolate(logits, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, channels, S, S] of normalised pixels [B, 3, S, S]."""
        return self.decode(self.embed(pixels))

    def normalise(self, images: Tensor, valid: Tensor) -> Tensor:
        """Return float32 pixels of images uint8 [B, 3, S, S], exactly 0 where ``valid`` bool [B, 1, S, S] is False."""
        return torch.where(valid, (images.float() - self.pixel_mean) / self.pixel_std, 0.0)


def interpolation_weights(length: int, longer: int) -> Tensor:
    """Return the weights of linear interpolation, float32 [longer, length], as ``F.interpolate`` uses them."""
    return F.interpolate(torch.eye(length)[None], size=longer, mode="linear", align_corners=False)[0].T.contiguous()


def upsampled(maps: Tensor, weights: Tensor) -> Tensor:
    """Return square maps [B, C, s, s] resized bilinearly, float32 [B, C, S, S], by two products with weights [S, s]."""
    with torch.autocast(maps.device.type, enabled=False):
        return weights @ maps.float() @ weights.T


def position_map(matrix: Tensor, side: int) -> Tensor:
    """Return SAM's Fourier features of the centres of a side x side grid over the unit square.

    Args:
        matrix: [2, D/2], maps (x, y) in [-1, 1] to angles in turns.
        side: rows and columns of the grid.

    Returns:
        [1, D, side, side], sines then cosines.
    """
    centres = (torch.arange(side, dtype=matrix.dtype) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    angles = 2 * math.pi * (torch.stack([x, y], dim=-1) @ matrix)  # [side, side, D/2]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None].contiguous()
