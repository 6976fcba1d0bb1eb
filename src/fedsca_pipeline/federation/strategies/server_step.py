"""What a server step works on and returns, and its checks and priors.

Everything sites x sites is float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fedsca_pipeline.errors import NoValidSite, ResumeError
from fedsca_pipeline.federation.strategies.kernels import ZERO_NORM, LocalModels

logger = logging.getLogger(__name__)

Prior = Literal["samples", "uniform"]
"""Weights of the sites before any comparison: by the number of training images, or equal."""

PRIORS: Mapping[Prior, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"samples": torch.clone, "uniform": torch.ones_like}
)

_TINY = torch.finfo(torch.float64).tiny

ALMOST_LOCAL = 0.95  # mean self weight above which a federation amounts to local training (docs/method.md)


@dataclass(frozen=True)
class Replies:
    """The replies of one round, sorted by site.

    ``bases`` [N, V] fp32: what each known site trained from; any values for a site without a reply. ``updates`` [S, V]
    fp32. ``samples`` [S] float64: numbers of training images. ``steps`` [S] float64: optimiser steps behind each
    update; None: unknown.
    """

    round: int
    sites: tuple[str, ...]
    bases: Tensor
    updates: Tensor
    samples: Tensor
    steps: Tensor | None = None


@dataclass(frozen=True)
class SiteLimits:
    """What one site may contribute to a server step: the parameters of ``federation`` with these names.

    ``max_norm_ratio``: above 1; an update longer than this many median norms is rejected. ``max_share``: above 0, to 1;
    the largest share of a site in the prior of any mix. ``clip_to_median``: whether longer updates are shortened to the
    median norm of their round.
    """

    max_norm_ratio: float
    max_share: float
    clip_to_median: bool


@dataclass(frozen=True)
class ServerState:
    """What the server remembers between rounds, as plain tensors; rows are the known sites, in order.

    ``local_models`` [N, V] fp32: the latest theta = base + update of each site, zeros if it never trained. ``trained``
    [N] bool. ``samples`` [N] float64: as last reported. ``memory`` [B, N, N] float64: similarities, NaN for a pair
    that never took part in the same round. ``norms`` [M] float64: norms of all accepted updates so far except zero
    updates.
    """

    local_models: Tensor
    trained: Tensor
    samples: Tensor
    memory: Tensor
    norms: Tensor

    @classmethod
    def initial(cls, n_sites: int, n_values: int, n_groups: int) -> ServerState:
        """Return the state before the first round."""
        return cls(
            local_models=torch.zeros(n_sites, n_values),
            trained=torch.zeros(n_sites, dtype=torch.bool),
            samples=torch.zeros(n_sites, dtype=torch.float64),
            memory=torch.full((n_groups, n_sites, n_sites), torch.nan, dtype=torch.float64),
            norms=torch.zeros(0, dtype=torch.float64),
        )

    def after(
        self, replies: Replies, models: LocalModels, norms: Tensor, memory: Tensor, latest: Tensor
    ) -> ServerState:
        """Return the state after a round; this one stays as it is.

        ``norms`` [A] are those of the accepted updates, ``memory`` the new similarities, ``latest`` [N, V] the memory
        that holds the latest local models.
        """
        return replace(
            self,
            local_models=latest,
            trained=self.trained.index_fill(0, models.site_rows, True),
            samples=self.samples.index_copy(0, models.site_rows, replies.samples[models.reply_rows]),
            memory=memory,
            norms=torch.cat([self.norms, norms[norms >= ZERO_NORM]]),
        )

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the state by field name, ready for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ServerState:
        """Return the state that ``as_tensors`` wrote; ResumeError names missing tensors."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in tensors]:
            raise ResumeError(
                f"the server state lacks {', '.join(missing)}; resume from an older checkpoint or restart the run"
            )
        return cls(**{name: tensors[name] for name in names})


@dataclass(frozen=True)
class Aggregation:
    """The result of one server step.

    ``aggregates`` [N, V] fp32: what each known site receives next. ``accepted``: the A accepted sites, sorted like the
    replies; ``rejected``: reasons by site. ``similarity`` and ``weights`` [B, A, A] float64: C as the weights used it,
    and A, rows receive; if nothing is shared they hold one group, zeros and the identity. ``norms`` [A] float64 of the
    updates. ``spread`` [A] float64: |theta_i - mean| / |update_i|, 0 for a zero update.
    """

    aggregates: Tensor
    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    similarity: Tensor
    weights: Tensor
    norms: Tensor
    spread: Tensor


def unusable(replies: Replies, norms: Tensor, earlier: Tensor, max_norm_ratio: float) -> dict[str, str]:
    """Return the reasons to reject replies, by site (docs/method.md). Message fields have been checked before.

    The first of these that applies:

    1. Fewer than one sample.
    2. A value that is not finite. The norm of the update shows it without a further pass: base and sum are finite. An
       update whose squared norm exceeds fp32 counts too, since a base near the end of fp32 would lose it in rounding.
    3. A norm above ``max_norm_ratio`` times the median of this round's finite norms and the ``earlier`` accepted ones.

    For an even number of norms the median is the lower middle one. The mean of both would let the larger of two sites
    in a first round raise the limit above itself: 1 and 1000 are each below ten times 500. Norms of zero updates have
    no scale and are left out; otherwise one site that did not move would cause all others to be rejected. No rule can
    tell which of two sites in a first round is the odd one, so the larger is rejected, since only it can do harm. A
    single first site has nothing to compare with and is accepted.
    """
    finite = norms.isfinite()
    known = torch.cat([earlier, norms[finite & (norms >= ZERO_NORM)]])
    limit = max_norm_ratio * known.median().item() if len(known) else 0.0
    too_long = f"is above {limit:.3g}, {max_norm_ratio:g} times the median norm so far (federation.max_norm_ratio)"
    faults = (
        (~(replies.samples >= 1), [f"sample count {count:g} is below 1" for count in replies.samples.tolist()]),
        (~finite, ["values are not finite, or too large to be squared in fp32"] * len(norms)),
        (norms > max(limit, ZERO_NORM), [f"update norm {norm:.3g} {too_long}" for norm in norms.tolist()]),
    )
    found: dict[str, str] = {}
    for at_fault, reasons in faults:
        for i in at_fault.nonzero().flatten().tolist():
            found.setdefault(replies.sites[i], reasons[i])
    return dict(sorted(found.items()))


def accepted_rows(replies: Replies, rejected: Mapping[str, str]) -> Tensor:
    """Return the rows [A] of the replies that were not rejected; raises NoValidSite if there are none."""
    rows = [row for row, site in enumerate(replies.sites) if site not in rejected]
    if not rows:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in rejected.items()) or "no site replied"
        raise NoValidSite(f"round {replies.round}: no site sent a usable update ({reasons}); nothing was overwritten")
    return torch.tensor(rows, dtype=torch.long)


def partners(present: Tensor, moved: Tensor, known: Tensor) -> Tensor:
    """Return which sites each site may be mixed from in one group, [N, N] bool, rows receive (docs/method.md).

    A site that took part (``present`` [N]): itself, and if its update is not zero, all others in ``moved`` [N]. An
    absent site: itself and the sites that it has a similarity with (``known`` [N, N]), except those that took part and
    did not move. If it has a similarity with no site its row is all False, and it receives the general model.
    """
    itself = torch.eye(len(present), dtype=torch.bool)
    met = known & ~itself
    others = torch.where(present[:, None], moved[:, None] & moved & ~itself, met & (moved | ~present))
    return others | (itself & (present | met.any(dim=1)))


def site_prior(state: ServerState, prior: Prior) -> Tensor:
    """Return ``p`` [N] float64 over the sites that have ever trained, summing to 1; all zero if there are none.

    It rests on what the sites claim: :func:`capped` limits it for the sites of one mix.
    """
    shares = PRIORS[prior](state.samples) * state.trained
    return shares / shares.sum().clamp(min=_TINY)


def shares_of(samples: Tensor, prior: Prior, max_share: float) -> Tensor:
    """Return the prior [A] float64 of sites that claim ``samples`` [A] images, summing to 1, none above the limit."""
    shares = PRIORS[prior](samples)
    return capped((shares / shares.sum())[None], max_share)[0]


def capped(shares: Tensor, max_share: float) -> Tensor:
    """Return ``shares`` [R, N] in which no site has more of its row than the limit, float64; row sums stay.

    The limit of a row with K sites above 0 is ``max(max_share, 1 / K)``. Sites above it get the limit, and the others
    share the rest in proportion, until none is above: the row keeps its order. A row without such a site stays as it is
    bit for bit, and so does a row of zeros.
    """
    total = shares.sum(dim=1, keepdim=True)
    limit = total * (shares > 0).double().sum(dim=1, keepdim=True).reciprocal().clamp(min=max_share, max=1.0)
    held = torch.zeros_like(shares, dtype=torch.bool)
    # Each pass holds at least one more site at the limit.
    while (above := shares > limit).any():
        held |= above
        others = shares.masked_fill(held, 0.0)
        rest = (total - limit * held.sum(dim=1, keepdim=True)).clamp(min=0)
        shares = torch.where(held, limit, others * (rest / others.sum(dim=1, keepdim=True).clamp(min=_TINY)))
    return shares


def clip_factors(norms: Tensor) -> Tensor:
    """Return the factors [A] that shorten the updates to at most the median of ``norms`` [A], float64, in (0, 1].

    ``min(1, median / |u_i|)``: the bound that Geyer, Klein and Nabi (NeurIPS workshop 2017, arXiv 1712.07557, section
    3) choose for the updates of a round. Without their noise it limits what one site can do (Sun et al., *Can You
    Really Backdoor Federated Learning?*, NeurIPS workshop 2019). The median is the one of :func:`unusable`: zero
    updates are left out, and of an even number the lower middle one counts, so that half of the sites cannot raise it.
    All factors are 1 if no update moved.
    """
    moved = norms >= ZERO_NORM
    if not moved.any():
        return torch.ones_like(norms)
    return torch.where(moved, norms[moved].median() / norms, 1.0).clamp(max=1)


def block(matrices: Tensor, rows: Tensor) -> Tensor:
    """Return the rows and columns ``rows`` [A] of ``matrices`` [B, N, N], as [B, A, A]."""
    return matrices[:, rows][:, :, rows]


def with_block(matrices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of ``matrices`` [B, N, N] with ``values`` [B, A, A] at the rows and columns ``rows`` [A]."""
    copied = matrices.clone()
    copied[:, rows[:, None], rows] = values
    return copied


def warn_if_almost_local(strategy: str, round_: int, weights: Tensor) -> None:
    """Warn if the mean self weight in ``weights`` [B, A, A] shows that the sites train almost alone."""
    if weights.shape[1] > 1 and (mean := weights.diagonal(dim1=1, dim2=2).mean().item()) > ALMOST_LOCAL:
        logger.warning(
            "round %d: the mean self weight of %s is %.2f: the sites train almost alone, either because their updates "
            "do not agree (see the similarities) or because the weighting gives each site mostly its own model",
            round_, strategy, mean,
        )  # fmt: skip
