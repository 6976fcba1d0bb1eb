"""The files that a site stores between rounds; they never leave it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fedsca_pipeline.errors import ResumeError, WeightsError
from fedsca_pipeline.federation.site.privacy.ledger import PrivacyLedger
from fedsca_pipeline.files import read_label, read_sealed, set_aside, write_sealed

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Beside the newest: the server may resume from its last checkpoint but one, which needs the state before that.
_EARLIER_STATES = 2
# Part of a state on disk to its field.
_PARTS = {
    "private": "private",
    "base": "base",
    "residual": "residual",
    "moments": "moments",
    "personal": "personal",
    "kept": "rule_state",
}


@dataclass(frozen=True)
class SiteState:
    """A site after its local training of one round; tensors by name.

    ``private`` tensors stay at the site; ``base`` is what it received and trained from, as decoded; ``residual`` is the
    rounding error of its int8 updates so far; ``moments`` are AdamW's, with ``training.keep_optimizer``; ``personal``
    is the whole personal copy, if the strategy has one; ``rule_state`` is what the strategy's local rule stores.
    ``best`` is the round of the best model when the state was written, None if there was none.
    """

    round: int
    private: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    rule_state: Mapping[str, Tensor] = field(default_factory=dict)
    best: int | None = None

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors by part, named as on disk."""
        return {part: getattr(self, name) for part, name in _PARTS.items()}


@dataclass(frozen=True)
class Snapshot:
    """A whole model, shared and private tensors together, with its round and validation Dice in [0, 1], if known.

    ``best`` is the round of the best model when this one was written.
    """

    round: int
    dice: float | None
    tensors: Mapping[str, Tensor]
    best: int | None = None


class SiteStore:
    """One site's folder in a run: the states of the last three accepted rounds, its best and its last model.

    Every write is atomic, and a round starts from the state of the last round whose update the server has used. So
    local work that is done twice (after a crash, or because a message came twice) starts from the same state and ends
    in the same one, and a round whose update was lost, late or rejected leaves no trace.

    Every file carries its run, its site, its round and a checksum. A file that is damaged, or another's, is renamed to
    ``<name>.damaged`` and counts as missing.

    Args:
        folder: of this site in one run; it is named like the site.
        run: the run's fingerprint.
        ledger: of this site over all runs; only differential privacy needs one.
    """

    def __init__(self, folder: Path, run: str, ledger: PrivacyLedger | None = None) -> None:
        self.folder = folder
        self.run = run
        self.ledger = ledger

    @property
    def feature_cache(self) -> Path:
        """Scratch file of the run in progress; it is removed with all ``.partial`` files."""
        return self.folder / ".features.partial"

    def state_at(self, round_: int) -> SiteState | None:
        """Return the newest whole state of a round up to ``round_``, or None if there is none."""
        for path in reversed(self._states()):
            if _round_of(path) <= round_ and (state := self._state(path)) is not None:
                return state
        return None

    def save_state(self, state: SiteState, answered: int) -> None:
        """Store a state that was trained from that of round ``answered``, and delete those no message can ask for.

        Deleted are the states of rounds in between, whose updates were not accepted, and all but two of the earlier
        ones. A later round's state, left when the server resumes from an older checkpoint, stays until overwritten.
        """
        tensors = {f"{part}/{name}": t for part, named in state.tensors().items() for name, t in named.items()}
        best = self._best()
        label = self._label("state", round=state.round, best=best["round"] if best else None)
        write_sealed(self.folder / f"state_{state.round:05d}.safetensors", tensors, label)
        accepted = [path for path in self._states() if _round_of(path) <= answered]
        between = [path for path in self._states() if answered < _round_of(path) < state.round]
        for old in (*accepted[:-_EARLIER_STATES], *between):
            old.unlink()

    def snapshot(self, name: str) -> Snapshot | None:
        """Return the model stored as ``best`` or ``last``, or None if it is missing or damaged."""
        return self._whole(self._snapshot_path(name), _as_snapshot, **self._label(name))

    def save_snapshot(self, name: str, snapshot: Snapshot) -> None:
        """Store a model as ``best`` or ``last``."""
        best = self._best() if name == "last" else None
        label = self._label(name, round=snapshot.round, dice=snapshot.dice, best=best["round"] if best else None)
        write_sealed(self._snapshot_path(name), snapshot.tensors, label)

    def models(self) -> dict[str, Snapshot | None]:
        """Return the models ``best`` and ``last`` of a finished run; None for one that was never stored.

        Raises:
            ResumeError: the best model is not the one that was best when the last one was stored.
        """
        best, last = self.snapshot("best"), self.snapshot("last")
        if last and last.best is not None and (best is None or best.round < last.best):
            raise ResumeError(
                f"{self._snapshot_path('best')}: the best model, of round {last.best}, is missing or damaged. Restore "
                "it from a copy, or run 'kedro run --pipeline=federated_training' again"
            )
        return {"best": best, "last": last}

    def best_dice(self, before: int, known: int | None = None) -> float:
        """Return the best validation Dice of a round before ``before``; -1 if there is none.

        ``known`` is the round of the model that was the best: a warning says if it is gone. Only the label is read,
        since the checksum of a whole model would be computed in every round.
        """
        best = self._best()
        if known is not None and (best is None or best["round"] < known):
            logger.warning("%s: the best model, of round %d, is gone; later ones take its place", self.folder, known)
        return -1.0 if best is None or best["round"] >= before else float(best["dice"])

    def fault(self, round_: int, *, answered: int, last: int | None) -> str | None:
        """Return why this site cannot go on after a round, or None if it can, to the same bits as without a stop.

        Args:
            round_: the run goes on after this one.
            answered: round of the state that the site needs, 0 for none.
            last: round of the last model that the site must hold, None for none.
        """
        states = [state for state in map(self._state, self._states()) if state is not None]
        if answered and answered not in {state.round for state in states}:
            return f"{self.folder}: the state of round {answered} is missing or damaged"
        best, newest = self.snapshot("best"), self.snapshot("last")
        if last is not None and (newest is None or newest.round != last):
            return f"{self._snapshot_path('last')}: the model of round {last} is missing or damaged"
        chosen = max((model.best for model in (*states, newest) if model and model.best is not None), default=-1)
        # The model of a round is validated in the next one: from round_ on it becomes the best again by itself.
        if chosen >= round_ or (best.round if best else -1) >= chosen:
            return None
        return f"{self._snapshot_path('best')}: the best model, of round {chosen}, is missing or damaged"

    def prolong(self, shorter: SiteStore) -> None:
        """Store the states and the best model of the same site in a finished run that this one prolongs."""
        if (best := shorter.snapshot("best")) is not None:
            self.save_snapshot("best", best)
        for state in map(shorter._state, shorter._states()):
            if state is not None:
                self.save_state(state, answered=state.round - 1)

    def _state(self, path: Path) -> SiteState | None:
        """Return the state in a file, or None if it is damaged."""
        return self._whole(path, _as_state, **self._label("state", round=_round_of(path)))

    def _whole(self, path: Path, make: Callable[[dict[str, Any], dict[str, Tensor]], T], **expected: Any) -> T | None:
        """Return what ``make`` makes of a file's label and tensors; None if the file is missing or damaged."""
        if not path.is_file():
            return None
        try:
            return make(*read_sealed(path, **expected))
        except (WeightsError, KeyError) as error:
            said = f"{path}: {error} is unknown" if isinstance(error, KeyError) else error
            logger.warning("%s; it is now %s and counts as missing", said, set_aside(path).name)
            return None

    def _label(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "run": self.run, "site": self.folder.name, **more}

    def _best(self) -> dict[str, Any] | None:
        """Return the label of the best model, or None if there is none, or another's."""
        path, own = self._snapshot_path("best"), self._label("best")
        try:
            label = read_label(path) if path.is_file() else {}
        except WeightsError:
            return None
        return label if own.items() <= label.items() and {"round", "dice"} <= label.keys() else None

    def _snapshot_path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state_*.safetensors"))


def _as_state(label: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SiteState:
    """Return a state from its file; KeyError names a part of it that this version does not know."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in _PARTS.values()}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[_PARTS[part]][rest] = tensor
    return SiteState(label["round"], **parts, best=label["best"])


def _as_snapshot(label: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
    return Snapshot(label["round"], label["dice"], tensors, label["best"])


def _round_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
