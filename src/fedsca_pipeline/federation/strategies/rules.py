"""How a strategy changes a site's local training: phases and local rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Phase:
    """One phase of a site's local training in a round.

    ``trained``: names of the tensors that it trains. ``share``: its number of steps as a share of ``steps_per_round``,
    above 0. ``personal``: it trains a copy of the model that never leaves the site and that the site uses from then on.
    """

    trained: tuple[str, ...]
    share: float = 1.0
    personal: bool = False


class LocalRule:
    """Changes to the local steps of one site in one round. Default: no change.

    Args:
        received: what the site received, on its device: the shared tensors and those of ``Strategy.extra_shapes``.
        state: what ``next_state`` returned in the site's last round; empty in its first.
    """

    def __init__(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self.received, self.state = received, state

    def penalty(self, parameters: Mapping[str, Tensor], phase: Phase) -> Tensor | None:
        """Return a term that is added to the loss over the trained ``parameters``, a scalar. Default: no term."""
        return None

    def correct(self, parameters: Mapping[str, Tensor], phase: Phase) -> None:
        """Change the gradients of ``parameters`` in place, before they are clipped. Default: no change."""

    def next_state(self) -> dict[str, Tensor]:
        """Return tensors for the rule of the site's next round; they stay at the site. Default: none."""
        return {}

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return new values of the tensors of ``Strategy.extra_shapes``. Default: none."""
        return {}
