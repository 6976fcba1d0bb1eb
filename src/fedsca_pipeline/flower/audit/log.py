"""Write and read the audit log: one line per message in or out, chained by hashes, written before a byte is sent.

Each line is a JSON object that ends in ``"previous"``, the hash of the line before (64 zeros in the first line), and
``"hash"``, the SHA-256 of the text of the line up to that key, closed with ``}``. A changed, removed, inserted or moved
line breaks the chain. Lines missing at the end are found by comparing with the hash of a later line.
"""

from __future__ import annotations

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

from fedsca_pipeline.errors import AuditError, UnwritableAuditError, counted
from fedsca_pipeline.files import sync_to_disk

logger = logging.getLogger(__name__)

Direction = Literal["in", "out", "none"]
"""Direction of a message, seen from the owner of the log. ``none``: a line about the log itself."""

NO_HASH = "0" * 64
"""``previous`` of the first line."""

TORN_LINE = "torn line"
"""Kind of the line that replaces a half-written one: ``bytes`` and ``sha256`` describe the removed bytes."""

_HASH_KEY, _END = ', "hash": "', '"}'
_HASH_BYTES = len(_HASH_KEY) + len(NO_HASH) + len(_END)


class Chain:
    """The end of a log: ``number`` complete lines of ``length`` bytes in total, the last with the hash ``last``."""

    def __init__(self) -> None:
        self.number, self.length, self.last = 0, 0, NO_HASH

    def next_line(self, record: Mapping[str, Any]) -> bytes:
        """Return the next line of the log for a record, with its line end."""
        body = json.dumps({"number": self.number + 1, **record, "previous": self.last}, allow_nan=False)
        return f"{body[:-1]}{_HASH_KEY}{_sha256(body.encode())}{_END}\n".encode()

    def advance(self, line: bytes) -> dict[str, Any]:
        """Check that a line, given with its line end, is the next one, and return its record.

        Raises:
            AuditError: the line is half-written, was changed, or does not follow the line before.
        """
        number = self.number + 1
        if not line.endswith(b"\n"):
            raise AuditError(
                f"line {number} is half-written ({counted(len(line), 'byte')}), as after a crash or on a full disk; "
                "its message was not sent. The command that writes this log replaces the line when it is restarted"
            )
        body = line[: -_HASH_BYTES - 1] + b"}"
        digest = _sha256(body)
        if line[-_HASH_BYTES - 1 : -1] != f"{_HASH_KEY}{digest}{_END}".encode():
            raise AuditError(f"line {number} was changed: its hash does not match")
        record = _parse_object(body)
        if (record.get("previous"), record.get("number")) != (self.last, number):
            raise AuditError(f"line {number} does not follow the line before: a line was removed, inserted or moved")
        self.number, self.length, self.last = number, self.length + len(line), digest
        return {**record, "hash": digest}


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the record of each line, checked against the line before. An empty file yields nothing.

    Raises:
        AuditError: a line is broken or half-written; the message names the first one.
        OSError: the file cannot be read.
    """
    chain = Chain()
    with path.open("rb") as file:
        for line in file:
            try:
                yield chain.advance(line)
            except AuditError as error:
                raise AuditError(f"{path}: {error}") from error


class AuditLog:
    """An open audit log. Only one process at a time can have it open.

    A half-written last line, left by a crash, is replaced with a line of the kind ``TORN_LINE``.

    Raises:
        AuditError: another command has the log open, the log cannot be written, or its chain is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            # Unbuffered, so that Python does not retry a failed write later.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._lock_and_check()
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
        """Write one line, flush it to the disk, and return its number.

        Args:
            direction: direction of the message.
            site: the site that sent the message or receives it.
            kind: kind of the message: ``prepare``, ``open``, ``round`` or ``finish``.
            round_: round of the message; 0 before the first.
            sent: bytes of the message; the log stores their number and their SHA-256.
            content: description of the message, in JSON values.
            answer_to: number of the line whose message this one answers.

        Raises:
            AuditError: the line was not written. The file is unchanged, and the message must not be sent.
        """
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "direction": direction,
            "site": site,
            "kind": kind,
            "round": round_,
            "answer_to": answer_to,
            "bytes": len(sent),
            "sha256": _sha256(sent),
            **content,
        }
        with self._lock:
            self._refuse_if_changed()
            line = self._chain.next_line(record)
            try:
                self._write(line)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._chain.length)
                raise self._unwritable(error) from error
            self._chain.advance(line)
            return self._chain.number

    def close(self) -> None:
        """Close the log, so that another process can open it."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock_and_check(self) -> None:
        from filelock import lock_descriptor

        if not lock_descriptor(self._file.fileno(), blocking=False):
            raise AuditError(f"{self._path}: another command has this log open; stop it first")
        self._chain, torn = Chain(), b""
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    torn = line
                    break
                self._advance(line)
        if torn:
            os.ftruncate(self._file.fileno(), self._chain.length)
            logger.warning("%s: removed a half-written last line of %s", self._path, counted(len(torn), "byte"))
            self.add("none", site="", kind=TORN_LINE, round_=0, sent=torn, content={})
        sync_to_disk(self._path.parent)

    def _advance(self, line: bytes) -> None:
        try:
            self._chain.advance(line)
        except AuditError as error:
            raise AuditError(
                f"{self._path}: {error}. A broken log is not continued: find out who changed it, then move it away; "
                "the next start creates a new one"
            ) from error

    def _refuse_if_changed(self) -> None:
        if self._file.closed:
            raise AuditError(f"{self._path}: the log is closed; nothing can be sent")
        opened = os.fstat(self._file.fileno())
        try:
            present = self._path.stat()
        except OSError as error:
            raise self._unwritable(error) from error
        if not os.path.samestat(opened, present) or opened.st_size != self._chain.length:
            raise AuditError(f"{self._path}: the log was changed, moved or replaced while in use; stop and investigate")

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def _unwritable(self, error: OSError) -> UnwritableAuditError:
        return UnwritableAuditError(
            f"{self._path}: the audit log cannot be written ({error.strerror or error}); free space or give this user "
            "write access. No message is sent without its line in the log"
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parse_object(text: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if the text is not a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
