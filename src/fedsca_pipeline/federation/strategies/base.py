"""What a strategy is: four questions with default answers, and the server's step from replies to aggregates.

docs/method.md. The step is a template over small functions: validate, compare updates, remember, weigh, renew and mix.
Values [S, V] are fp32; they are compared and mixed as matrix products over runs of columns, so that they may be
memory-mapped and nothing of their size is allocated on the way. Everything sites x sites is float64. V values fall into
B groups with weights of their own; S sites replied, A of them were accepted, N are known. All tensors are on the CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedsca_pipeline.errors import ConfigError, NoValidSite, ResumeError
from fedsca_pipeline.federation.messages.codec import TensorLayout

logger = logging.getLogger(__name__)

Prior = Literal["samples", "uniform"]
Groups = tuple[slice, ...]

ZERO_NORM = 1e-12  # an update shorter than this has no direction (docs/method.md)
COLLAPSE = 0.95  # mean self weight beyond which a federation is local training (docs/method.md)
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
class ServerState:
    """All that a server remembers between rounds, as plain tensors; rows are the known sites, in order.

    ``masters`` [N, V] fp32: the latest theta = base + update of each site, zeros where it never trained. ``trained``
    [N] bool. ``samples`` [N] float64: as last reported. ``memory`` [B, N, N] float64: similarities, NaN for a pair
    never seen together. ``norms`` [M] float64: norms of all accepted updates so far, those of zero updates left out.
    """

    masters: Tensor
    trained: Tensor
    samples: Tensor
    memory: Tensor
    norms: Tensor

    @classmethod
    def initial(cls, n_sites: int, n_values: int, n_groups: int) -> ServerState:
        """Return the state before the first round."""
        return cls(
            masters=torch.zeros(n_sites, n_values),
            trained=torch.zeros(n_sites, dtype=torch.bool),
            samples=torch.zeros(n_sites, dtype=torch.float64),
            memory=torch.full((n_groups, n_sites, n_sites), torch.nan, dtype=torch.float64),
            norms=torch.zeros(0, dtype=torch.float64),
        )

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the state by field name, ready for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ServerState:
        """Return the state that ``as_tensors`` wrote; ResumeError names what is missing."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in tensors]:
            raise ResumeError(
                f"the server state lacks {', '.join(missing)}; go on from an older checkpoint or start anew"
            )
        return cls(**{name: tensors[name] for name in names})


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
class Aggregation:
    """What one round gave.

    ``aggregates`` [N, V] fp32: what each known site receives next. ``accepted``: A sites, sorted as they replied;
    ``rejected``: site to reason. ``similarity`` and ``weights`` [B, A, A] float64: C as the weights used it, and A,
    rows receive; where nothing is shared they hold one group, zeros and the identity. ``norms`` [A] float64 of the
    updates. ``spread`` [A] float64: |theta_i - mean| / |update_i|, 0 for a zero update.
    """

    aggregates: Tensor
    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    similarity: Tensor
    weights: Tensor
    norms: Tensor
    spread: Tensor


class StrategyOptions(BaseModel):
    """Base of every strategy's options; a field's description says what is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Phase:
    """A part of a site's local training in one round.

    ``trained``: names of the tensors it trains. ``share``: its steps, as a share of ``steps_per_round``, above 0.
    ``personal``: it trains a copy of the model that never leaves the site, and is the site's model from then on.
    """

    trained: tuple[str, ...]
    share: float = 1.0
    personal: bool = False


class LocalRule:
    """How the local steps of one site differ in one round: this one changes nothing.

    Args:
        received: what the site was sent, on its device: shared tensors and what ``Strategy.carried`` names.
        kept: what the rule of the site's last round left; empty in its first.
    """

    def __init__(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        self.received, self.before = received, kept

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return an extra term of the loss over the trained ``parameters``, a scalar. None."""
        return None

    def correct(self, parameters: Mapping[str, Tensor], phase: Phase) -> None:
        """Change the gradients of ``parameters`` in place, before they are clipped. As they are."""

    def kept(self) -> dict[str, Tensor]:
        """Return what the site keeps for the rule of its next round. Nothing."""
        return {}

    def carried(self) -> dict[str, Tensor]:
        """Return the new values of what ``Strategy.carried`` names. Nothing."""
        return {}


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


def validate(replies: Replies, norms: Tensor, earlier: Tensor, max_norm_ratio: float) -> dict[str, str]:
    """Return the sites whose reply is unusable, with the reason (docs/method.md; what is left after ``check``).

    In this order: fewer than one sample; a value that is not finite, seen by the norm of the update, which is free (the
    base is the server's own and finite, and so is their sum: an update whose norm has a square in fp32 is lost in the
    rounding of a base near fp32's end); a norm above ``max_norm_ratio`` times the median of this round's finite norms
    and the ``earlier`` accepted ones.

    Of an even number of norms the lower middle one is the median, else the larger of two sites in a first round would
    lift the bar over itself (with the mean of both, 1 and 1000 are each below ten times 500). Norms of zero updates
    tell no scale and are left out, else a site that did not move would have all others rejected. What no rule can tell:
    which of two sites in a first round is the odd one; the larger is turned away, since only it can do harm. A lone
    first site has nothing to be measured against and is taken.
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


def place(matrices: Tensor, part: Tensor, rows: Tensor) -> Tensor:
    """Return [B, N, N] ``matrices`` with ``part`` [B, A, A] at the rows and columns ``rows``."""
    placed = matrices.clone()
    placed[:, rows[:, None], rows] = part
    return placed


def partners(present: Tensor, moved: Tensor, known: Tensor) -> Tensor:
    """Return whom each site may be mixed from in one group, [N, N] bool, rows receive (docs/method.md).

    A site that took part (``present`` [N]): itself, and if its update is not zero the others that ``moved`` [N], too.
    An absent one: itself and the sites it has a similarity with (``known`` [N, N]), but for those that took part and
    did not move; a row without any True where it has a similarity with nobody, and the general model is due.
    """
    itself = torch.eye(len(present), dtype=torch.bool)
    met = known & ~itself
    others = torch.where(present[:, None], moved[:, None] & moved & ~itself, met & (moved | ~present))
    return others | (itself & (present | met.any(dim=1)))


def site_prior(state: ServerState, prior: Prior) -> Tensor:
    """Return ``p`` [N] float64 over the sites that have ever trained, summing to 1; all zero where none has."""
    shares = PRIORS[prior](state.samples) * state.trained
    return shares / shares.sum().clamp(min=torch.finfo(torch.float64).tiny)


PRIORS: Mapping[Prior, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"samples": torch.clone, "uniform": torch.ones_like}
)


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
