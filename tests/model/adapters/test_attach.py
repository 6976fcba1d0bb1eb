"""The layout of a model with adapters, and adapters that are refused."""

from __future__ import annotations

import pytest

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation


def test_the_head_is_the_decoder_without_its_transformer(tmp_path):
    model = load_foundation(FoundationConfig(name="random"), tmp_path, image_size=32, classes=2)

    layout = tensor_layout(attach_adapters(model, AdaptersConfig(width=2)))

    parts = {name.split(".")[2] for name in layout.head}
    assert parts == {
        "iou_token", "mask_tokens", "upscale_conv1", "upscale_conv2", "upscale_layer_norm", "output_hypernetworks_mlps"
    }  # fmt: skip
    assert {name.split(".")[2] for name in set(layout.decoder) - set(layout.head)} == {"transformer"}


def test_adapters_that_change_pretrained_values_are_refused(tmp_path):
    model = load_foundation(FoundationConfig(name="random"), tmp_path, image_size=32, classes=1)

    with pytest.raises(ConfigError, match="changes the foundation's own values"):
        attach_adapters(model, AdaptersConfig(method="lora", options={"r": 2, "init_lora_weights": "pissa"}))
