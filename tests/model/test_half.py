"""Frozen weights in bf16, which autocast then does not cast at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, RunConfig
from fedsca_pipeline.model.adapters.attach import attach_adapters
from fedsca_pipeline.model.foundation import load_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.half import HalfWeights

BF16 = torch.bfloat16
FEL = AdaptersConfig(width=4)
LORA = AdaptersConfig(method="lora", options={"r": 2})
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
kinds = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=on_cuda)])


def adapted(architecture: str, adapters: AdaptersConfig) -> tuple[SegmentationModel, set[str]]:
    """Return a model whose adapters train, and their names; the decoder is frozen."""
    foundation = FoundationConfig(name="random", architecture=architecture)
    model = load_foundation(foundation, Path("unused"), image_size=32, classes=1)
    attach_adapters(model, adapters)
    model.decoder.requires_grad_(False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        # Adapters start without an effect, and then hide what they multiply.
        if name in trained:
            nn.init.normal_(parameter, std=0.1)
    return model, trained


def casts(model: SegmentationModel, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits and gradients under autocast."""
    with torch.autocast(pixels.device.type, dtype=BF16):
        logits = model(pixels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return logits.detach(), list(torch.autograd.grad(logits.float().square().sum(), trained))


@kinds
@pytest.mark.parametrize("adapters", [FEL, LORA], ids=["fel", "lora"])
@pytest.mark.parametrize("architecture", ["tiny_vit", "sam_vit"])
def test_logits_and_gradients_are_those_of_autocast_to_the_bit(architecture: str, adapters, kind: str) -> None:
    with deterministic(RunConfig(device=kind), 1) as device:
        model, trained = adapted(architecture, adapters)
        model.to(device)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        logits, gradients = casts(model, pixels)

        with HalfWeights(model, trained, BF16).in_use():
            found, theirs = casts(model, pixels)

    assert torch.equal(found, logits)
    assert all(map(torch.equal, theirs, gradients))


def test_frozen_layers_alone_are_in_bf16_and_only_within_the_block() -> None:
    model, trained = adapted("tiny_vit", FEL)
    before = {name: parameter.data for name, parameter in model.named_parameters()}

    with pytest.raises(ZeroDivisionError), HalfWeights(model, trained, BF16).in_use():
        within = {name for name, parameter in model.named_parameters() if parameter.dtype == BF16}
        raise ZeroDivisionError

    # Norms compute in fp32 under autocast, and attention's biases are no layer's weights.
    layers = {
        f"{name}.{own}"
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        for own, _ in layer.named_parameters()
    }
    assert within == layers - trained
    assert within
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.data_ptr() == before[name].data_ptr() for name, parameter in model.named_parameters())


def test_weights_that_an_adapter_may_read_stay_in_fp32() -> None:
    model, trained = adapted("tiny_vit", LORA)

    with HalfWeights(model, trained, BF16).in_use():
        inside = [parameter for name, parameter in model.named_parameters() if ".base_layer." in name]

        assert inside
        assert all(parameter.dtype == torch.float32 for parameter in inside)


def test_without_autocast_nothing_changes() -> None:
    model, trained = adapted("tiny_vit", FEL)

    with HalfWeights(model, trained, None).in_use():
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
