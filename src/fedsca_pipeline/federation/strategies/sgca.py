"""FedSCA: similarity-guided collaborative aggregation (SGCA) of the low adapters (LAT).

Zhang et al., *FedSCA*, arXiv 2503.15390; the equations are this project's reconstruction (docs/method.md).
Every weighting maps the similarities of one group to row-stochastic weights. Permuting the sites permutes the weights;
scaling the updates does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import Groups, LocalModels, LocalRule, Replies
from fedsca_pipeline.federation.strategies.fedprox import MU_HELP, ProximalRule
from fedsca_pipeline.federation.strategies.server_step import block, with_block
from fedsca_pipeline.federation.strategies.sharing import (
    LORA_MERGE_HELP,
    SHARED_BLOCKS_HELP,
    LoraMerge,
    SharedBlocks,
    SharingOptions,
    SharingStrategy,
)
from fedsca_pipeline.federation.strategies.weighting import prior_weights, simplex_weights, softmax_weights

Weighting = Literal["gate", "simplex", "softmax", "uniform"]
Gate = Literal["continuous", "hard"]


class FedScaOptions(SharingOptions):
    """``strategies.fedsca``."""

    shared_blocks: SharedBlocks = Field("low", description=SHARED_BLOCKS_HELP)
    lora_merge: LoraMerge = Field("a_only", description=LORA_MERGE_HELP)
    weighting: Weighting = Field("gate", description="gate, simplex, softmax or uniform")
    granularity: Literal["model", "block"] = Field(
        "model", description="model (one set of weights) or block (one per shared block, and one for a shared decoder)"
    )
    compare: Literal["updates", "weights"] = Field(
        "updates", description="updates or weights (ablation): the similarities are cosines of these"
    )
    memory: bool = Field(True, description="true or false: average similarities over rounds")
    gate: Gate = Field("continuous", description="continuous or hard: shape of the gate at its threshold")
    rho: float = Field(
        0.5, ge=0.0, lt=1.0, description="0 <= rho < 1, the gate's threshold as a share of a site's best similarity"
    )
    trust: float = Field(
        0.3, gt=0.0, le=1.0, description="0 < g0 <= 1, the best similarity from which on a site fully trusts the others"
    )
    simplex_penalty: float = Field(
        0.8, ge=1e-3, le=1e6, description="1e-3 <= alpha <= 1e6, simplex: the pull towards the prior"
    )
    softmax_self: float = Field(0.3, ge=0.0, le=1.0, description="0 to 1, softmax: the weight of the site itself")
    softmax_temperature: float = Field(
        0.1, ge=1e-3, le=1e6, description="1e-3 <= t <= 1e6, softmax: low favours the most similar site"
    )
    mu: float = Field(0.0, ge=0.0, le=1e6, description=MU_HELP)
    step: float = Field(
        1.0, gt=0.0, le=100.0, description="above 0, to 100: factor of the updates before they are mixed"
    )


class FedSca(SharingStrategy):
    """Each site receives its own mix of the sites whose updates point in a similar direction."""

    name: ClassVar[str] = "fedsca"
    Options: ClassVar[type[FedScaOptions]] = FedScaOptions
    options: FedScaOptions

    def groups(self) -> Groups:
        """Return one range, or for ``granularity: block`` one per shared block and one for the decoder."""
        if self.options.granularity == "model":
            return super().groups()
        ends = accumulate((self.layout.size(part) for part in self.parts()), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the pull towards the aggregate; none for ``mu`` 0."""
        return ProximalRule(received, state, self.options.mu)

    def compare(self, grams: Tensor, models: LocalModels) -> Tensor:
        """Return the cosines of the updates, or with ``compare: weights`` of the weights."""
        if self.options.compare == "weights":
            return models.cosines(from_start=False)
        return super().compare(grams, models)

    def remember(self, memory: Tensor, similarity: Tensor, rows: Tensor) -> Tensor:
        """Return similarities averaged over rounds, or with ``memory: false`` only those of this round."""
        average = remember if self.options.memory else super().remember
        return average(memory, similarity, rows)

    def scales(self, replies: Replies, rows: Tensor, n_sites: int, prior: Tensor) -> Tensor | None:
        """Return ``step`` for every update; None for 1. It makes up for a mix of different updates being shorter."""
        if self.options.step == 1:
            return None
        return torch.full((len(self.groups()), len(rows)), self.options.step, dtype=torch.float64)

    def weights(self, similarity: Tensor, partners: Tensor, prior: Tensor) -> Tensor:
        """Return the weights of one group by the chosen ``weighting``."""
        return WEIGHTINGS[self.options.weighting](similarity, partners, prior, self.options)


def remember(memory: Tensor, similarity: Tensor, rows: Tensor) -> Tensor:
    """Return ``memory`` [B, N, N] updated by the ``similarity`` [B, A, A] of the sites ``rows`` (docs/method.md).

    For a pair, the first value, then the mean of the memory and the new value. Other pairs stay as they are.
    """
    before = block(memory, rows)
    return with_block(memory, torch.where(before.isnan(), similarity, (before + similarity) / 2), rows)


def gate_weights(similarity: Tensor, partners: Tensor, prior: Tensor, options: FedScaOptions) -> Tensor:
    """Return the prior over the sites that are nearly as similar as the best one: gate and trust (docs/method.md).

    It uses c_ij / b_i instead of c_ij, so that no b_i is too small; this scales a row of g and leaves A unchanged.
    """
    itself = torch.eye(len(partners), dtype=torch.bool)
    similarity = similarity.masked_fill(~partners | itself, 0.0)
    best = similarity.amax(dim=1, keepdim=True).clamp(min=0)
    opened = GATES[options.gate](similarity / best, options.rho) * (partners & ~itself) + itself
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
        "simplex": lambda similarity, partners, prior, options: simplex_weights(
            similarity, partners, prior, penalty=options.simplex_penalty
        ),
        "softmax": lambda similarity, partners, prior, options: softmax_weights(
            similarity, partners, self_weight=options.softmax_self, temperature=options.softmax_temperature
        ),
        "uniform": lambda similarity, partners, prior, options: prior_weights(partners, torch.ones_like(prior)),
    }
)
