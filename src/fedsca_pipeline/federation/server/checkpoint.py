"""The server's checkpoint: one safetensors file per round, so that a round is either complete on disk or absent.

Each round also has a record, a JSON file that is written before the checkpoint: a checkpoint of round r implies the
records of rounds 1 to r.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedsca_pipeline.errors import ResumeError, WeightsError
from fedsca_pipeline.federation.server.records import RoundRecord
from fedsca_pipeline.federation.strategies.server_step import ServerState
from fedsca_pipeline.files import read_header, read_json, read_tensors, write_bytes, write_tensors

_CHECKPOINTS = 2  # stored at a time


@dataclass(frozen=True)
class Checkpoint:
    """Everything the server needs to resume after ``round`` (0: before the first).

    ``aggregates`` [N, V] fp32 is what each site receives next; ``bases`` [N, V] fp32 is what each site holds, if
    ``has_base`` [N]; ``answered`` [N] int64 is the last round in which each site's update was accepted, 0 for none.
    There is no generator state: random streams are derived from seed, site and round
    (:func:`~fedsca_pipeline.compute.stream_seed`).
    """

    round: int
    state: ServerState
    aggregates: Tensor
    bases: Tensor
    has_base: Tensor
    answered: Tensor


class CheckpointFolder:
    """The checkpoints of one run's last two rounds, and the records of all rounds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint, record: RoundRecord) -> Checkpoint:
        """Write a round's record, then its checkpoint, each atomically; then delete all checkpoints but the last two.

        A record without its checkpoint, of a command that was killed in between, is ignored and overwritten.

        Returns the checkpoint that :meth:`latest` would return, its tensors memory-mapped: a run continues from exactly
        what a resumed run starts from, and the arrays of ``checkpoint`` can be reused.
        """
        tensors = {f"state/{name}": t for name, t in checkpoint.state.as_tensors().items()} | {
            "aggregates": checkpoint.aggregates,
            "bases": checkpoint.bases,
            "has_base": checkpoint.has_base,
            "answered": checkpoint.answered,
        }
        # Not in the checkpoint's header: it has a size limit, and would repeat all records in every round.
        write_bytes(self._record(record.round), json.dumps(record.as_json()).encode())
        path = self._checkpoint(checkpoint.round)
        write_tensors(path, tensors, {"checkpoint": json.dumps({"round": checkpoint.round})})
        for old in self._files()[:-_CHECKPOINTS]:
            old.unlink()
        return replace(_stored(path), round=checkpoint.round)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None if there is none.

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
                f"{files[-1]}: this checkpoint cannot be read. Delete it to resume from the previous round."
            ) from error
        return replace(stored, round=header["round"])

    def records(self, last: int) -> Iterator[RoundRecord]:
        """Yield the records of rounds 1 to ``last``, none for 0; records of later rounds are ignored.

        Raises:
            ResumeError: a record cannot be read.
        """
        for round_ in range(1, last + 1):
            path = self._record(round_)
            try:
                record = RoundRecord.from_json(read_json(path))
            except (OSError, ValueError, TypeError, KeyError) as error:
                cure = (
                    f"Delete {self._checkpoint(last)} to resume from the previous round."
                    if round_ == last
                    else "Restore a copy (07_model_output/rounds has one), or restart with --params=force=true."
                )
                raise ResumeError(f"{path}: the record of round {round_} cannot be read. {cure}") from error
            yield record

    def _checkpoint(self, round_: int) -> Path:
        return self.folder / f"round_{round_:05d}.safetensors"

    def _record(self, round_: int) -> Path:
        return self.folder / "records" / f"round_{round_:05d}.json"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round_*.safetensors"))


def _stored(path: Path) -> Checkpoint:
    """Return a checkpoint with a file's tensors, memory-mapped; its round is 0."""
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
