"""One site's round: what the site works on, from the message it received to the answer it sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsca_pipeline.data.arrays import Arrays
from fedsca_pipeline.federation.site.batches import SiteBatches
from fedsca_pipeline.federation.site.steps import StepCallback
from fedsca_pipeline.federation.site.store import SiteState, SiteStore

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class SiteRound:
    """One round of one site; tensors by name, fp32, on the CPU.

    Args:
        site: the site's name.
        round: number of the round, from 1.
        final: whether the round is the last one, in which sites validate and do not train.
        answered: the last round whose update of this site the server has used, 0 for none.
        base: the shared tensors received, as decoded; the update is the difference from them.
        received: the whole model the round starts from: ``base`` and the site's private tensors.
        state: the site after round ``answered``, None if it has none.
        data: the site's arrays.
        store: the site's folder.
        batches: of ``data``.
        known_classes: the classes that the site's masks can show.
        on_step: called after local steps.
    """

    site: str
    round: int
    final: bool
    answered: int
    base: Tensors
    received: Tensors
    state: SiteState | None
    data: Arrays
    store: SiteStore
    batches: SiteBatches
    known_classes: Sequence[int]
    on_step: StepCallback

    @property
    def personal(self) -> Tensors:
        """The personal copy of the model, if the strategy has one; else empty."""
        return self.state.personal if self.state else {}

    @property
    def rule_state(self) -> Tensors:
        """What the strategy's local rule stored in the site's last round; empty in its first."""
        return self.state.rule_state if self.state else {}

    @property
    def moments(self) -> Tensors:
        """AdamW's moments of the private tensors, if they are stored; else empty."""
        return self.state.moments if self.state else {}

    @property
    def residual(self) -> Tensors:
        """The rounding errors of the site's int8 updates so far; empty for other wire dtypes."""
        return self.state.residual if self.state else {}
