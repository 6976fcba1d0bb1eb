"""The record of a finished round: bytes, losses, Dice and weights per site, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

# Sites up to which JSON holds numbers that people can read. The text of more takes four times the bytes.
_READABLE = 24


@dataclass(frozen=True)
class Matrices:
    """A matrix for each group, [groups, receives, from] over the accepted sites, float32; none by default."""

    shape: tuple[int, ...] = (0, 0, 0)
    content: bytes = b""

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """Return the matrices of an array or nested lists; an empty list gives none."""
        array = np.asarray(values, "<f4")
        return cls(array.shape, array.tobytes()) if array.size else cls()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def array(self) -> np.ndarray:
        """The values, read-only."""
        return np.frombuffer(self.content, "<f4").reshape(self.shape)

    def as_json(self) -> Any:
        """Return nested lists, or for many sites ``shape`` and ``float32``, little-endian as base64."""
        if self.shape[-1] <= _READABLE:
            return self.array.tolist()
        return {"shape": self.shape, "float32": base64.b64encode(self.content).decode()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Return the matrices that :meth:`as_json` made JSON of.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        if not isinstance(value, Mapping):
            return cls.of(value)
        content = base64.b64decode(value["float32"], validate=True)
        return cls.of(np.frombuffer(content, "<f4").reshape(value["shape"]))


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
    """One finished round. ``similarity`` and ``weights`` are over ``accepted``."""

    round: int
    final: bool
    sites: Mapping[str, SiteRecord]
    accepted: Sequence[str] = ()
    similarity: Matrices = Matrices()
    weights: Matrices = Matrices()

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {
            "round": self.round,
            "final": self.final,
            "sites": {site: asdict(record) for site, record in self.sites.items()},
            "accepted": list(self.accepted),
            "similarity": self.similarity.as_json(),
            "weights": self.weights.as_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundRecord:
        """Return the record that :meth:`as_json` made JSON of."""
        sites = {site: SiteRecord(**record) for site, record in value["sites"].items()}
        matrices = {name: Matrices.from_json(value[name]) for name in ("similarity", "weights")}
        return cls(**{**value, **matrices, "sites": sites, "accepted": tuple(value["accepted"])})
