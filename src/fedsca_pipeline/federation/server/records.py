"""The record of a finished round: bytes, losses, Dice and weights per site, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SiteRecord:
    """One site in one round. Bytes are those of the serialised messages.

    ``dice_validation`` belongs to the site's model *before* this round's training, that of round - 1 (round 0: the
    foundation), ``dice_local`` to the model right after local training; both are in [0, 1]. ``epsilon`` covers all the
    site's answers in all runs (docs/privacy.md). ``absent`` says why the round has no update of the site. None: unknown
    (absent, rejected, without differential privacy).
    """

    bytes_down: int = 0
    bytes_up: int = 0
    samples: int | None = None
    loss: float | None = None
    dice_validation: float | None = None
    dice_local: float | None = None
    seconds: float | None = None
    update_norm: float | None = None
    self_weight: float | None = None
    spread: float | None = None
    absent: str | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None
    privacy_level: str | None = None


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. ``similarity`` and ``weights`` are [groups][receives][from] over ``accepted``."""

    round: int
    final: bool
    sites: Mapping[str, SiteRecord]
    accepted: Sequence[str] = ()
    similarity: Sequence[Sequence[Sequence[float]]] = ()
    weights: Sequence[Sequence[Sequence[float]]] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {**asdict(self), "accepted": list(self.accepted)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundRecord:
        """Return the record that :meth:`as_json` made JSON of."""
        sites = {site: SiteRecord(**record) for site, record in value["sites"].items()}
        return cls(**{**value, "sites": sites, "accepted": tuple(value["accepted"])})
