"""Linear layers on oneDNN equal PyTorch's plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.model.foundation import linear, load_foundation

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def _pair(inside: int, outside: int, *, bias: bool, seed: int) -> tuple[nn.Linear, nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = nn.Linear(inside, outside, bias=bias)
    quick = copy.deepcopy(plain)
    linear.use_onednn(quick)
    return plain, quick


def _run(layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    inside=st.integers(1, 40),
    outside=st.integers(1, 40),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_those_of_a_plain_linear_layer(shape, inside, outside, bias, transposed, seed):
    plain, quick = _pair(inside, outside, bias=bias, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, inside, generator=generator)
    if transposed:
        # Like a permuted map: the same values with other strides.
        x = x.transpose(0, -1).contiguous().transpose(0, -1)

    for ours, theirs in zip(_run(quick, x), _run(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_only_tensors_that_require_a_gradient_get_one():
    _, quick = _pair(3, 4, bias=True, seed=0)
    quick.requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)

    quick(x).sum().backward()

    assert x.grad is not None
    assert quick.weight.grad is quick.bias.grad is None


@needs_onednn
def test_a_vector_an_empty_batch_and_other_dtypes_work_as_in_a_plain_linear_layer():
    plain, quick = _pair(3, 4, bias=True, seed=0)

    torch.testing.assert_close(quick(torch.ones(3)), plain(torch.ones(3)))
    assert quick(torch.ones(0, 3)).shape == (0, 4)
    assert quick.double()(torch.ones(2, 3).double()).dtype == torch.float64


def test_the_switch_to_onednn_keeps_names_and_values_and_can_be_undone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    linear.use_onednn(model)
    kinds = [type(model[0]), type(model[1][0])]
    linear.use_torch(model)

    assert kinds == [linear.OneDnnLinear] * 2
    assert [type(model[0]), type(model[1][0])] == [nn.Linear] * 2
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "avx512", "quicker"),
    [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel(R) Xeon(R)", True, False)],
)
def test_onednn_is_used_on_amd_processors_with_avx512(monkeypatch, name, avx512, quicker):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": avx512})

    assert linear.onednn_is_quicker() is quicker


@needs_onednn
@pytest.mark.parametrize("architecture", ["tiny_vit", "sam_vit"])
def test_a_whole_foundation_gives_the_same_logits_with_and_without_onednn(monkeypatch, tmp_path, architecture):
    monkeypatch.setattr("fedsca_pipeline.model.foundation.build.onednn_is_quicker", lambda: True)
    config = FoundationConfig(name="random", architecture=architecture)
    model = load_foundation(config, tmp_path, image_size=64, classes=2)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        quick = model(images)
        linear.use_torch(model)
        plain = model(images)

    torch.testing.assert_close(quick, plain, atol=1e-4, rtol=1e-4)
