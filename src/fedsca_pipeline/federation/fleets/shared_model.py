"""One model in memory for many processes: its structure travels, its values lie in one block of shared memory."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.model.foundation.model import SegmentationModel

# Where torch's own allocator puts a tensor.
_ALIGNMENT = 64


def share(model: SegmentationModel) -> Tensor:
    """Move every value of a model on the CPU into one block of shared memory: uint8 [bytes], one file descriptor.

    The model goes on working, on the block.

    Raises:
        ConfigError: there is not that much shared memory.
    """
    tensors = _tensors(model)
    size = sum(map(_room, tensors))
    try:
        block = torch.empty(size, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise ConfigError(
            f"federation.fleet: no shared memory for a foundation of {size / 1e6:.0f} MB ({error}); "
            "enlarge /dev/shm (Docker: --shm-size), or choose in_process"
        ) from error
    for tensor, place in zip(tensors, _places(block, tensors), strict=True):
        tensor.data = place.copy_(tensor.detach())
    return block


def without_values(model: SegmentationModel) -> SegmentationModel:
    """Return a copy whose tensors are on the meta device, with shape, strides and dtype: small enough to be sent."""
    # Deepcopy takes what the memo holds as copied already.
    return copy.deepcopy(model, {id(tensor): _empty(tensor) for tensor in _tensors(model)})


def with_values(
    structure: SegmentationModel, block: Tensor, device: torch.device, own: Collection[str]
) -> SegmentationModel:
    """Fill a structure with the values that ``share`` put into ``block``, in place, and return it.

    Args:
        structure: of the shared model; see ``without_values``.
        block: what ``share`` returned.
        device: on the CPU tensors lie in the block itself; another device gets one copy of it.
        own: names of parameters that will change here, and so are copied out of the block.
    """
    tensors = _tensors(structure)
    places = {
        id(tensor): _like(tensor, place)
        for tensor, place in zip(tensors, _places(block.to(device), tensors), strict=True)
    }
    named = chain(structure.named_parameters(remove_duplicate=False), structure.named_buffers(remove_duplicate=False))
    for name, tensor in list(named):
        if name in own:
            places[id(tensor)].data = places[id(tensor)].detach().clone()
        owner, _, attribute = name.rpartition(".")
        setattr(structure.get_submodule(owner), attribute, places[id(tensor)])
    return structure


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return each parameter and buffer once, in an order that structure and model have in common."""
    return [*model.parameters(), *model.buffers()]


def _places(block: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the part of the block that belongs to each tensor, in its shape, strides and dtype."""
    start = 0
    for tensor in tensors:
        room = block[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        yield room.as_strided(tensor.shape, _empty(tensor).stride())
        start += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _empty(tensor: Tensor) -> Tensor:
    return _like(tensor, torch.empty_like(tensor, device="meta", requires_grad=False))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return values as a parameter where the tensor is one, else as they are."""
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
