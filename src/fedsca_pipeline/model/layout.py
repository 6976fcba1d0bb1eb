"""The tensors that a strategy may train, by their place in the model; vectors and hashes of tensors."""

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
    """Names of all tensors that a strategy may train, grouped by their place in the model.

    Attributes:
        blocks: adapter tensors of each adapted block; blocks are numbered from the input.
        decoder: tensors of the decoder.
        shapes: shape of each tensor.
        head: the decoder's tensors behind its transformer.
        encoder: the pretrained encoder's tensors, which most strategies keep frozen.
        norms: tensors of ``encoder`` and ``decoder`` that belong to normalisation layers.

    >>> shapes = {"a": (2, 3), "b": (4,), "decoder.w": (5,)}
    >>> layout = TensorLayout(blocks=(("a",), ("b",)), decoder=("decoder.w",), shapes=shapes)
    >>> layout.adapters
    ('a', 'b')
    >>> layout.size(layout.efficient)
    15
    """

    blocks: tuple[tuple[str, ...], ...]
    decoder: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    head: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """All adapter tensors, first block first."""
        return tuple(name for block in self.blocks for name in block)

    @property
    def efficient(self) -> tuple[str, ...]:
        """Adapters and decoder: what parameter-efficient fine-tuning trains."""
        return self.adapters + self.decoder

    def size(self, names: Iterable[str]) -> int:
        """Return the number of values in ``names`` (0 for none).

        Raises:
            KeyError: a name is not in the layout.
        """
        return sum(math.prod(self.shapes[name]) for name in names)


def faults(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return one line per tensor of ``found`` that is not like that of ``expected``: in name, dtype, shape, or finite.

    >>> faults({"a": torch.ones(2), "c": torch.tensor(torch.nan)}, {"a": torch.ones(3), "b": torch.ones(1)})
    ['b is missing', 'c is unknown', 'a is float32 [2] in place of float32 [3]', 'c holds NaN or infinity']
    """
    lines = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        is_, should = _described(found[name]), _described(expected[name])
        lines += [f"{name} is {is_} in place of {should}"] if is_ != should else []
    return lines + [f"{name} holds NaN or infinity" for name in sorted(found) if not found[name].isfinite().all()]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of :func:`sha256_tensors`."""
    return sha256_tensors(tensors)[:16]


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 64 hex digits over names, shapes and fp32 bytes. The order does not matter; an empty mapping has one too.

    >>> one, two = torch.ones(2), torch.zeros(3)
    >>> sha256_tensors({"a": one, "b": two}) == sha256_tensors({"b": two, "a": one})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, list(tensors[name].shape)]).encode())
        digest.update(fp32_on_cpu(tensors[name]).numpy().data)
    return digest.hexdigest()


def flatten(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the values of ``names``, in that order, as a new fp32 vector [V]; no names give [0].

    >>> flatten({"a": torch.ones(1, 2), "b": torch.zeros(1)}, ["b", "a"])
    tensor([0., 1., 1.])
    """
    return torch.cat([torch.empty(0), *(fp32_on_cpu(tensors[name]).reshape(-1) for name in names)])


def unflatten(vector: Tensor, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors that ``flatten`` made ``vector`` [V] from.

    The tensors share no memory, since safetensors refuses to write shared memory.

    Raises:
        MessageError: V is not the number of values of ``names``.
    """
    sizes = [math.prod(shapes[name]) for name in names]
    if sum(sizes) != vector.numel():
        raise MessageError(f"{vector.numel()} values do not fill {len(sizes)} tensors of {sum(sizes)} values")
    parts = torch.split(vector, sizes) if sizes else ()
    return {name: part.reshape(shapes[name]).clone() for name, part in zip(names, parts, strict=True)}


def fp32_on_cpu(tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous fp32 on the CPU, without its gradient; itself if it is that already."""
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
