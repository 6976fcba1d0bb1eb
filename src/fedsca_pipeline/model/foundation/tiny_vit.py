"""TinyViT as MobileSAM's image encoder: a convolutional stage, then three stages of windowed attention.

Sources: Wu et al., *TinyViT: Fast Pretraining Distillation for Small Vision Transformers*, arXiv 2207.10666; Zhang et
al., *Faster Segment Anything: Towards Lightweight SAM for Mobile Applications*, arXiv 2306.14289. BatchNorms are folded
into their convolutions, since the encoder stays frozen. Shapes: B images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from fedsca_pipeline.model.foundation.blocks import BlockPaths, block_paths


@dataclass(frozen=True)
class TinyVitSizes:
    """Sizes of the four stages and of the output. The first stage is convolutional and has no heads or windows."""

    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    windows: tuple[int, int, int, int] = (7, 7, 14, 7)
    output: int = 256


MOBILE_SAM_SIZES = TinyVitSizes()
TEST_SIZES = TinyVitSizes((16, 16, 32, 32), depths=(1, 1, 2, 1), heads=(1, 2, 4, 4), windows=(2, 2, 3, 2), output=32)


class ConvBlock(nn.Module):
    """Inverted bottleneck with a residual, [B, C, H, W] -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.conv1 = nn.Conv2d(width, hidden, kernel_size=1)
        self.conv2 = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [B, C, H, W]."""
        y = F.gelu(self.conv1(x))
        y = F.gelu(self.conv2(y))
        return F.gelu(x + self.conv3(y))


class Downsample(nn.Module):
    """Three convolutions to the next stage's width, [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, width: int, next_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, next_width, kernel_size=1)
        self.conv2 = nn.Conv2d(next_width, next_width, kernel_size=3, padding=1, stride=stride, groups=next_width)
        self.conv3 = nn.Conv2d(next_width, next_width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next stage's input, [B, C', H/stride, W/stride]."""
        x = F.gelu(self.conv1(x))
        output: Tensor = self.conv3(F.gelu(self.conv2(x)))
        return output


class WindowAttention(nn.Module):
    """Layer norm, then attention within windows with a learned bias per distance, [B, H, W, C] -> same.

    The weights were trained on maps that are padded with zeros *before* the norm, to a multiple of the window, and
    padding is attended to. The norm turns zeros into its bias, so every padded position has the same key and value.
    This module adds one position for all of them, with the logarithm of their summed exponentials as its bias. The
    attention is the same, without queries and products for padding that is cut off afterwards.
    """

    distances: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.empty(heads, window * window).normal_(std=0.02))
        self.register_buffer("distances", _distances(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention's output, [B, H, W, C]."""
        qkv = self.qkv(self.norm(x))
        padding = self.qkv(self.norm.bias)
        biases = self.biases[:, self.distances].view(self.heads, *(self.window,) * 4)
        # Whole windows, then the smaller ones that are left at the right and at the bottom.
        bands = [
            torch.cat([self._attend(part, padding, biases) for part in _whole_and_rest(band, self.window, 2)], dim=2)
            for band in _whole_and_rest(qkv, self.window, 1)
        ]
        attended: Tensor = self.proj(torch.cat(bands, dim=1))
        return attended

    def _attend(self, qkv: Tensor, padding: Tensor, biases: Tensor) -> Tensor:
        """Attend within windows of one shape, at most the whole map: [B, H, W, 3C] -> [B, H, W, C].

        ``padding`` [3C] is the ``qkv`` of a padded position; ``biases`` is [heads, side, side, side, side].
        """
        batch, height, width, _ = qkv.shape
        high, wide = min(height, self.window), min(width, self.window)
        rows, columns, heads = height // high, width // wide, self.heads
        qkv = qkv.view(batch, rows, high, columns, wide, heads, -1)
        qkv = qkv.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * rows * columns, heads, high * wide, -1)
        query, key, value = qkv.chunk(3, dim=-1)  # each [B windows, heads, positions, C/heads]
        biases = biases[:, :high, :wide].flatten(1, 2)  # [heads, positions, side, side]
        bias = biases[..., :high, :wide].flatten(2)  # [heads, positions, positions]
        if high * wide < self.window**2:
            beyond = torch.cat([biases[..., high:, :].flatten(2), biases[..., :high, wide:].flatten(2)], dim=2)
            bias = torch.cat([bias, beyond.logsumexp(dim=2, keepdim=True)], dim=2)
            _, pad_key, pad_value = padding.view(heads, 1, -1).expand(len(qkv), -1, -1, -1).chunk(3, dim=-1)
            key, value = torch.cat([key, pad_key], dim=2), torch.cat([value, pad_value], dim=2)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0))
        y = y.view(batch, rows, columns, heads, high, wide, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return y.reshape(batch, height, width, -1)


class Mlp(nn.Module):
    """Layer norm and two linear layers, [B, H, W, C] -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output, [B, H, W, C]."""
        output: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return output


class TransformerBlock(nn.Module):
    """Attention, a depthwise convolution, MLP; [B, C, H, W] -> same."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [B, C, H, W]."""
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = x + self.attn(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.mlp(x)
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one width, then the downsampling to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return the next stage's input."""
        output: Tensor = self.downsample(self.blocks(x))
        return output


class TinyViT(nn.Module):
    """Image encoder, normalised pixels [B, 3, S, S] -> embeddings [B, output, S/16, S/16], S divisible by 16."""

    def __init__(self, sizes: TinyVitSizes = MOBILE_SAM_SIZES) -> None:
        super().__init__()
        first, second, third, fourth = sizes.widths
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, first // 2, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(first // 2, first, kernel_size=3, stride=2, padding=1),
        )
        downsamples = (
            Downsample(first, second, stride=2),
            Downsample(second, third, stride=2),
            Downsample(third, fourth, stride=1),
            nn.Identity(),
        )
        convolutional = [ConvBlock(first) for _ in range(sizes.depths[0])]
        windowed = [
            [TransformerBlock(width, heads, window) for _ in range(depth)]
            for width, depth, heads, window in zip(sizes.widths, sizes.depths, sizes.heads, sizes.windows, strict=True)
        ][1:]
        stages: list[Sequence[nn.Module]] = [convolutional, *windowed]
        self.layers = nn.Sequential(*(Stage(blocks, down) for blocks, down in zip(stages, downsamples, strict=True)))
        self.neck = nn.Sequential(
            nn.Conv2d(fourth, sizes.output, kernel_size=1, bias=False),
            _channel_norm(sizes.output),
            nn.Conv2d(sizes.output, sizes.output, kernel_size=3, padding=1, bias=False),
            _channel_norm(sizes.output),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return embeddings [B, output, S/16, S/16] of normalised pixels [B, 3, S, S]."""
        x = self.stem(pixels)
        for module in self.trunk():
            x = module(x)  # in turn [B, 128, S/8, S/8], [B, 160, S/16, S/16], [B, 320, S/16, S/16]
        return x

    def stem(self, pixels: Tensor) -> Tensor:
        """Return the output of the convolutional stage, [B, 128, S/8, S/8]."""
        x: Tensor = self.layers[0](self.patch_embed(pixels))
        return x

    def trunk(self) -> tuple[nn.Module, ...]:
        """Return the transformer blocks, the downsamplings between stages, and the neck."""
        windowed = [stage for stage in self.layers if isinstance(stage, Stage)][1:]
        return (*(part for stage in windowed for part in (*stage.blocks, stage.downsample)), self.neck)


def tiny_vit_blocks(encoder: TinyViT) -> tuple[BlockPaths, ...]:
    """Return the paths of the transformer blocks, from the input; convolutional blocks get no adapters."""
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return tuple(
        block_paths(name, linears, module.attn.proj.out_features)
        for name, module in encoder.named_modules()
        if isinstance(module, TransformerBlock)
    )


def _channel_norm(width: int) -> nn.Module:
    norm: nn.Module = SamLayerNorm(width, data_format="channels_first")  # type: ignore[no-untyped-call]  # transformers has no types here
    return norm


def _distances(window: int) -> Tensor:
    """Return the index of the distance (|dy|, |dx|) between every two window positions, int64 [window², window²]."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None]).abs() * window + (x[:, None] - x[None]).abs()


def _whole_and_rest(x: Tensor, side: int, dim: int) -> list[Tensor]:
    """Return ``x`` cut along ``dim`` into the part that ``side`` divides and the rest, without empty parts."""
    length = x.shape[dim]
    return list(torch.split(x, [part for part in (length - length % side, length % side) if part], dim=dim))
