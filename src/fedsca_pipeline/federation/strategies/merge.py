"""LoRA factors: mixed products B A, reduced to the rank. Averaging A and B separately does not average B A.

docs/method.md, ``lora_merge: svd``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FACTOR = re.compile(r"(^|\.)lora_([AB])(?=\.|$)")


@dataclass(frozen=True)
class LoraPair:
    """Columns of one pair in the flat vector: A [r, in], B [out, r]; ``in`` includes the kernel of a convolution."""

    a: slice
    b: slice
    rank: int


def is_lora_a(name: str) -> bool:
    """Return whether ``name`` is PEFT's name of a LoRA factor A."""
    return _factor(name) == "A"


def is_lora_b(name: str) -> bool:
    """Return whether ``name`` is PEFT's name of a LoRA factor B."""
    return _factor(name) == "B"


def lora_pairs(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[LoraPair, ...]:
    """Return the pairs whose A and B are both in ``names``, which are in the order of the flat vector."""
    ends, total = {}, 0
    for name in names:
        start, total = total, total + math.prod(shapes[name])
        ends[name] = slice(start, total)
    others = {name: _FACTOR.sub(r"\1lora_A", name) for name in names if is_lora_b(name)}
    return tuple(LoraPair(ends[a], ends[b], shapes[a][0]) for b, a in others.items() if a in ends)


def merge_products(
    mixed: Tensor, weights: Tensor, local_models: Tensor, groups: Sequence[slice], pairs: Sequence[LoraPair]
) -> Tensor:
    """Return ``mixed`` [R, V] with each pair replaced, in place, by rank-r factors of ``sum_j w_ij B_j A_j``.

    ``mixed`` is the product of ``weights`` [B, R, N] float64 and ``local_models`` [N, V]. Rows that receive a single
    local model, or the initial values, stay as they are.
    """
    for pair in pairs:
        group = next(i for i, columns in enumerate(groups) if columns.start <= pair.a.start < columns.stop)
        mixes = (weights[group] > 0).sum(dim=1) > 1
        shares = weights[group, mixes].to(mixed.dtype)
        a = local_models[:, pair.a].reshape(len(local_models), pair.rank, -1)
        b = local_models[:, pair.b].reshape(len(local_models), -1, pair.rank)
        near = mixed[mixes][:, pair.a].reshape(len(shares), *a.shape[1:])
        new_a, new_b = _refactor(shares, a, b, near)
        mixed[mixes, pair.a], mixed[mixes, pair.b] = new_a.flatten(1), new_b.flatten(1)
    return mixed


def _refactor(shares: Tensor, a: Tensor, b: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [R, r, in] and B [R, out, r] whose products are the best rank-r fit of ``sum_j shares_ij b_j a_j``.

    The products lie in the span of all A and B, so the singular values are those of an N r x N r core. Among all
    factors with the same product, A is the rotated orthonormal one nearest to ``near`` [R, r, in], scaled to the length
    of ``near``: training resumes from familiar coordinates, and a product of zero leaves an A that can still learn.
    """
    rank = near.shape[1]
    columns, core_b = torch.linalg.qr(b.transpose(0, 1).flatten(1))
    rows, core_a = torch.linalg.qr(a.flatten(0, 1).T)
    core = (core_b * shares.repeat_interleave(rank, dim=1)[:, None]) @ core_a.T
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    basis = right[:, :rank] @ rows.T
    u, _, v = torch.linalg.svd(near @ basis.mT, full_matrices=False)
    rotation = u @ v
    length = torch.linalg.matrix_norm(near, keepdim=True) / math.sqrt(rank)
    length = torch.where(length > 0, length, 1.0)
    new_b = (columns @ left[:, :, :rank] * values[:, None, :rank]) @ rotation.mT / length
    return rotation @ basis * length, new_b


def _factor(name: str) -> str | None:
    found = _FACTOR.search(name)
    return found[2] if found else None
