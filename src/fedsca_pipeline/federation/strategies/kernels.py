"""Compute kernels of a server step: inner products, mixing and their memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Groups = tuple[slice, ...]


ZERO_NORM = 1e-12  # an update shorter than this has no direction (docs/method.md)


_COLUMNS = 1 << 17  # values of one fp32 inner product, so that norms err by 1e-6 at most


_KERNEL = 48  # sites that sgemm's innermost loop takes at once with AVX-512


_CACHED = 1 << 22  # values of one run of columns, over all sites, which the processor's caches hold


@dataclass(frozen=True)
class Replies:
    """What arrived in one round from the sites that answered, sorted by site.

    ``bases`` [N, V] fp32: what each known site really trained from; of one that did not answer, anything. ``updates``
    [S, V] fp32. ``samples`` [S] float64: training images. ``steps`` [S] float64: optimiser steps behind each update;
    None: unknown.
    """

    round: int
    sites: tuple[str, ...]
    bases: Tensor
    updates: Tensor
    samples: Tensor
    steps: Tensor | None = None


@dataclass(frozen=True)
class Results:
    """Memory [N, V] fp32 of any content for what one round gives: first touching it costs more than all products.

    It is no part of the state that goes in, and belongs to the state and the aggregates that come out. ``masters`` may
    begin with the replies' updates, which are then used up.
    """

    masters: Tensor
    aggregates: Tensor
    workspace: Tensor

    @classmethod
    def fresh(cls, n_sites: int, n_values: int) -> Results:
        """Return memory that nobody has used."""
        return cls.around(torch.empty(n_sites, n_values), torch.empty(n_sites, n_values))

    @classmethod
    def around(cls, masters: Tensor, aggregates: Tensor) -> Results:
        """Return ``masters`` and ``aggregates`` [N, V], with a ``workspace`` [2 N + 1, W] for W of their columns.

        W is a power of two where V allows, so that no row begins in the middle of a cache line.
        """
        n_sites, n_values = masters.shape
        width = 1 << (max(_CACHED // n_sites, 1).bit_length() - 1)
        return cls(masters, aggregates, torch.empty(2 * n_sites + 1, min(width, n_values)))


@dataclass(frozen=True)
class Masters:
    """The weights of the accepted sites, before they are mixed: base + update, computed a run of columns at a time.

    ``rows`` [A]: their places among all sites; ``kept`` [A]: among the replies; ``initial`` [V] fp32.
    """

    replies: Replies
    rows: Tensor
    kept: Tensor
    initial: Tensor

    def cosines(self, groups: Groups, *, from_start: bool) -> Tensor:
        """Return the cosines [B, A, A] float64 of the weights, or of their distance from the start values."""
        grams = torch.zeros(len(groups), len(self.rows), len(self.rows), dtype=torch.float64)
        for total, group in zip(grams, groups, strict=True):
            for start in range(group.start, group.stop, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, group.stop))
                theta = self.replies.bases[self.rows, columns] + self.replies.updates[self.kept, columns]
                if from_start:
                    theta -= self.initial[columns]
                total += theta @ theta.T
        return cosines(grams)


def gram(updates: Tensor, groups: Groups) -> Tensor:
    """Return the inner products of updates [S, V] in each group, [B, S, S] float64, symmetric.

    Products over runs of columns are fp32 and their sums float64: as exact as need be, at the speed of fp32. They come
    in about four bands, which leaves out most of what is above the diagonal. A row with a NaN or infinity spoils its
    own row and column and no other.
    """
    band = _KERNEL * max(math.ceil(len(updates) / (4 * _KERNEL)), 1)
    grams = torch.zeros(len(groups), len(updates), len(updates), dtype=torch.float64)
    for total, group in zip(grams, groups, strict=True):
        for chunk in updates[:, group].split(_COLUMNS, dim=1):
            for start in range(0, len(chunk), band):
                rows = slice(start, start + band)
                total[start:, rows] += chunk[start:] @ chunk[rows].T
    lower = grams.tril()
    return lower + lower.tril(diagonal=-1).mT


def cosines(grams: Tensor) -> Tensor:
    """Return cosines [.., S, S] from inner products; all 0 for an update whose norm is below 1e-12."""
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    moved = norms >= ZERO_NORM
    found = (grams / (norms[..., :, None] * norms[..., None, :])).clamp(-1, 1)
    return torch.where(moved[..., :, None] & moved[..., None, :], found, 0.0)


def place(matrices: Tensor, part: Tensor, rows: Tensor) -> Tensor:
    """Return [B, N, N] ``matrices`` with ``part`` [B, A, A] at the rows and columns ``rows``."""
    placed = matrices.clone()
    placed[:, rows[:, None], rows] = part
    return placed


def prior_weights(mates: Tensor, prior: Tensor) -> Tensor:
    """Return ``prior`` [N] restricted to each row's ``mates`` [N, N] and summing to 1; NaN in a row without mates."""
    shares = mates * prior
    return shares / shares.sum(dim=1, keepdim=True)


def renew_and_mix(
    masters: Tensor,
    replies: Replies,
    rows: Tensor,
    kept: Tensor,
    weights: Tensor,
    groups: Groups,
    initial: Tensor,
    out: Results,
    steps: Tensor | None = None,
) -> Tensor:
    """Fill ``out`` with the latest masters and their mixes; return ``|theta_i - mean|`` [A] float64 over ``rows``.

    A master is base + update, or with ``steps`` [B, A] base + steps * update, for the sites ``rows`` [A], whose replies
    are ``kept`` [A], and stays for the others. The
    mix is ``weights[b] @ masters`` per group, and ``initial`` [V] in a row of ``weights`` [B, N, N] that is all zero; a
    unit row returns its master bit for bit. All of it is one pass over runs of columns that stay in the processor's
    caches: reading and writing memory takes longer than the products. A run is read whole before any of it is written.
    The mean over ``rows`` is one more row of the products.
    """
    taken = tuple(runs(rows, kept))
    absent = torch.ones(len(masters), dtype=torch.bool).index_fill(0, rows, False).nonzero().flatten()
    mean = torch.zeros(1, len(masters), dtype=torch.float64).index_fill(1, rows, 1 / max(len(rows), 1))
    width = out.workspace.shape[1]
    squares = torch.zeros(len(masters), dtype=torch.float64)
    factors_of = steps.to(masters.dtype) if steps is not None else [None] * len(groups)
    for matrix, group, lengths in zip(weights, groups, factors_of, strict=True):
        nobody = (matrix.sum(dim=1) == 0).nonzero().flatten()
        factors = torch.cat([matrix, mean]).to(masters.dtype)
        for start in range(group.start, group.stop, width):
            columns = slice(start, min(start + width, group.stop))
            theta, mixed = out.workspace[:, : columns.stop - start].split([len(masters), len(masters) + 1])
            theta[absent] = masters[absent, columns]
            for sites, answers, accepted in taken:
                base, update = replies.bases[sites, columns], replies.updates[answers, columns]
                if lengths is None:
                    torch.add(base, update, out=theta[sites])
                else:
                    torch.addcmul(base, update, lengths[accepted, None], out=theta[sites])
            out.masters[:, columns] = theta
            torch.mm(factors, theta, out=mixed)
            mixed[nobody] = initial[columns]
            out.aggregates[:, columns] = mixed[:-1]
            squares += torch.linalg.vector_norm(theta.sub_(mixed[-1]), dim=1).double().square()
    return squares[rows].sqrt()


def runs(rows: Tensor, kept: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices that together are ``rows``, ``kept`` and 0..A-1, [A] each, A > 0; once if nobody is absent."""
    breaks = ((rows.diff() != 1) | (kept.diff() != 1)).nonzero().flatten() + 1
    everyone = torch.arange(len(rows))
    for parts in zip(*(tensor.tensor_split(breaks) for tensor in (rows, kept, everyone)), strict=True):
        yield tuple(slice(int(part[0]), int(part[-1]) + 1) for part in parts)
