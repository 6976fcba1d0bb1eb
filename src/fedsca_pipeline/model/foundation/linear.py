"""Linear layers by oneDNN, on processors where PyTorch's own BLAS leaves half of the speed unused.

PyTorch multiplies fp32 matrices by Intel's MKL, which takes its AVX2 kernels on AMD processors; oneDNN, which comes
with PyTorch too, takes AVX-512 there (docs/performance.md). Same products, summed in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` whose products oneDNN makes, forward and backward, where values are fp32 and on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, [..., in] -> [..., out]."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim < 2:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


def onednn_is_quicker() -> bool:
    """Return whether this processor is one of those, whose name and features are all that is asked."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    processor = torch.cpu.get_capabilities()
    return "AMD" in processor.get("cpu_name", "") and processor.get("avx512_f", False)


def use_onednn(model: nn.Module) -> None:
    """Make every plain linear layer of ``model`` a ``OneDnnLinear``, in place; names and values stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


def use_torch(model: nn.Module) -> None:
    """Undo ``use_onednn``."""
    for module in model.modules():
        if type(module) is OneDnnLinear:
            module.__class__ = nn.Linear


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
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
