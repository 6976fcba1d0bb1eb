"""The server's large arrays: allocated once and used in every round; what does not fit in memory is on disk."""

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
    """All arrays of a round that are as large as all sites' values: ``updates``, ``bases`` [N, V] fp32, ``results``.

    Local models replace the updates that they are made of. The content belongs to one round; what is needed longer is
    written to disk before the next round. Memory is allocated at first use and reused: fresh pages cost several times
    the computation of a round. A round's encoded messages need memory in addition.
    """

    updates: Tensor
    bases: Tensor
    results: Results

    @classmethod
    def within(cls, gib: float, folder: Path, n_sites: int, n_values: int) -> RoundMemory:
        """Return arrays in memory as far as they fit into ``gib``, the others in unnamed files in ``folder``.

        The arrays that are used most often go into memory first.

        Raises:
            OSError: the disk has no room.
        """
        shape = (n_sites, n_values)
        size = _BYTES * math.prod(shape)
        updates, aggregates, bases = (
            torch.empty(shape) if number * size <= gib * _GIB else mapped(folder, shape) for number in range(1, 4)
        )
        return cls(updates, bases, Results.around(updates, aggregates))


def mapped(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """Return zeros, fp32, in an unnamed file in ``folder`` that is deleted with the tensor.

    Raises:
        OSError: the disk has no room; names the folder. Without this check a later write would kill the process.
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
