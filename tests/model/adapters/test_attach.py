"""The layout of a model with adapters, and adapters that are refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft.utils import CONFIG_NAME

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.files import read_json
from fedsca_pipeline.model.adapters.attach import attach_adapters, load_adapters, tensor_layout
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


@pytest.mark.parametrize(
    ("architecture", "method"),
    [*product(("tiny_vit", "sam_vit"), ("oft", "gralora", "poly")), ("tiny_vit", "adamss")],
)
def test_a_method_that_attaches_but_cannot_run_is_refused_before_training(tmp_path, architecture, method):
    foundation = FoundationConfig(name="random", architecture=architecture)
    model = load_foundation(foundation, tmp_path, image_size=32, classes=1)

    with pytest.raises(ConfigError, match=rf"adapters\.method: '{method}' cannot be .* on maps") as refused:
        attach_adapters(model, AdaptersConfig(method=method))

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["lora", "boft", "hra", "loha", "lokr", "vera", "randlora", "delora", "ln_tuning"])
@pytest.mark.parametrize("architecture", ["tiny_vit", "sam_vit"])
def test_a_method_that_attaches_computes_a_gradient_of_its_tensors(tmp_path, architecture, method):
    foundation = FoundationConfig(name="random", architecture=architecture)
    model = load_foundation(foundation, tmp_path, image_size=32, classes=1)
    names = tensor_layout(attach_adapters(model, AdaptersConfig(method=method))).adapters

    model(torch.rand(1, 3, 32, 32)).sum().backward()

    parameters = dict(model.named_parameters())
    assert names
    assert all(parameters[name].grad is not None for name in names)


@pytest.mark.parametrize("option", [{"exclude_modules": "(a|a)*$"}, {"r": 2**20}, {"rank_pattern": {"(a|a)*$": 2}}])
def test_options_that_could_not_be_read_back_are_refused_before_training(tmp_path, option):
    model = load_foundation(FoundationConfig(name="random"), tmp_path, image_size=32, classes=1)

    with pytest.raises(ConfigError, match=rf"adapters\.options: {next(iter(option))}: .* is no plain word"):
        attach_adapters(model, AdaptersConfig(method="lora", options=option))


def test_a_pattern_of_modules_is_saved_as_their_names(tmp_path):
    options = {"r": 2, "target_modules": r".*attn\.qkv"}
    models = [load_foundation(FoundationConfig(name="random"), tmp_path, image_size=32, classes=1) for _ in range(2)]
    attach_adapters(models[0], AdaptersConfig(method="lora", options=options)).encoder.save_pretrained(str(tmp_path))

    load_adapters(models[1], tmp_path)

    names = read_json(tmp_path / CONFIG_NAME)["target_modules"]
    assert names
    assert all(name.endswith("attn.qkv") for name in names)
    assert tensor_layout(models[0]).adapters
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
