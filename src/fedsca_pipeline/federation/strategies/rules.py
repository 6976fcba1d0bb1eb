"""How a strategy changes a site's local training: phases and local rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


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
