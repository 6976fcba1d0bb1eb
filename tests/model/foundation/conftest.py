"""Tiny SAM models and their checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

WIDTH, SIZE = 32, 64


@pytest.fixture(scope="session")
def tiny_sam() -> Callable[..., SamModel]:
    """A factory of tiny SAM models with seeded random weights, position tables included."""

    def make(*, decoder_epsilon: float = 1e-5, image_size: int = SIZE) -> SamModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = SamModel(
                SamConfig(
                    vision_config=SamVisionConfig(
                        hidden_size=WIDTH,
                        output_channels=WIDTH,
                        num_hidden_layers=3,
                        num_attention_heads=2,
                        image_size=image_size,
                        mlp_ratio=2.0,
                        window_size=3,
                        global_attn_indexes=[1],
                        num_pos_feats=WIDTH // 2,
                    ),
                    prompt_encoder_config=SamPromptEncoderConfig(hidden_size=WIDTH, image_size=image_size),
                    mask_decoder_config=SamMaskDecoderConfig(
                        hidden_size=WIDTH,
                        mlp_dim=2 * WIDTH,
                        num_attention_heads=2,
                        iou_head_hidden_dim=WIDTH,
                        layer_norm_eps=decoder_epsilon,
                    ),
                )
            )
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def sam_checkpoint(tiny_sam: Callable[..., SamModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``SamModel.save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("sam_checkpoint")
    tiny_sam().save_pretrained(folder)
    return folder
