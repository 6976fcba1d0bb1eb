"""The audit log: a line for every message that came or leaves, chained by hashes, on the disk before a byte is sent.

Each line is a JSON object that ends in ``"previous"``, the hash of the line before (64 zeros in the first), and
``"hash"``, the SHA-256 of its own text up to there, closed with ``}``. So a line that was changed, removed, inserted or
moved is found; lines cut off the end are found by whoever knows a later hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedsca_pipeline.errors import AuditError, UnwritableAuditError
from fedsca_pipeline.files import sync_to_disk

logger = logging.getLogger(__name__)

Direction = Literal["in", "out", "none"]
"""Of a message: seen from whose log it is; ``none``: the log's own line."""

NO_HASH = "0" * 64
"""What the first line holds for the hash of the one before."""

TORN_LINE = "torn line"
"""Kind of the line that stands for a half-written one: ``bytes`` and ``sha256`` are of what was removed."""

_SEAL, _END = ', "hash": "', '"}'
_SEAL_BYTES = len(_SEAL) + len(NO_HASH) + len(_END)


class Chain:
    """Where a log ends: ``number`` whole lines of ``length`` bytes, the last with the hash ``last``."""

    def __init__(self) -> None:
        self.number, self.length, self.last = 0, 0, NO_HASH

    def line(self, record: Mapping[str, Any]) -> bytes:
        """Return the line, with its end, that would be the next one."""
        body = json.dumps({"number": self.number + 1, **record, "previous": self.last}, allow_nan=False)
        return f"{body[:-1]}{_SEAL}{_hash(body.encode())}{_END}\n".encode()

    def follow(self, line: bytes) -> dict[str, Any]:
        """Go on by one line, given with its end, and return what it holds.

        Raises:
            AuditError: it is not what was written there.
        """
        number = self.number + 1
        if not line.endswith(b"\n"):
            raise AuditError(
                f"line {number} is half-written ({len(line)} bytes), which a crash or a full disk leaves; its message "
                "was not sent. The command that writes the log puts a line in its place when it is started again"
            )
        body = line[: -_SEAL_BYTES - 1] + b"}"
        own = _hash(body)
        if line[-_SEAL_BYTES - 1 : -1] != f"{_SEAL}{own}{_END}".encode():
            raise AuditError(f"line {number} is not as it was written: its hash is another")
        record = _object(body)
        if (record.get("previous"), record.get("number")) != (self.last, number):
            raise AuditError(f"line {number} does not follow the one before: a line was removed, inserted or moved")
        self.number, self.length, self.last = number, self.length + len(line), own
        return {**record, "hash": own}


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log, each checked against the one before; none for an empty file.

    Raises:
        AuditError: naming the first line that is broken or half-written.
        OSError: the file cannot be read.
    """
    chain = Chain()
    with path.open("rb") as file:
        for line in file:
            try:
                yield chain.follow(line)
            except AuditError as error:
                raise AuditError(f"{path}: {error}") from error


class AuditLog:
    """Appends to one file, which no other process may write to as long as this is open.

    A half-written last line, which a crash leaves, is taken out, and a line of the kind ``TORN_LINE`` says so.

    Raises:
        AuditError: another command has it open, it cannot be written to, or its chain is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._one_at_a_time = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            # Unbuffered: what could not be written must not be tried again behind our back.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._take_over()
        except BaseException:
            self._file.close()
            raise

    def add(
        self,
        direction: Direction,
        *,
        site: str,
        kind: str,
        round_: int,
        sent: bytes,
        content: Mapping[str, Any],
        answer_to: int | None = None,
    ) -> int:
        """Write one line, down to the disk, and return its number.

        Args:
            direction: of the message.
            site: that it is from or for.
            kind: of the message: ``prepare``, ``open``, ``round`` or ``finish``.
            round_: that it belongs to; 0 before the first.
            sent: the bytes themselves, of which length and SHA-256 are kept.
            content: what they hold, in JSON values.
            answer_to: number of the line whose message this one answers.

        Raises:
            AuditError: the line is not there; the file is as it was, and the message must not be sent.
        """
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "direction": direction,
            "site": site,
            "kind": kind,
            "round": round_,
            "answer_to": answer_to,
            "bytes": len(sent),
            "sha256": _hash(sent),
            **content,
        }
        with self._one_at_a_time:
            self._refuse_foreign_changes()
            line = self._chain.line(record)
            try:
                self._write(line)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._chain.length)
                raise self._unwritable(error) from error
            self._chain.follow(line)
            return self._chain.number

    def close(self) -> None:
        """Let another process have it."""
        with self._one_at_a_time:
            self._file.close()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_over(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AuditError(f"{self._path}: another command is writing it; stop that one first") from error
        self._chain, torn = Chain(), b""
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    torn = line
                    break
                self._follow(line)
        if torn:
            os.ftruncate(self._file.fileno(), self._chain.length)
            logger.warning("%s: a half-written last line of %d bytes was taken out", self._path, len(torn))
            self.add("none", site="", kind=TORN_LINE, round_=0, sent=torn, content={})
        sync_to_disk(self._path.parent)

    def _follow(self, line: bytes) -> None:
        try:
            self._chain.follow(line)
        except AuditError as error:
            raise AuditError(
                f"{self._path}: {error}. A broken log is not gone on with: find out who changed it, and move it "
                "elsewhere; the next start begins a new one"
            ) from error

    def _refuse_foreign_changes(self) -> None:
        if self._file.closed:
            raise AuditError(f"{self._path}: it is closed; nothing can be sent any more")
        mine = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except OSError as error:
            raise self._unwritable(error) from error
        if not os.path.samestat(mine, there) or mine.st_size != self._chain.length:
            raise AuditError(f"{self._path}: it was changed, moved or replaced while in use; stop, and look into it")

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def _unwritable(self, error: OSError) -> UnwritableAuditError:
        return UnwritableAuditError(
            f"{self._path}: the audit log cannot be written ({error.strerror or error}); make room, or let this user "
            "write there. Nothing is sent without its line"
        )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _object(text: bytes) -> dict[str, Any]:
    """Return a JSON object, an empty one for what is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
