"""Weightings that several strategies use: similarities of one group to row-stochastic weights, all float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsca_pipeline.federation.strategies.kernels import prior_weights


def simplex_weights(similarity: Tensor, mates: Tensor, prior: Tensor, *, penalty: float) -> Tensor:
    """Projection of ``p + c_i / (2 penalty)`` on the simplex, the closed form of pFedGraph's objective; c_ii = 1.

    Ye et al., *Personalized Federated Learning with Inferred Collaboration Graphs*, ICML 2023. ``similarity`` [N, N],
    ``mates`` [N, N] bool, ``prior`` [N]; returns [N, N].
    """
    similarity = similarity.clone().fill_diagonal_(1.0)
    return project_on_simplex(prior_weights(mates, prior) + similarity / (2 * penalty), mates)


def project_on_simplex(points: Tensor, allowed: Tensor) -> Tensor:
    """Return the nearest point to each row of ``points`` [R, N] on the simplex of its ``allowed`` [R, N] coordinates.

    Duchi et al., *Efficient Projections onto the l1-Ball*, ICML 2008.
    """
    lowest = points.masked_fill(~allowed, -torch.inf).amax(dim=1, keepdim=True) - 2
    # The threshold is at least the largest coordinate less one, so what lies two below never enters the support.
    points = torch.where(allowed, points, lowest)
    ordered, _ = points.sort(dim=1, descending=True)
    counts = torch.arange(1, points.shape[1] + 1, dtype=points.dtype)
    thresholds = (ordered.cumsum(dim=1) - 1) / counts
    support = (ordered > thresholds).sum(dim=1, keepdim=True).clamp(min=1)
    return (points - thresholds.gather(1, support - 1)).clamp(min=0)


def softmax_weights(similarity: Tensor, mates: Tensor, *, self_weight: float, temperature: float) -> Tensor:
    """A fixed weight for the site itself, and a softmax of similarity / temperature over the others (heuristic FedAMP).

    Huang et al., *Personalized Cross-Silo Federated Learning on Non-IID Data*, AAAI 2021. The prior has no part in it.
    ``similarity`` [N, N], ``mates`` [N, N] bool; returns [N, N], the identity where a row has no other mate.
    """
    itself = torch.eye(len(mates), dtype=torch.bool)
    others = mates & ~itself
    logits = (similarity / temperature).masked_fill(~others, -torch.inf)
    rest = (1 - self_weight) * logits.softmax(dim=1) + self_weight * itself
    return torch.where(others.any(dim=1, keepdim=True), rest, itself.double())
