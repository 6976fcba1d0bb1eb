"""The files that a site stores between rounds; they never leave it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedsca_pipeline.federation.site.privacy.ledger import PrivacyLedger
from fedsca_pipeline.files import read_header, read_tensors, write_tensors

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
    """

    round: int
    private: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    rule_state: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors by part, named as on disk."""
        return {part: getattr(self, name) for part, name in _PARTS.items()}


@dataclass(frozen=True)
class Snapshot:
    """A whole model, shared and private tensors together, with its round and validation Dice in [0, 1], if known."""

    round: int
    dice: float | None
    tensors: Mapping[str, Tensor]


class SiteStore:
    """One site's folder in a run: the states of the last three accepted rounds, its best and its last model.

    Every write is atomic, and a round starts from the state of the last round whose update the server has used. So
    local work that is done twice (after a crash, or because a message came twice) starts from the same state and ends
    in the same one, and a round whose update was lost, late or rejected leaves no trace.

    Args:
        folder: of this site in one run.
        ledger: of this site over all runs; only differential privacy needs one.
    """

    def __init__(self, folder: Path, ledger: PrivacyLedger | None = None) -> None:
        self.folder = folder
        self.ledger = ledger

    @property
    def feature_cache(self) -> Path:
        """Scratch file of the run in progress; it is removed with all ``.partial`` files."""
        return self.folder / ".features.partial"

    def state_at(self, round_: int) -> SiteState | None:
        """Return the newest state of a round up to ``round_``, or None if there is none."""
        earlier = [path for path in self._states() if _round_of(path) <= round_]
        if not earlier:
            return None
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in _PARTS.values()}
        for name, tensor in read_tensors(earlier[-1]).items():
            part, _, rest = name.partition("/")
            parts[_PARTS[part]][rest] = tensor
        return SiteState(_round_of(earlier[-1]), **parts)

    def save_state(self, state: SiteState, answered: int) -> None:
        """Store a state that was trained from that of round ``answered``, and delete those no message can ask for.

        Deleted are the states of rounds in between, whose updates were not accepted, and all but two of the earlier
        ones. A later round's state, left when the server resumes from an older checkpoint, stays until overwritten.
        """
        tensors = {f"{part}/{name}": t for part, named in state.tensors().items() for name, t in named.items()}
        write_tensors(self.folder / f"state_{state.round:05d}.safetensors", tensors)
        accepted = [path for path in self._states() if _round_of(path) <= answered]
        between = [path for path in self._states() if answered < _round_of(path) < state.round]
        for old in (*accepted[:-_EARLIER_STATES], *between):
            old.unlink()

    def snapshot(self, name: str) -> Snapshot | None:
        """Return the model stored as ``best`` or ``last``, or None."""
        path = self.folder / f"{name}.safetensors"
        return Snapshot(**read_header(path, "snapshot"), tensors=read_tensors(path)) if path.is_file() else None

    def save_snapshot(self, name: str, snapshot: Snapshot) -> None:
        """Store a model as ``best`` or ``last``."""
        header = {"snapshot": json.dumps({"round": snapshot.round, "dice": snapshot.dice})}
        write_tensors(self.folder / f"{name}.safetensors", snapshot.tensors, header)

    def best_dice(self, before: int) -> float:
        """Return the best validation Dice of a round before ``before``; -1 if there is none."""
        path = self.folder / "best.safetensors"
        header = read_header(path, "snapshot") if path.is_file() else None
        return float(header["dice"]) if header and header["round"] < before else -1.0

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state_*.safetensors"))


def _round_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
