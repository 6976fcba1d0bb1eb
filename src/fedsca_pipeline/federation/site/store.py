"""What a site keeps on its own disk between rounds, and nobody else sees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedsca_pipeline.federation.site.privacy.ledger import Vault
from fedsca_pipeline.files import read_header, read_tensors, write_tensors

# Beside the newest: the server may go back to the checkpoint before its last, which needs the state before that.
_KEPT_EARLIER = 2


@dataclass(frozen=True)
class SiteState:
    """A site after its local training of one round; tensors by name.

    ``private`` stay at the site; ``base`` is what it was sent and trained from, as decoded; ``residual`` is what int8
    rounding has so far kept from the server; ``moments`` are AdamW's, where ``training.keep_optimizer`` asks for them;
    ``personal`` is the whole personal copy, where the strategy has one; ``kept`` is its local rule's memory.
    """

    round: int
    private: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    _PARTS = ("private", "base", "residual", "moments", "personal", "kept")

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what is kept, part by part."""
        return {part: getattr(self, part) for part in self._PARTS}


@dataclass(frozen=True)
class Snapshot:
    """A whole model, shared and private tensors together, with its round and validation Dice in [0, 1], if known."""

    round: int
    dice: float | None
    tensors: Mapping[str, Tensor]


class SiteStore:
    """One folder a site: the states of the last three rounds that count, its best and its last model.

    Every write is atomic, and a round starts from the state of the last one whose update the server has used. So local
    work which is done twice (after a crash, or a message that came twice) starts from the same state and ends in the
    same one, and of a round whose update was lost, came too late or was rejected nothing is left.

    Args:
        folder: of this site in one run.
        vault: of this site over all runs; only differential privacy needs one.
    """

    def __init__(self, folder: Path, vault: Vault | None = None) -> None:
        self.folder = folder
        self.vault = vault

    @property
    def feature_cache(self) -> Path:
        """Scratch file of the run in progress; by its name it goes with whatever else a run leaves half-done."""
        return self.folder / ".features.partial"

    def state_at(self, round_: int) -> SiteState | None:
        """Return the newest state of a round up to ``round_``, or None where there is none."""
        earlier = [path for path in self._states() if _round_of(path) <= round_]
        if not earlier:
            return None
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in SiteState._PARTS}
        for name, tensor in read_tensors(earlier[-1]).items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        return SiteState(_round_of(earlier[-1]), **parts)

    def save_state(self, state: SiteState, answered: int) -> None:
        """Store a state that was trained from that of round ``answered``; drop those no message can ask for any more.

        They are those of rounds in between, which do not count, and all but two of the earlier ones. One of a later
        round, of a run that the server has taken up from an older checkpoint, stays until it is written anew.
        """
        tensors = {f"{part}/{name}": t for part, named in state.tensors().items() for name, t in named.items()}
        write_tensors(self.folder / f"state_{state.round:05d}.safetensors", tensors)
        counted = [path for path in self._states() if _round_of(path) <= answered]
        between = [path for path in self._states() if answered < _round_of(path) < state.round]
        for old in (*counted[:-_KEPT_EARLIER], *between):
            old.unlink()

    def snapshot(self, name: str) -> Snapshot | None:
        """Return the model kept as ``best`` or ``last``, or None."""
        path = self.folder / f"{name}.safetensors"
        return Snapshot(**read_header(path, "snapshot"), tensors=read_tensors(path)) if path.is_file() else None

    def save_snapshot(self, name: str, snapshot: Snapshot) -> None:
        """Keep a model as ``best`` or ``last``."""
        header = {"snapshot": json.dumps({"round": snapshot.round, "dice": snapshot.dice})}
        write_tensors(self.folder / f"{name}.safetensors", snapshot.tensors, header)

    def best_dice(self, before: int) -> float:
        """Return the best validation Dice of a round before ``before``; -1 where there is none."""
        path = self.folder / "best.safetensors"
        header = read_header(path, "snapshot") if path.is_file() else None
        return header["dice"] if header and header["round"] < before else -1.0

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state_*.safetensors"))


def _round_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
