"""The server's large arrays: taken once and used every round, on disk where they would not fit."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsca_pipeline.federation.strategies.kernels import Results

_BYTES = torch.float32.itemsize
_GIB = 1 << 30


@dataclass(frozen=True)
class RoundMemory:
    """Everything of the size of all sites' values that a round needs: ``updates``, ``bases`` [N, V] fp32, ``results``.

    Local models replace the updates that they are made of. Its content is of one round; what is to outlive the round is
    written to disk before the next one begins. Memory is taken when it is first touched, and kept: fresh pages cost
    several times what a round computes in them. A round's encoded messages come on top.
    """

    updates: Tensor
    bases: Tensor
    results: Results

    @classmethod
    def within(cls, gib: float, folder: Path, n_sites: int, n_values: int) -> RoundMemory:
        """Return arrays of which as many lie in memory as fit into ``gib``, the others in nameless files in ``folder``.

        In memory first are those that are read or written most often. Raises OSError where the disk has no room.
        """
        shape = (n_sites, n_values)
        size = _BYTES * math.prod(shape)
        updates, aggregates, bases = (
            torch.empty(shape) if number * size <= gib * _GIB else mapped(folder, shape) for number in range(1, 4)
        )
        return cls(updates, bases, Results.around(updates, aggregates))


def mapped(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """Return zeros, fp32, in a file in ``folder`` that has no name and is gone with the tensor.

    Raises OSError, naming the folder, where the disk has no room: found out later, it would end the process.
    """
    size = _BYTES * math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32).reshape(shape)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
