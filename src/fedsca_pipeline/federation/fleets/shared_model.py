"""One model in memory for many processes: they receive its structure, and share its values in one block of memory."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.model.foundation.model import SegmentationModel

# As torch's own allocator aligns tensors.
_ALIGNMENT = 64


def share(model: SegmentationModel) -> Tensor:
    """Move all values of a model on the CPU into one block of shared memory, and return it: uint8 [bytes].

    The model continues to work, on the block. The block is one file descriptor.

    Raises:
        ConfigError: there is too little shared memory.
    """
    tensors = _tensors(model)
    size = sum(map(_aligned_bytes, tensors))
    try:
        # torch does not annotate share_memory_.
        block: Tensor = torch.empty(size, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ConfigError(
            f"federation.fleet: too little shared memory for a foundation of {size / 1e6:.0f} MB ({error}); "
            "enlarge /dev/shm (Docker: --shm-size), or choose in_process"
        ) from error
    for tensor, view in zip(tensors, _views(block, tensors), strict=True):
        tensor.data = view.copy_(tensor.detach())
    return block


def without_values(model: SegmentationModel) -> SegmentationModel:
    """Return a copy with tensors on the meta device, which have shape, strides and dtype only: small enough to send."""
    # Deepcopy does not copy what its memo holds already.
    return copy.deepcopy(model, {id(tensor): _empty(tensor) for tensor in _tensors(model)})


def with_values(
    structure: SegmentationModel, block: Tensor, device: torch.device, own: Collection[str]
) -> SegmentationModel:
    """Fill a structure with the values of ``block``, in place, and return it.

    Args:
        structure: of the shared model, from ``without_values``.
        block: from ``share``.
        device: on the CPU tensors are views of the block itself; another device gets one copy of it.
        own: names of parameters that this process changes; they are copied out of the block.
    """
    tensors = _tensors(structure)
    filled = {
        id(tensor): _like(tensor, view) for tensor, view in zip(tensors, _views(block.to(device), tensors), strict=True)
    }
    named = chain(structure.named_parameters(remove_duplicate=False), structure.named_buffers(remove_duplicate=False))
    for name, tensor in list(named):
        if name in own:
            filled[id(tensor)].data = filled[id(tensor)].detach().clone()
        owner, _, attribute = name.rpartition(".")
        setattr(structure.get_submodule(owner), attribute, filled[id(tensor)])
    return structure


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return each parameter and buffer once, in the same order for a model and its structure."""
    return [*model.parameters(), *model.buffers()]


def _views(block: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each tensor's part of the block, in its shape, strides and dtype."""
    start = 0
    for tensor in tensors:
        values = block[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        yield values.as_strided(tensor.shape, _empty(tensor).stride())
        start += _aligned_bytes(tensor)


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _empty(tensor: Tensor) -> Tensor:
    return _like(tensor, torch.empty_like(tensor, device="meta", requires_grad=False))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return the values, as a parameter if ``tensor`` is one."""
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
