"""The server's step from replies to aggregates: state, checks and priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation.strategies.kernels import (
    ZERO_NORM,
    Replies,
)

Prior = Literal["samples", "uniform"]


COLLAPSE = 0.95  # mean self weight beyond which a federation is local training (docs/method.md)


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
