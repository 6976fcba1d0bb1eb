"""TinyViT: its window attention against a plain one, its shapes and its blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsca_pipeline.model.foundation.tiny_vit import TEST_SIZES, TinyViT, WindowAttention, tiny_vit_blocks


def _plain_attention(module: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Attend window by window, with padding before the norm and an explicit softmax."""
    _, height, width, channels = x.shape
    side = module.window
    padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    out = torch.empty_like(padded)
    for top in range(0, padded.shape[1], side):
        for left in range(0, padded.shape[2], side):
            window = padded[:, top : top + side, left : left + side].reshape(len(x), side * side, channels)
            qkv = module.qkv(module.norm(window)).view(len(x), side * side, module.heads, 3, -1)
            query, key, value = qkv.permute(3, 0, 2, 1, 4)
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            for i in range(side * side):
                for j in range(side * side):
                    distance = abs(i // side - j // side) * side + abs(i % side - j % side)
                    scores[:, :, i, j] += module.biases[:, distance]
            attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(len(x), side, side, channels)
            out[:, top : top + side, left : left + side] = module.proj(attended)
    return out[:, :height, :width]


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 7), width=st.integers(1, 7), window=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_window_attention_is_plain_attention_in_each_window_with_zero_padding_before_the_norm(
    height, width, window, seed
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = WindowAttention(8, heads=2, window=window).requires_grad_(False)
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
        x = torch.randn(2, height, width, 8)

    torch.testing.assert_close(module(x), _plain_attention(module, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80])
def test_any_image_size_divisible_by_16_is_encoded_to_a_sixteenth(size):
    encoder = TinyViT(TEST_SIZES).requires_grad_(False)

    assert encoder(torch.randn(2, 3, size, size)).shape == (2, TEST_SIZES.output, size // 16, size // 16)


def test_the_mobile_sam_encoder_has_ten_transformer_blocks_after_two_convolutional_ones():
    blocks = tiny_vit_blocks(TinyViT())

    assert [block.width for block in blocks] == [128] * 2 + [160] * 6 + [320] * 2
    assert blocks[0].block == "layers.1.blocks.0"
    assert blocks[-1].linears[0] == "layers.3.blocks.1.attn.qkv"


def test_images_of_a_batch_do_not_influence_one_another():
    encoder = TinyViT(TEST_SIZES).requires_grad_(False)
    images = torch.randn(3, 3, 48, 48)

    torch.testing.assert_close(encoder(images)[1:2], encoder(images[1:2]), atol=1e-5, rtol=1e-5)
