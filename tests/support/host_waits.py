"""Operations for which the host waits for the device, counted without a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READ = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2"}


class HostWaits(TorchDispatchMode):
    """Counts, by name, the operations of a block that on CUDA make the host wait for the device.

    These are the ones that read a value, and copies between the CPU and another device; the device ``meta``, which
    computes nothing, stands for a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs, result)) if _has_values(tensor)}
        if name in _READ or len(devices) > 1:
            self.found[name] += 1
        return result


def _has_values(leaf: object) -> bool:
    # A number, as a tensor without dimensions on the CPU, is an argument of a kernel and no copy.
    return isinstance(leaf, Tensor) and not (leaf.is_cpu and leaf.ndim == 0)
