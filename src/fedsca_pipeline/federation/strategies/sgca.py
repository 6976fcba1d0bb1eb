"""FedSCA's server: similarity-guided collaborative aggregation (SGCA) of the low adapters (LAT).

Zhang et al., *FedSCA*, arXiv 2503.15390; the equations are this project's reconstruction (docs/method.md).
Every weighting maps one group's similarities to row-stochastic weights that follow a permutation of the sites and do
not change with the scale of the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.fedprox import MU_HELP, ProximalRule
from fedsca_pipeline.federation.strategies.kernels import Groups, Masters, Replies, place, prior_weights
from fedsca_pipeline.federation.strategies.rules import LocalRule
from fedsca_pipeline.federation.strategies.sharing import (
    LORA_MERGE_HELP,
    SHARED_BLOCKS_HELP,
    LoraMerge,
    SharedBlocks,
    SharingOptions,
    SharingStrategy,
)
from fedsca_pipeline.federation.strategies.weighting import simplex_weights, softmax_weights
from fedsca_pipeline.model.layout import TensorLayout

Weighting = Literal["gate", "simplex", "softmax", "uniform"]
Gate = Literal["continuous", "hard"]


class FedScaOptions(SharingOptions):
    """``strategies.fedsca``."""

    shared_blocks: SharedBlocks = Field("low", description=SHARED_BLOCKS_HELP)
    lora_merge: LoraMerge = Field("a_only", description=LORA_MERGE_HELP)
    weighting: Weighting = Field("gate", description="gate, simplex, softmax or uniform")
    granularity: Literal["model", "block"] = Field(
        "model", description="model (one set of weights) or block (one for each shared block, and for a shared decoder)"
    )
    compare: Literal["updates", "weights"] = Field(
        "updates", description="updates or weights (ablation): whose cosines the similarities are"
    )
    memory: bool = Field(True, description="true or false: average similarities over rounds")
    gate: Gate = Field("continuous", description="continuous or hard: what the gate does at its threshold")
    rho: float = Field(
        0.5, ge=0.0, lt=1.0, description="0 <= rho < 1, the gate's threshold as a share of a site's best similarity"
    )
    trust: float = Field(
        0.3, gt=0.0, le=1.0, description="0 < g0 <= 1, the best similarity from which a site trusts the others fully"
    )
    simplex_penalty: float = Field(
        0.8, ge=1e-3, le=1e6, description="1e-3 <= alpha <= 1e6, simplex: the pull towards the prior"
    )
    softmax_self: float = Field(0.3, ge=0.0, le=1.0, description="0 to 1, softmax: the weight of the site itself")
    softmax_temperature: float = Field(
        0.1, ge=1e-3, le=1e6, description="1e-3 <= t <= 1e6, softmax: low follows the nearest"
    )
    mu: float = Field(0.0, ge=0.0, le=1e6, description=MU_HELP)
    step: float = Field(
        1.0, gt=0.0, le=100.0, description="above 0, to 100: what updates are multiplied with before they are mixed"
    )


class FedSca(SharingStrategy):
    """Each site receives its own mix, of the sites whose updates point its way."""

    name: ClassVar[str] = "fedsca"
    Options: ClassVar[type[FedScaOptions]] = FedScaOptions
    options: FedScaOptions

    def groups(self, layout: TensorLayout) -> Groups:
        """Return one slice, or one for each shared block and the decoder where ``granularity`` is block."""
        if self.options.granularity == "model":
            return super().groups(layout)
        ends = accumulate((layout.size(part) for part in self.parts(layout)), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    def remember(self, memory: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
        """Average similarities over rounds, or with ``memory: false`` keep this round's alone."""
        return remember(memory, seen, rows) if self.options.memory else super().remember(memory, seen, rows)

    def compare(self, grams: Tensor, masters: Masters, groups: Groups) -> Tensor:
        """Return the cosines of the updates, or with ``compare: weights`` of the weights."""
        if self.options.compare == "weights":
            return masters.cosines(groups, from_start=False)
        return super().compare(grams, masters, groups)

    def factors(self, replies: Replies, kept: Tensor, n_sites: int, groups: Groups) -> Tensor | None:
        """Return ``step`` for every update; None for 1. Updates that differ are shorter mixed than alone."""
        if self.options.step == 1:
            return None
        return torch.full((len(groups), len(kept)), self.options.step, dtype=torch.float64)

    def local_rule(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull towards the aggregate, which ``mu`` 0 leaves out."""
        return ProximalRule(received, kept, self.options.mu)

    def weights(self, similarity: Tensor, mates: Tensor, prior: Tensor) -> Tensor:
        """Return one group's weights by the chosen ``weighting``."""
        return WEIGHTINGS[self.options.weighting](similarity, mates, prior, self.options)


def remember(memory: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
    """Return ``memory`` [B, N, N] after the similarities ``seen`` [B, A, A] of the sites ``rows`` (docs/method.md).

    A pair's first value is taken as it is, then the mean of memory and new value; other pairs stay.
    """
    before = memory[:, rows][:, :, rows]
    return place(memory, torch.where(before.isnan(), seen, (before + seen) / 2), rows)


def gate_weights(similarity: Tensor, mates: Tensor, prior: Tensor, options: FedScaOptions) -> Tensor:
    """Gate, trust and weights (docs/method.md): the prior over the sites that are near a site's best one.

    With c_ij / b_i in the place of c_ij, which scales a row of g and leaves A as it is, so that no b_i is too small.
    """
    itself = torch.eye(len(mates), dtype=torch.bool)
    similarity = similarity.masked_fill(~mates | itself, 0.0)
    best = similarity.amax(dim=1, keepdim=True).clamp(min=0)
    opened = GATES[options.gate](similarity / best, options.rho) * (mates & ~itself) + itself
    trust = (best / options.trust).clamp(max=1)
    return torch.where(best > 0, trust * prior_weights(opened, prior) + (1 - trust) * itself, itself.double())


GATES: Mapping[Gate, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        "continuous": lambda share, rho: (share - rho).clamp(min=0) / (1 - rho),
        "hard": lambda share, rho: torch.where(share >= rho, share, 0.0),
    }
)


WEIGHTINGS: Mapping[Weighting, Callable[[Tensor, Tensor, Tensor, FedScaOptions], Tensor]] = MappingProxyType(
    {
        "gate": gate_weights,
        "simplex": lambda similarity, mates, prior, options: simplex_weights(
            similarity, mates, prior, penalty=options.simplex_penalty
        ),
        "softmax": lambda similarity, mates, prior, options: softmax_weights(
            similarity, mates, self_weight=options.softmax_self, temperature=options.softmax_temperature
        ),
        "uniform": lambda similarity, mates, prior, options: prior_weights(mates, torch.ones_like(prior)),
    }
)
