"""A model's trainable tensors: their places, and vectors and hashes of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsca_pipeline.errors import MessageError


@dataclass(frozen=True)
class TensorLayout:
    """Every tensor of a model that a strategy may train, by place.

    ``blocks`` holds the adapter tensor names of each adapted block, numbered from the input; ``decoder`` the decoder's
    names, ``head`` those of them behind its transformer; ``encoder`` those of the foundation's own encoder, frozen by
    most strategies; ``norms`` those of ``encoder`` and ``decoder`` that belong to normalisation layers; ``shapes`` the
    shape of each.
    """

    blocks: tuple[tuple[str, ...], ...]
    decoder: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    head: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """All adapter tensor names, from the input on."""
        return tuple(name for block in self.blocks for name in block)

    @property
    def efficient(self) -> tuple[str, ...]:
        """Adapters and decoder: what parameter-efficient fine-tuning trains."""
        return self.adapters + self.decoder

    def size(self, names: Iterable[str]) -> int:
        """Return the number of values in ``names`` (0 for none); a name that is not in the layout raises KeyError."""
        return sum(math.prod(self.shapes[name]) for name in names)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of :func:`sha256_tensors`."""
    return sha256_tensors(tensors)[:16]


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 64 hex digits over names, shapes and fp32 bytes, whatever the order; defined for no tensors, too."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, list(tensors[name].shape)]).encode())
        digest.update(_wire(tensors[name], torch.float32).numpy())
    return digest.hexdigest()


def flatten(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the values of ``names``, in that order, as one fp32 vector [V] of its own memory; no names give [0]."""
    return torch.cat([torch.empty(0), *(_wire(tensors[name], torch.float32).reshape(-1) for name in names)])


def unflatten(vector: Tensor, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Cut a vector [V] into tensors, each of its own memory (safetensors refuses shared); the inverse of ``flatten``.

    Raises MessageError where V is not the number of values of ``names``.
    """
    sizes = [math.prod(shapes[name]) for name in names]
    if sum(sizes) != vector.numel():
        raise MessageError(f"{vector.numel()} values do not fill {len(sizes)} tensors of {sum(sizes)} values")
    parts = vector.split(sizes) if sizes else ()
    return {name: part.reshape(shapes[name]).clone() for name, part in zip(names, parts, strict=True)}


def _wire(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()
