"""Linear layers that run on oneDNN, on processors where PyTorch's default BLAS reaches half the speed.

PyTorch multiplies fp32 matrices with Intel's MKL, which uses its AVX2 kernels on AMD processors. oneDNN, which is part
of PyTorch too, uses AVX-512 there (docs/performance.md). Products are the same, summed in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` that multiplies with oneDNN, forward and backward, if the input is fp32 and on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, [..., in] -> [..., out]."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim < 2:
            return super().forward(x)
        output: Tensor = _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch has no types here
        return output


def onednn_is_quicker() -> bool:
    """Return whether this processor is an AMD one with AVX-512 and PyTorch has both MKL and oneDNN."""
    # PyTorch has no types for either call.
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (mkl and onednn):
        return False
    processor = torch.cpu.get_capabilities()
    return "AMD" in processor.get("cpu_name", "") and processor.get("avx512_f", False)


def use_onednn(model: nn.Module) -> None:
    """Turn every plain linear layer of ``model`` into a ``OneDnnLinear``, in place; names and values stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


def use_torch(model: nn.Module) -> None:
    """Put back the linear layers that ``use_onednn`` replaced."""
    for module in model.modules():
        if type(module) is OneDnnLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # mypy allows subclasses only


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if for_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(dim=0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b``."""
    if not x.numel():
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
