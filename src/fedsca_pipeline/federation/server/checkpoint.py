"""The server's checkpoint: one safetensors file per round, so that a round is either complete on disk or absent.

Each round also has a record, a JSON file that is written before the checkpoint: a checkpoint of round r implies the
records of rounds 1 to r.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsca_pipeline.errors import ResumeError, WeightsError
from fedsca_pipeline.federation.server.records import RoundRecord
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.strategies.server_step import ServerState
from fedsca_pipeline.files import (
    read_json,
    read_sealed,
    read_tensors,
    sealed,
    set_aside,
    unsealed,
    write_bytes,
    write_sealed,
)

logger = logging.getLogger(__name__)

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
    """The checkpoints of one run's last two rounds, and the records of all rounds.

    Every file carries its run, its round and a checksum.

    Args:
        folder: of the server in one run.
        run: the run's fingerprint.
        sites: folder of the sites' states, if the sites are on this machine.
    """

    def __init__(self, folder: Path, run: str, sites: Path | None = None) -> None:
        self.folder, self.run, self.sites = folder, run, sites

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
        self._write(record)
        path = self._checkpoint(checkpoint.round)
        write_sealed(path, tensors, {"run": self.run, "round": checkpoint.round})
        for old in self._files()[:-_CHECKPOINTS]:
            old.unlink()
        return _stored(checkpoint.round, read_tensors(path))

    def prolong(self, shorter: CheckpointFolder, rounds: int) -> None:
        """Store what a finished run of ``rounds`` rounds left, unless this run has begun or files there are damaged.

        Of the shorter run's last, final round nothing is stored: this run validates when it goes on.
        """
        if self._files() or self.sites is None or shorter.sites is None:
            return
        try:
            checkpoint = shorter._read(shorter._checkpoint(rounds))
            if faults := shorter._faults(checkpoint):
                raise ResumeError("; ".join(faults))
            records = list(shorter.records(rounds))
        except (WeightsError, ResumeError) as error:
            logger.warning("%s. The run of %d rounds cannot be prolonged; this one starts at round 1", error, rounds)
            return
        logger.info("%s: goes on after round %d of run %s", self.folder, rounds, shorter.run)
        for site in records[-1].sites:
            SiteStore(self.sites / site, self.run).prolong(SiteStore(shorter.sites / site, shorter.run))
        for record in records:
            self._write(record)
        # Last: without its checkpoint nothing else counts.
        self.save(checkpoint, records[-1])

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None if there is none.

        Raises:
            ResumeError: the newest file is damaged, or another run's.
        """
        files = self._files()
        if not files:
            return None
        try:
            return self._read(files[-1])
        except WeightsError as error:
            raise ResumeError(
                f"{error}. Run 'kedro run --pipeline=federated_training' again: it goes on from the round before, to "
                "the same models"
            ) from error

    def resume(self) -> Checkpoint | None:
        """Return the newest checkpoint that a run can go on from to the same bits; None: it starts at round 1.

        It can if the checkpoint, the records up to it and, on this machine, the sites' files are whole. A damaged
        checkpoint is renamed to ``<name>.damaged``. A round that is done again writes the same bits.

        Raises:
            ResumeError: files are damaged that the rounds since the last but one checkpoint do not write again.
        """
        files, found, damaged, checkpoint = self._files(), [], [], None
        for path in reversed(files):
            try:
                checkpoint = self._read(path)
                faults = self._faults(checkpoint)
            except WeightsError as error:
                damaged.append(path)
                faults = [str(error)]
            except ResumeError as error:
                faults = [str(error)]
            if not faults:
                break
            checkpoint = None
            found += faults
        if checkpoint is None and files and _round_of(files[0]) > 1:
            raise ResumeError(
                f"{'; '.join(found)}. Restore these files from a copy. Without one, delete {self.folder}: the same "
                "command then does all rounds again, which gives the same models"
            )
        if found:
            after = checkpoint.round if checkpoint else 0
            logger.warning("%s. The run goes on after round %d, to the same models", "; ".join(found), after)
        for path in damaged:
            set_aside(path)
        return checkpoint

    def records(self, last: int) -> Iterator[RoundRecord]:
        """Yield the records of rounds 1 to ``last``, none for 0; records of later rounds are ignored.

        Raises:
            ResumeError: a record is damaged, or another run's.
        """
        for round_ in range(1, last + 1):
            path = self._record(round_)
            try:
                content = unsealed(read_json(path))
                if (content.pop("run"), content["round"]) != (self.run, round_):
                    raise ValueError("it is of another run or round")
                record = RoundRecord.from_json(content)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise ResumeError(f"{path}: the record of round {round_} cannot be read ({error})") from error
            yield record

    def _write(self, record: RoundRecord) -> None:
        content = sealed({"run": self.run, **record.as_json()})
        write_bytes(self._record(record.round), json.dumps(content).encode())

    def _read(self, path: Path) -> Checkpoint:
        """Return the checkpoint in a file.

        Raises:
            WeightsError: it is damaged, or another run's or round's.
        """
        round_ = _round_of(path)
        _, tensors = read_sealed(path, run=self.run, round=round_)
        try:
            return _stored(round_, tensors)
        except KeyError as error:
            raise WeightsError(f"{path}: lacks {error}") from error

    def _faults(self, checkpoint: Checkpoint) -> list[str]:
        """Return why sites on this machine cannot go on from a checkpoint.

        Raises:
            ResumeError: a record up to it cannot be read.
        """
        *_, record = self.records(checkpoint.round)
        if self.sites is None:
            return []
        found = []
        for (site, entry), answered in zip(record.sites.items(), checkpoint.answered.tolist(), strict=True):
            last = checkpoint.round - 1 if record.final and entry.absent is None else None
            needed = 0 if record.final else answered
            fault = SiteStore(self.sites / site, self.run).fault(checkpoint.round, answered=needed, last=last)
            found += [f"{site}: {fault}"] if fault else []
        return found

    def _checkpoint(self, round_: int) -> Path:
        return self.folder / f"round_{round_:05d}.safetensors"

    def _record(self, round_: int) -> Path:
        return self.folder / "records" / f"round_{round_:05d}.json"

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("round_*.safetensors") if path.is_file())


def _round_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _stored(round_: int, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Return the checkpoint of a round with a file's tensors, memory-mapped."""
    state = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
    return Checkpoint(
        round=round_,
        state=ServerState.from_tensors(state),
        aggregates=tensors["aggregates"],
        bases=tensors["bases"],
        has_base=tensors["has_base"].to(torch.bool),
        answered=tensors["answered"],
    )
