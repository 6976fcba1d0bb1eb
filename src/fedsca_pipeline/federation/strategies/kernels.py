"""Compute kernels of a server step, on the CPU: inner products of updates, new local models and their mixes.

Matrices [S, V] or [N, V] are fp32 and may be memory-mapped. The kernels read them a run of columns at a time, so that
no copy of their size is made. Everything sites x sites is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Groups = tuple[slice, ...]
"""Column ranges of the flat vector [V], in order; together they cover it."""

ZERO_NORM = 1e-12  # a shorter update has no direction (docs/method.md)

_COLUMNS = 1 << 17  # values per fp32 inner product; keeps the error of a norm below 1e-6

_KERNEL = 48  # sites that the innermost loop of sgemm handles at once with AVX-512

_CACHED = 1 << 22  # values of one run of columns, over all sites, that fit into the processor's caches


@dataclass(frozen=True)
class Results:
    """Memory [N, V] fp32 for the results of one round; its first use costs more than all matrix products.

    Its old content is irrelevant; afterwards the new state and the aggregates refer to it. ``local_models`` may share
    memory with the updates of the replies, which are then overwritten.
    """

    local_models: Tensor
    aggregates: Tensor
    workspace: Tensor

    @classmethod
    def fresh(cls, n_sites: int, n_values: int) -> Results:
        """Return newly allocated memory."""
        return cls.around(torch.empty(n_sites, n_values), torch.empty(n_sites, n_values))

    @classmethod
    def around(cls, local_models: Tensor, aggregates: Tensor) -> Results:
        """Return these matrices [N, V] with a ``workspace`` [2 N + 1, W] for W of their columns.

        W is a power of two where V allows it, so that every row starts at a cache line.
        """
        n_sites, n_values = local_models.shape
        width = 1 << (max(_CACHED // n_sites, 1).bit_length() - 1)
        return cls(local_models, aggregates, torch.empty(2 * n_sites + 1, min(width, n_values)))


@dataclass(frozen=True)
class LocalModels:
    """The local models of one round, base + update for each accepted site, computed a run of columns at a time.

    ``bases`` [N, V] and ``updates`` [S, V] fp32, as received. The A accepted sites are the rows ``site_rows`` [A] of
    ``bases`` and ``reply_rows`` [A] of ``updates``. ``initial`` [V] fp32: the start values. ``groups``: the B column
    ranges with weights of their own. ``factors`` [A] float64: what shortens each update; None: 1.
    """

    bases: Tensor
    updates: Tensor
    site_rows: Tensor
    reply_rows: Tensor
    initial: Tensor
    groups: Groups
    factors: Tensor | None = None

    def cosines(self, *, from_start: bool) -> Tensor:
        """Return the cosines [B, A, A] float64 of the local models, or of their distances from the start values."""
        count = len(self.site_rows)
        grams = torch.zeros(len(self.groups), count, count, dtype=torch.float64)
        for total, group in zip(grams, self.groups, strict=True):
            for start in range(group.start, group.stop, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, group.stop))
                update = self.updates[self.reply_rows, columns]
                if self.factors is not None:
                    update = update * self.factors[:, None].to(update.dtype)
                theta = self.bases[self.site_rows, columns] + update
                if from_start:
                    theta -= self.initial[columns]
                total += theta @ theta.T
        return cosines(grams)

    def mix(self, previous: Tensor, weights: Tensor, out: Results, scales: Tensor | None = None) -> Tensor:
        """Write the latest local models and their mixes to ``out``; return each accepted site's distance to the mean.

        One pass over runs of columns that stay in the processor's caches, since memory traffic takes longer than the
        products. Each run is read completely before any of it is written. The mean of the accepted local models is one
        extra row of the products.

        Args:
            previous: [N, V] local models before this round; those of the sites that were not accepted stay.
            weights: [B, N, N] float64. The mix is ``weights[b] @ local_models``; a unit row returns its local model
                bit for bit, an all-zero row returns ``initial``.
            out: receives the local models and the mixes.
            scales: [B, A], multiplies each update, beside its factor, before it is added to its base. None: 1.

        Returns:
            ``|theta_i - mean|`` [A] float64 of the accepted sites.
        """
        count = len(previous)
        runs_of_rows = tuple(runs(self.site_rows, self.reply_rows))
        others = torch.ones(count, dtype=torch.bool).index_fill(0, self.site_rows, False).nonzero().flatten()
        mean = torch.zeros(1, count, dtype=torch.float64).index_fill(1, self.site_rows, 1 / max(len(self.site_rows), 1))
        squares = torch.zeros(count, dtype=torch.float64)
        if self.factors is not None:
            scales = self.factors.expand(len(self.groups), -1) if scales is None else scales * self.factors
        group_scales = scales.to(previous.dtype) if scales is not None else [None] * len(self.groups)
        width = out.workspace.shape[1]
        for matrix, group, scale in zip(weights, self.groups, group_scales, strict=True):
            without_weights = (matrix.sum(dim=1) == 0).nonzero().flatten()
            factors = torch.cat([matrix, mean]).to(previous.dtype)
            for start in range(group.start, group.stop, width):
                columns = slice(start, min(start + width, group.stop))
                run = out.workspace[:, : columns.stop - start]
                theta, mixed = run[:count], run[count:]
                theta[others] = previous[others, columns]
                for sites, answers, accepted in runs_of_rows:
                    base, update = self.bases[sites, columns], self.updates[answers, columns]
                    if scale is None:
                        torch.add(base, update, out=theta[sites])
                    else:
                        torch.addcmul(base, update, scale[accepted, None], out=theta[sites])
                out.local_models[:, columns] = theta
                torch.mm(factors, theta, out=mixed)
                mixed[without_weights] = self.initial[columns]
                out.aggregates[:, columns] = mixed[:-1]
                squares += torch.linalg.vector_norm(theta.sub_(mixed[-1]), dim=1).double().square()
        return squares[self.site_rows].sqrt()


def gram(updates: Tensor, groups: Groups) -> Tensor:
    """Return the inner products of ``updates`` [S, V] in each group, [B, S, S] float64, symmetric.

    Products over runs of columns are fp32 and their sums float64: accurate enough, at the speed of fp32. About four
    bands of rows skip most of what lies above the diagonal. A NaN or infinity affects only its own row and column.
    """
    band = _KERNEL * max(math.ceil(len(updates) / (4 * _KERNEL)), 1)
    grams = torch.zeros(len(groups), len(updates), len(updates), dtype=torch.float64)
    for total, group in zip(grams, groups, strict=True):
        for chunk in torch.split(updates[:, group], _COLUMNS, dim=1):
            for start in range(0, len(chunk), band):
                rows = slice(start, start + band)
                total[start:, rows] += chunk[start:] @ chunk[rows].T
    lower = grams.tril()
    return lower + lower.tril(diagonal=-1).mT


def cosines(grams: Tensor) -> Tensor:
    """Return cosines [.., S, S] from inner products; 0 for a vector whose norm is below 1e-12."""
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    moved = norms >= ZERO_NORM
    ratios = (grams / (norms[..., :, None] * norms[..., None, :])).clamp(-1, 1)
    return torch.where(moved[..., :, None] & moved[..., None, :], ratios, 0.0)


def runs(site_rows: Tensor, reply_rows: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices that together are ``site_rows``, ``reply_rows`` and 0..A-1, [A] each, A > 0.

    If every site was accepted there is one run.
    """
    breaks = ((site_rows.diff() != 1) | (reply_rows.diff() != 1)).nonzero().flatten() + 1
    accepted = torch.arange(len(site_rows))
    for parts in zip(*(rows.tensor_split(breaks) for rows in (site_rows, reply_rows, accepted)), strict=True):
        sites, answers, positions = (slice(int(part[0]), int(part[-1]) + 1) for part in parts)
        yield sites, answers, positions
