"""What a strategy is: four questions with default answers, and the server's step from replies to aggregates.

docs/method.md. The step is a template over small functions: validate, compare updates, remember, weigh, renew and mix.
Values [S, V] are fp32; they are compared and mixed as matrix products over runs of columns, so that they may be
memory-mapped and nothing of their size is allocated on the way. Everything sites x sites is float64. V values fall into
B groups with weights of their own; S sites replied, A of them were accepted, N are known. All tensors are on the CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedsca_pipeline.errors import ConfigError, NoValidSite
from fedsca_pipeline.federation.strategies.kernels import (
    ZERO_NORM,
    Groups,
    Masters,
    Replies,
    Results,
    cosines,
    gram,
    place,
    prior_weights,
    renew_and_mix,
)
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.federation.strategies.server_step import (
    COLLAPSE,
    Aggregation,
    Prior,
    ServerState,
    partners,
    site_prior,
    validate,
)
from fedsca_pipeline.model.layout import TensorLayout

logger = logging.getLogger(__name__)


class StrategyOptions(BaseModel):
    """Base of every strategy's options; a field's description says what is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strategy:
    """A federated method. A subclass answers the questions where it differs from the defaults."""

    name: ClassVar[str]
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    prior: Prior = "samples"
    adapter_methods: ClassVar[frozenset[str]] = frozenset()
    """Values of ``adapters.method`` that it works with; empty: all."""
    pools: ClassVar[bool] = False
    """Whether it trains one model on the data of all sites together, which the sites must allow."""

    def __init__(self, options: StrategyOptions) -> None:
        self.options = options

    @property
    def permitted(self) -> bool:
        """Whether the sites have agreed to what it does with their data. Yes: nothing but tensors leaves them."""
        return True

    def check_use(self, adapter_method: str) -> None:
        """Raise ConfigError, naming the YAML keys, where this strategy cannot be used with ``adapters.method``."""
        if self.adapter_methods and adapter_method.lower() not in self.adapter_methods:
            raise ConfigError(
                f"federation.strategy {self.name} needs adapters.method {' or '.join(sorted(self.adapter_methods))}, "
                f"which is {adapter_method!r}"
            )

    def trained(self, layout: TensorLayout) -> tuple[str, ...]:
        """Question 1: which tensors train. All adapters and the decoder."""
        return layout.efficient

    def shared(self, layout: TensorLayout) -> tuple[str, ...]:
        """Question 2: which of them cross the wire, in the order of the flat vector [V]. All adapters."""
        return layout.adapters

    def carried(self, layout: TensorLayout) -> Mapping[str, tuple[int, ...]]:
        """Return what crosses the wire behind them and is no tensor of the model: shapes by name. Nothing.

        It starts as zeros.
        """
        return {}

    def wire(self, layout: TensorLayout) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all that crosses the wire, by name, in the order of the flat vector [V]."""
        return {**{name: layout.shapes[name] for name in self.shared(layout)}, **self.carried(layout)}

    def groups(self, layout: TensorLayout) -> Groups:
        """Return the column ranges of the flat vector that get weights of their own; they cover it. () where V = 0."""
        size = sum(map(math.prod, self.wire(layout).values()))
        return (slice(0, size),) if size else ()

    def phases(self, layout: TensorLayout) -> tuple[Phase, ...]:
        """Question 3: of what parts a site's local training consists, in order. One, for all that is trained."""
        return (Phase(self.trained(layout)),)

    def local_rule(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> LocalRule:
        """Return how the steps of one site differ in one round; the arguments are the rule's. They do not."""
        return LocalRule(received, kept)

    def aggregate(
        self,
        state: ServerState,
        replies: Replies,
        *,
        sites: tuple[str, ...],
        initial: Tensor,
        groups: Groups,
        max_norm_ratio: float,
        layout: TensorLayout | None = None,
        out: Results | None = None,
    ) -> tuple[ServerState, Aggregation]:
        """Question 4: how replies become aggregates (docs/method.md). Neither argument is changed, but see ``out``.

        Args:
            state: what the rounds before left, rows in the order of ``sites``.
            replies: of some of ``sites``; messages have been checked (names, shapes, base hash, round).
            sites: all known sites.
            initial: [V] fp32, for a site about which nothing whatever is known.
            groups: of this strategy, see ``groups``.
            max_norm_ratio: above 1; a norm beyond this many medians is rejected.
            layout: only needed by strategies that treat some tensors on their own (``lora_merge: svd``).
            out: where masters and aggregates are written, masters over the updates if they share memory; None takes
                fresh memory.

        Raises:
            NoValidSite: no reply is usable; nothing has been written.
        """
        out = out or Results.fresh(len(sites), len(initial))
        grams = gram(replies.updates, groups)
        norms = grams.diagonal(dim1=1, dim2=2).sum(dim=0).sqrt()
        rejected = self.validate(replies, norms, state.norms, max_norm_ratio)
        kept = torch.tensor([i for i, site in enumerate(replies.sites) if site not in rejected], dtype=torch.long)
        if not len(kept):
            reasons = "; ".join(f"{site}: {reason}" for site, reason in rejected.items()) or "no site replied"
            raise NoValidSite(
                f"round {replies.round}: no site sent a usable update ({reasons}); nothing was overwritten"
            )
        grams, norms = grams[:, kept][:, :, kept], norms[kept]
        accepted = tuple(replies.sites[i] for i in kept)
        rows = torch.tensor([sites.index(site) for site in accepted])
        seen = self.compare(grams, Masters(replies, rows, kept, initial), groups)
        factors = self.factors(replies, kept, len(sites), groups)

        before, state = (
            state.masters,
            replace(
                state,
                masters=out.masters,
                trained=state.trained.index_fill(0, rows, True),
                samples=state.samples.index_copy(0, rows, replies.samples[kept]),
                memory=self.remember(state.memory, seen, rows),
                norms=torch.cat([state.norms, norms[norms >= ZERO_NORM]]),
            ),
        )
        moved = grams.diagonal(dim1=1, dim2=2).sqrt() >= ZERO_NORM
        weights = self.site_weights(state, rows, moved)
        apart = renew_and_mix(before, replies, rows, kept, weights, groups, initial, out, factors)
        aggregates = self.merge(out.aggregates, weights, state.masters, groups, layout)

        similarity, mutual = state.memory[:, rows][:, :, rows], weights[:, rows][:, :, rows]
        if not groups:
            similarity, mutual = torch.zeros(1, len(rows), len(rows)).double(), torch.eye(len(rows)).double()[None]
        elif len(rows) > 1 and (mean := mutual.diagonal(dim1=1, dim2=2).mean().item()) > COLLAPSE:
            logger.warning(
                "round %d: the mean self weight of %s is %.2f: the sites train almost alone, either because their "
                "updates do not agree (see the similarities) or because the weighting keeps each site to itself",
                replies.round, self.name, mean,
            )  # fmt: skip
        spread = torch.where(norms >= ZERO_NORM, apart / norms, 0.0)
        return state, Aggregation(aggregates, accepted, rejected, similarity, mutual, norms, spread)

    def validate(self, replies: Replies, norms: Tensor, earlier: Tensor, max_norm_ratio: float) -> Mapping[str, str]:
        """Return the rejected sites and why; see the function :func:`validate`."""
        return validate(replies, norms, earlier, max_norm_ratio)

    def compare(self, grams: Tensor, masters: Masters, groups: Groups) -> Tensor:
        """Return the similarities of the accepted sites, [B, A, A] float64. Cosines of their updates.

        ``grams`` [B, A, A] are the updates' inner products; ``masters`` gives those of the weights, for a pass more.
        """
        return cosines(grams)

    def factors(self, replies: Replies, kept: Tensor, n_sites: int, groups: Groups) -> Tensor | None:
        """Return what each update is multiplied with before it is added to its base, [B, A] float64. None: by 1."""
        return None

    def remember(self, memory: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
        """Return the similarities [B, N, N] to weigh by, NaN where none. This round's ``seen`` [B, A, A] alone."""
        return place(torch.full_like(memory, torch.nan), seen, rows)

    def partners(self, present: Tensor, moved: Tensor, known: Tensor) -> Tensor:
        """Return whom each site may be mixed from; see the function :func:`partners`."""
        return partners(present, moved, known)

    def weights(self, similarity: Tensor, mates: Tensor, prior: Tensor) -> Tensor:
        """Return the weights of one group, [N, N] float64, rows receive. The prior over each row's ``mates``.

        ``similarity`` [N, N] holds 0 where nothing is known; ``mates`` [N, N] bool; ``prior`` [N] sums to 1. Rows
        without any mate are overwritten by the caller and may hold anything.
        """
        return prior_weights(mates, prior)

    def merge(
        self, mixed: Tensor, weights: Tensor, masters: Tensor, groups: Groups, layout: TensorLayout | None
    ) -> Tensor:
        """Return the aggregates [R, V], in ``mixed``, where mixing value by value is not the last word. As it is."""
        return mixed

    def site_weights(self, state: ServerState, rows: Tensor, moved: Tensor) -> Tensor:
        """Return all weights, [B, N, N] float64: of the sites ``rows`` that took part, and of those that catch up.

        ``moved`` [B, A] says whose update is not zero. A site nobody knows anything of receives the general model.
        """
        general = site_prior(state, self.prior)
        present = torch.zeros_like(state.trained).index_fill(0, rows, True)
        awake = torch.zeros(len(moved), len(present), dtype=torch.bool).index_copy(1, rows, moved)
        weights = torch.zeros_like(state.memory)
        for group, memory in enumerate(state.memory):
            mates = self.partners(present, awake[group], ~memory.isnan())
            found = self.weights(memory.nan_to_num(nan=0.0), mates, general)
            weights[group] = torch.where(mates.any(dim=1, keepdim=True), found, general)
        return weights

    def general_model(
        self, state: ServerState, prior: Prior | None = None, layout: TensorLayout | None = None
    ) -> Tensor:
        """Return ``sum_j p_j theta_j`` [V] over the latest masters of every site that ever trained (docs/method.md).

        ``prior`` None takes the strategy's own. Raises NoValidSite where no site has trained yet.
        """
        if not state.trained.any():
            raise NoValidSite("no site has trained yet, so there is no general model")
        masters = state.masters
        weights = site_prior(state, prior or self.prior)[None, None]
        mixed = weights[0].to(masters.dtype) @ masters
        return self.merge(mixed, weights, masters, (slice(0, masters.shape[1]),), layout)[0]
