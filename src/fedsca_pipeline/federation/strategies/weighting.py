"""Weightings that several strategies use: similarities of one group to row-stochastic weights, all float64."""

from __future__ import annotations

import torch
from torch import Tensor


def prior_weights(partners: Tensor, prior: Tensor) -> Tensor:
    """Return ``prior`` over each row's ``partners``, all [N, N], rows summing to 1; NaN in a row without partners."""
    shares = partners * prior
    return shares / shares.sum(dim=1, keepdim=True)


def simplex_weights(similarity: Tensor, partners: Tensor, prior: Tensor, *, penalty: float) -> Tensor:
    """Return the projection of ``p + c_i / (2 penalty)`` on the simplex, [N, N]: pFedGraph's objective in closed form.

    Ye et al., *Personalized Federated Learning with Inferred Collaboration Graphs*, ICML 2023. ``similarity`` [N, N],
    whose diagonal counts as 1, ``partners`` [N, N] bool, ``prior`` [N, N].
    """
    similarity = similarity.clone().fill_diagonal_(1.0)
    return project_on_simplex(prior_weights(partners, prior) + similarity / (2 * penalty), partners)


def project_on_simplex(points: Tensor, allowed: Tensor) -> Tensor:
    """Return the nearest point to each row of ``points`` [R, N] on the simplex of its ``allowed`` [R, N] coordinates.

    Duchi et al., *Efficient Projections onto the l1-Ball*, ICML 2008.
    """
    lowest = points.masked_fill(~allowed, -torch.inf).amax(dim=1, keepdim=True) - 2
    # The threshold is at least the largest coordinate minus 1, so a coordinate 2 below it is never in the support.
    points = torch.where(allowed, points, lowest)
    ordered, _ = points.sort(dim=1, descending=True)
    counts = torch.arange(1, points.shape[1] + 1, dtype=points.dtype)
    thresholds = (ordered.cumsum(dim=1) - 1) / counts
    support = (ordered > thresholds).sum(dim=1, keepdim=True).clamp(min=1)
    return (points - thresholds.gather(1, support - 1)).clamp(min=0)


def softmax_weights(similarity: Tensor, partners: Tensor, *, self_weight: float, temperature: float) -> Tensor:
    """Return a fixed weight for the site itself and a softmax of similarity / temperature over the others, [N, N].

    Heuristic FedAMP: Huang et al., *Personalized Cross-Silo Federated Learning on Non-IID Data*, AAAI 2021. The prior
    is not used. ``similarity`` [N, N], ``partners`` [N, N] bool; a row without other partners is the identity's.
    """
    itself = torch.eye(len(partners), dtype=torch.bool)
    others = partners & ~itself
    logits = (similarity / temperature).masked_fill(~others, -torch.inf)
    rest = (1 - self_weight) * logits.softmax(dim=1) + self_weight * itself
    return torch.where(others.any(dim=1, keepdim=True), rest, itself.double())
