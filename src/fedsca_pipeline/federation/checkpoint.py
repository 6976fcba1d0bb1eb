"""The server's checkpoint: one safetensors file a round, so that a round is either whole on disk or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsca_pipeline.errors import ResumeError, WeightsError
from fedsca_pipeline.federation.strategies.base import ServerState
from fedsca_pipeline.files import read_header, read_tensors, write_tensors

_KEPT_ROUNDS = 2


@dataclass(frozen=True)
class SiteRecord:
    """What is known of one site after one round. Bytes are those of the serialised messages.

    ``dice_validation`` is of the model the site had *before* this round's training, that is of round - 1 (round 0: the
    foundation); ``dice_local`` is right after local training. Dice lie in [0, 1]. ``epsilon`` is that of all that the
    site has ever answered (docs/privacy.md). None: not known (absent, rejected, without differential privacy).
    """

    bytes_down: int = 0
    bytes_up: int = 0
    samples: int = 0
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
        """Undo :meth:`as_json`."""
        sites = {site: SiteRecord(**record) for site, record in value["sites"].items()}
        return cls(**{**value, "sites": sites, "accepted": tuple(value["accepted"])})


@dataclass(frozen=True)
class Checkpoint:
    """Everything the server needs to go on after ``round`` (0: before the first).

    ``aggregates`` [N,V] fp32 is what each site gets next, ``bases`` [N,V] what each is known to hold, ``has_base`` [N];
    ``answered`` [N] int64 is the last round in which each one's update was accepted, 0 for none.
    Random streams are derived from seed, site and round (:func:`~fedsca_pipeline.federation.devices.stream_seed`), so
    there is no generator state to keep.
    """

    round: int
    state: ServerState
    aggregates: Tensor
    bases: Tensor
    has_base: Tensor
    answered: Tensor
    history: Sequence[RoundRecord] = field(default_factory=tuple)


class CheckpointFolder:
    """The last two rounds of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> Checkpoint:
        """Write a checkpoint atomically, then drop all but the last two.

        Returns the same checkpoint as :meth:`latest` would, its tensors memory-mapped: a run goes on from what a
        resumed one would start from, and the memory that the checkpoint came in is free again.
        """
        tensors = {f"state/{name}": t for name, t in checkpoint.state.as_tensors().items()} | {
            "aggregates": checkpoint.aggregates,
            "bases": checkpoint.bases,
            "has_base": checkpoint.has_base,
            "answered": checkpoint.answered,
        }
        # One entry: safetensors writes several in an order that changes from run to run.
        header = json.dumps({"round": checkpoint.round, "history": [record.as_json() for record in checkpoint.history]})
        path = self.folder / f"round_{checkpoint.round:05d}.safetensors"
        write_tensors(path, tensors, {"checkpoint": header})
        for old in self._files()[:-_KEPT_ROUNDS]:
            old.unlink()
        return replace(_stored(path), round=checkpoint.round, history=checkpoint.history)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None where there is none.

        Raises:
            ResumeError: the newest file cannot be read.
        """
        files = self._files()
        if not files:
            return None
        try:
            header, stored = read_header(files[-1], "checkpoint"), _stored(files[-1])
        except WeightsError as error:
            raise ResumeError(
                f"{files[-1]}: this checkpoint cannot be read. Delete it to go on from the round before."
            ) from error
        history = tuple(RoundRecord.from_json(record) for record in header["history"])
        return replace(stored, round=header["round"], history=history)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round_*.safetensors"))


def _stored(path: Path) -> Checkpoint:
    """Return a file's tensors, memory-mapped, as a checkpoint without round and history."""
    tensors = read_tensors(path)
    state = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
    return Checkpoint(
        round=0,
        state=ServerState.from_tensors(state),
        aggregates=tensors["aggregates"],
        bases=tensors["bases"],
        has_base=tensors["has_base"].to(torch.bool),
        answered=tensors["answered"],
    )
