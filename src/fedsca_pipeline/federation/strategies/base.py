"""The base class of every strategy: four questions with default answers.

To add a strategy, write one file with a subclass of :class:`Strategy` that overrides the methods whose default does not
fit, and add it to ``STRATEGIES`` in this package's ``__init__``. docs/method.md has the equations of the server step.

N sites are known, S of them replied and A of those were accepted. All that crosses the wire is one flat vector of V
fp32 values; it is split into B groups with weights of their own. Everything sites x sites is float64. The server's
tensors are on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedsca_pipeline.errors import ConfigError, NoValidSite
from fedsca_pipeline.federation.strategies import server_step
from fedsca_pipeline.federation.strategies.kernels import ZERO_NORM, Groups, LocalModels, Results, cosines, gram
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.federation.strategies.server_step import (
    Aggregation,
    Prior,
    Replies,
    ServerState,
    SiteLimits,
    block,
)
from fedsca_pipeline.federation.strategies.weighting import prior_weights
from fedsca_pipeline.model.layout import TensorLayout

__all__ = [
    "Groups",
    "LocalModels",
    "LocalRule",
    "Phase",
    "Prior",
    "Replies",
    "SiteLimits",
    "Strategy",
    "StrategyOptions",
]


class StrategyOptions(BaseModel):
    """Base of every strategy's options; the description of a field says which values are allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def permitted(self) -> bool:
        """Whether the sites agree to what the strategy does with their data. Default: yes, only tensors are sent."""
        return True


class Strategy:
    """A federated method for the tensors of one layout.

    Args:
        options: the method's parameters, an instance of ``Options``.
        layout: the model's tensors by their place: ``layout.adapters``, ``layout.decoder``, ``layout.shapes``, ...

    A strategy in which each site keeps half of its own model, and what two sites receive from it:

    >>> class Half(Strategy):
    ...     name = "half"
    ...     def weights(self, similarity, partners, prior):
    ...         return (torch.eye(len(partners)) + super().weights(similarity, partners, prior)) / 2
    >>> half = Half(StrategyOptions(), TensorLayout(blocks=(("adapter",),), decoder=(), shapes={"adapter": (2,)}))
    >>> updates = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    >>> replies = Replies(1, ("north", "south"), torch.zeros(2, 2), updates, samples=torch.ones(2).double())
    >>> state, result = half.aggregate(
    ...     ServerState.initial(n_sites=2, n_values=2, n_groups=1), replies,
    ...     sites=("north", "south"), initial=torch.zeros(2),
    ...     limits=SiteLimits(max_norm_ratio=10.0, max_share=0.5, clip_to_median=False),
    ... )
    >>> result.aggregates
    tensor([[3., 1.],
            [1., 3.]])
    """

    name: ClassVar[str]
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    adapter_methods: ClassVar[frozenset[str]] = frozenset()
    """Values of ``adapters.method`` that it works with; empty: all."""
    pools: ClassVar[bool] = False
    """Whether it trains one model on the pooled data of all sites, which needs their permission."""

    def __init__(self, options: StrategyOptions, layout: TensorLayout) -> None:
        self.options, self.layout = options, layout

    @classmethod
    def check_use(cls, options: StrategyOptions, adapter_method: str) -> None:
        """Raise ConfigError, naming the YAML keys, if the strategy cannot be used with ``adapters.method``."""
        if cls.adapter_methods and adapter_method.lower() not in cls.adapter_methods:
            raise ConfigError(
                f"federation.strategy {cls.name} needs adapters.method {' or '.join(sorted(cls.adapter_methods))}, "
                f"but it is {adapter_method!r}"
            )

    @property
    def prior(self) -> Prior:
        """Weights of the sites before any comparison. Default: by their numbers of training images."""
        return "samples"

    # Question 1: which tensors train?
    def trained(self) -> tuple[str, ...]:
        """Return the names of the tensors that train. Default: all adapters and the decoder."""
        return self.layout.efficient

    # Question 2: which tensors cross the wire?
    def shared(self) -> tuple[str, ...]:
        """Return the trained tensors that cross the wire, in the order of the vector [V]. Default: all adapters."""
        return self.layout.adapters

    def extra_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return extra tensors to send after the shared ones, shapes by name; they start as zeros. Default: none."""
        return {}

    def wire_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all that crosses the wire, by name, in the order of the flat vector [V]."""
        return {**{name: self.layout.shapes[name] for name in self.shared()}, **self.extra_shapes()}

    def groups(self) -> Groups:
        """Return the column ranges of the flat vector with weights of their own; () if V is 0. Default: one range."""
        size = sum(map(math.prod, self.wire_shapes().values()))
        return (slice(0, size),) if size else ()

    # Question 3: how does local training differ?
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of one round of local training. Default: one phase that trains everything."""
        return (Phase(self.trained()),)

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the changes to one site's steps in one round; see :class:`LocalRule`. Default: none."""
        return LocalRule(received, state)

    # Question 4: how does the server turn replies into aggregates? ``aggregate`` calls the other methods in this order.
    def aggregate(
        self,
        state: ServerState,
        replies: Replies,
        *,
        sites: tuple[str, ...],
        initial: Tensor,
        limits: SiteLimits,
        out: Results | None = None,
    ) -> tuple[ServerState, Aggregation]:
        """Return the new state and what each site receives (docs/method.md). No argument changes, except ``out``.

        Args:
            state: the state after the last round, rows in the order of ``sites``.
            replies: of some of ``sites``; their messages are already checked (names, shapes, base hash, round).
            sites: all known sites.
            initial: [V] fp32, for a site without any known model.
            limits: on what one site contributes.
            out: memory for local models and aggregates; the local models may overwrite the updates. None: new memory.

        Raises:
            NoValidSite: no reply is usable; nothing has been written.
        """
        groups = self.groups()
        grams = gram(replies.updates, groups)
        norms = grams.diagonal(dim1=1, dim2=2).sum(dim=0).sqrt()
        rejected = self.validate(replies, norms, state.norms, limits.max_norm_ratio)
        rows = server_step.accepted_rows(replies, rejected)
        grams, norms, accepted = block(grams, rows), norms[rows], tuple(replies.sites[row] for row in rows)
        site_rows = torch.tensor([sites.index(site) for site in accepted])
        factors = server_step.clip_factors(norms) if limits.clip_to_median else None
        if factors is not None:
            grams = grams * factors[:, None] * factors
        models = LocalModels(replies.bases, replies.updates, site_rows, rows, initial, groups, factors)
        memory = self.remember(state.memory, self.compare(grams, models), site_rows)
        prior = server_step.shares_of(replies.samples[rows], self.prior, limits.max_share)
        scales = self.scales(replies, rows, len(sites), prior)

        out = out or Results.fresh(len(sites), len(initial))
        previous, state = state.local_models, state.after(replies, models, norms, memory, out.local_models)
        moved = grams.diagonal(dim1=1, dim2=2).sqrt() >= ZERO_NORM
        weights = self.site_weights(state, site_rows, moved, limits.max_share)
        distances = models.mix(previous, weights, out, scales)
        aggregates = self.merge(out.aggregates, weights, state.local_models)

        similarity, mutual = block(state.memory, site_rows), block(weights, site_rows)
        if groups:
            server_step.warn_if_almost_local(self.name, replies.round, mutual)
        else:
            similarity, mutual = torch.zeros(1, len(rows), len(rows)).double(), torch.eye(len(rows)).double()[None]
        lengths = norms if factors is None else norms * factors
        spread = torch.where(norms >= ZERO_NORM, distances / lengths, 0.0)
        return state, Aggregation(aggregates, accepted, rejected, similarity, mutual, norms, spread)

    def validate(self, replies: Replies, norms: Tensor, earlier: Tensor, max_norm_ratio: float) -> Mapping[str, str]:
        """Return the rejected sites with reasons. Default: too few samples, values not finite, a norm far too large.

        ``norms`` [S] are those of the updates, ``earlier`` [M] the accepted ones of earlier rounds, all float64.
        """
        return server_step.unusable(replies, norms, earlier, max_norm_ratio)

    def compare(self, grams: Tensor, models: LocalModels) -> Tensor:
        """Return the similarities of the accepted sites, [B, A, A] float64. Default: cosines of their updates.

        ``grams`` [B, A, A] are the inner products of the updates; ``models.cosines`` compares the local models instead,
        at the cost of one more pass.
        """
        return cosines(grams)

    def remember(self, memory: Tensor, similarity: Tensor, rows: Tensor) -> Tensor:
        """Return the similarities of all sites, [B, N, N], NaN if unknown. Default: those of this round, no memory.

        ``memory`` [B, N, N] is what this method returned in the last round; ``similarity`` [B, A, A] is this round's,
        of the sites ``rows`` [A].
        """
        return server_step.with_block(torch.full_like(memory, torch.nan), similarity, rows)

    def scales(self, replies: Replies, rows: Tensor, n_sites: int, prior: Tensor) -> Tensor | None:
        """Return the factor of each accepted update, [B, A] float64, ``rows`` [A] being its reply. Default: all 1.

        ``prior`` [A] is that of the accepted sites, summing to 1.
        """
        return None

    def site_weights(self, state: ServerState, rows: Tensor, moved: Tensor, max_share: float) -> Tensor:
        """Return the weights of all sites, [B, N, N] float64, rows receive, from ``partners`` and ``weights``.

        ``rows`` [A]: the accepted sites; ``moved`` [B, A]: whether their update is not zero. A site without partners
        receives the general model. Each row's prior is limited by ``max_share`` over the sites that it may be mixed of:
        with others absent, a limit over all known sites would leave one site more.
        """
        prior = server_step.site_prior(state, self.prior)
        general = server_step.capped(prior[None], max_share)
        present = torch.zeros_like(state.trained).index_fill(0, rows, True)
        moved_sites = torch.zeros(len(moved), len(present), dtype=torch.bool).index_copy(1, rows, moved)
        weights = torch.zeros_like(state.memory)
        for group, memory in enumerate(state.memory):
            partners = self.partners(present, moved_sites[group], ~memory.isnan())
            priors = server_step.capped(partners * prior, max_share)
            found = self.weights(memory.nan_to_num(nan=0.0), partners, priors)
            weights[group] = torch.where(partners.any(dim=1, keepdim=True), found, general)
        return weights

    def partners(self, present: Tensor, moved: Tensor, known: Tensor) -> Tensor:
        """Return the sites that may be mixed for each site, [N, N] bool, rows receive. Default: those it resembles.

        ``present`` [N]: accepted this round; ``moved`` [N]: with an update that is not zero; ``known`` [N, N]: pairs
        with a similarity.
        """
        return server_step.partners(present, moved, known)

    def weights(self, similarity: Tensor, partners: Tensor, prior: Tensor) -> Tensor:
        """Return the weights of one group, [N, N] float64, rows receive. Default: the prior over each row's partners.

        ``similarity`` [N, N] is 0 if unknown; ``partners`` [N, N] bool; ``prior`` [N, N] is above 0 for each row's
        partners only. The caller overwrites rows without partners, which may hold any values.
        """
        return prior_weights(partners, prior)

    def merge(self, mixed: Tensor, weights: Tensor, local_models: Tensor) -> Tensor:
        """Return the aggregates [R, V]. Default: ``mixed``, the products of ``weights`` and ``local_models``.

        For tensors that must not be mixed value by value: change them in ``mixed``. ``weights`` [B, R, N] float64;
        ``local_models`` [N, V].
        """
        return mixed

    def general_model(self, state: ServerState, max_share: float, prior: Prior | None = None) -> Tensor:
        """Return ``sum_j p_j theta_j`` [V], the mean of the latest local models of all sites that ever trained.

        ``max_share``: of one site; ``prior`` None: the strategy's own. Raises NoValidSite if no site has trained yet.
        """
        if not state.trained.any():
            raise NoValidSite("no site has trained yet, so there is no general model")
        shares = server_step.capped(server_step.site_prior(state, prior or self.prior)[None], max_share)
        mixed = shares.to(state.local_models.dtype) @ state.local_models
        return self.merge(mixed, shares.expand(len(self.groups()), 1, -1), state.local_models)[0]
