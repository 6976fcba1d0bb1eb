"""Bilinear upsampling as two matrix products, which repeats to the bit on CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import FoundationConfig, RunConfig
from fedsca_pipeline.model.foundation import load_foundation
from fedsca_pipeline.model.foundation import model as foundation
from fedsca_pipeline.model.foundation.model import interpolation_weights, upsampled

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def bilinear(maps: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("side", "larger"), [(8, 32), (64, 256), (5, 20), (1, 4)])
def test_two_products_are_bilinear_interpolation_and_so_is_their_gradient(side: int, larger: int) -> None:
    draw = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, side, side, generator=draw, requires_grad=True)
    weighting = torch.randn(2, 3, larger, larger, generator=draw)
    weights = interpolation_weights(side, larger)

    found, wanted = upsampled(maps, weights), bilinear(maps, larger)

    assert_close(found, wanted)
    assert_close(*(torch.autograd.grad((out * weighting).sum(), maps)[0] for out in (found, wanted)))


def test_the_weights_are_exact_in_bf16_and_of_sum_one() -> None:
    weights = interpolation_weights(16, 64)

    assert torch.equal(weights.bfloat16().float(), weights)
    assert torch.equal(weights.sum(dim=1), torch.ones(64))


def test_in_an_autocast_block_the_products_keep_their_precision() -> None:
    maps = torch.full((1, 1, 4, 4), 1 + 2**-12)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = upsampled(maps, interpolation_weights(4, 16))

    assert torch.equal(found, torch.full((1, 1, 16, 16), 1 + 2**-12))


def test_on_the_cpu_logits_are_resized_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products would sum in another order, and so change the bits of every run."""
    monkeypatch.setattr(foundation, "upsampled", None)
    model = load_foundation(FoundationConfig(name="random"), Path("unused"), image_size=32, classes=1)
    embeddings = model.embed(torch.randn(1, 3, 32, 32))

    assert torch.equal(model.decode(embeddings), bilinear(model.decoder(embeddings), 32))


@on_cuda
def test_on_cuda_logits_and_gradient_are_those_of_the_cpu() -> None:
    found = []
    for kind in ("cpu", "cuda"):
        with deterministic(RunConfig(device=kind), 1) as device:
            model = load_foundation(FoundationConfig(name="random"), Path("unused"), image_size=32, classes=1).to(
                device
            )
            embeddings = torch.ones(1, 32, 2, 2, device=device, requires_grad=True)
            logits = model.decode(embeddings)
            (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings)
        found.append((logits.detach().cpu(), gradient.cpu()))

    for on_the_cpu, there in zip(*found, strict=True):
        assert_close(there, on_the_cpu, rtol=1e-3, atol=1e-4)
