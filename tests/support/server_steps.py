"""Server steps on small flat vectors, for the tests of strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.federation.strategies.server_step import Aggregation, Replies, ServerState, SiteLimits
from fedsca_pipeline.model.layout import TensorLayout

SITES = ("a", "b", "c", "d")
# The defaults of ``federation``.
LIMITS = SiteLimits(max_norm_ratio=10.0, max_share=0.5, clip_to_median=False)
# No limit on one site: the formulas of the papers know none.
FREE = SiteLimits(max_norm_ratio=1e9, max_share=1.0, clip_to_median=False)


def double(*values: Any) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def flat_layout(*sizes: int) -> TensorLayout:
    """Return a layout of one block per size, each with one adapter tensor of that many values."""
    shapes = {f"block{number}": (size,) for number, size in enumerate(sizes)}
    return TensorLayout(tuple((name,) for name in shapes), (), shapes)


def replies_of(
    updates: Mapping[str, Sequence[float]],
    bases: Mapping[str, Sequence[float]] | None = None,
    samples: Mapping[str, float] | None = None,
    round_: int = 1,
) -> Replies:
    """Return replies of some of ``SITES`` from {site: update}; bases default to zeros, samples to ten per site."""
    sites = tuple(sorted(updates))
    stacked = torch.tensor([updates[site] for site in sites], dtype=torch.float32)
    values = stacked.shape[1]
    known = [(bases or {}).get(site, [0.0] * values) for site in SITES]
    return Replies(
        round=round_,
        sites=sites,
        bases=torch.tensor(known, dtype=torch.float32).reshape(len(SITES), values),
        updates=stacked,
        samples=double(*((samples or {}).get(site, 10) for site in sites)),
    )


def step(
    strategy: Strategy, state: ServerState | None, replies: Replies, **more: Any
) -> tuple[ServerState, Aggregation]:
    """Return the state and result of one step for ``SITES``; start values are -7, ``more`` goes to ``aggregate``."""
    values = replies.updates.shape[1]
    state = state or ServerState.initial(len(SITES), values, len(strategy.groups()))
    given = {"initial": torch.full((values,), -7.0), "limits": LIMITS, **more}
    return strategy.aggregate(state, replies, sites=SITES, **given)


def fedsca(values: int, **options: Any) -> Strategy:
    """Return FedSCA for one tensor of so many values."""
    return build_strategy("fedsca", options, flat_layout(values))
