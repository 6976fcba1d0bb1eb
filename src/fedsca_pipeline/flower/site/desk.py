"""The site's desk: answers what comes over Flower by way of the worker, and logs both."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from fedsca_pipeline.errors import (
    AuditError,
    MessageError,
)
from fedsca_pipeline.flower.audit.log import AuditLog, Direction
from fedsca_pipeline.flower.config import SiteConfig
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.messages.contents import answer_content, check_tensors, question_content
from fedsca_pipeline.flower.site.worker_process import WorkerLost, WorkerProcess

logger = logging.getLogger(__name__)


_UNKNOWN = "unknown"  # kind of a message that cannot be read as a task


_REMEMBERED = ("round", "finish")


_Frame = tuple[dict[str, Any], bytes]


_UNLOGGED = "its audit log cannot be written, so nothing leaves the site; its own log says more"
"""The one answer that leaves without a line, always in these words."""


@dataclass
class Desk:
    """Answers the shim's tasks, one at a time, through the worker; a round answered last is not worked out again.

    Whatever comes or leaves has its line in the audit log first.
    """

    config: SiteConfig
    worker: WorkerProcess
    log: AuditLog
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _last: tuple[tuple, tuple[dict[str, Any], bytes]] | None = None

    def serve(self, listener: socket.socket) -> None:
        """Take connections until the listener is closed."""
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attend, args=(line,), daemon=True).start()

    def answer(self, header: Mapping[str, Any], payload: bytes) -> _Frame:
        """Return the frame that answers a task; a round, or the finish, that comes twice in a row is worked on once.

        Raises:
            AuditError: the audit log cannot be written; nothing may be sent.
        """
        try:
            task = documents.read_task(header)
        except MessageError as error:
            content = {"run": None, "unreadable": str(error)}
            asked = self._note("in", _UNKNOWN, 0, payload, content)
            return self._refuse(_UNKNOWN, 0, asked, f"a task of an unknown form ({error})")
        question = question_content(task.kind, payload, self.config.resources.most_bytes)
        asked = self._note("in", task.kind, task.round, payload, question)
        if task.site != self.config.site:
            return self._refuse(task.kind, task.round, asked, f"this site is {self.config.site}, not {task.site}")
        said, answer = self._work(task, payload)
        if "failed" in said:
            return self._refuse(task.kind, task.round, asked, str(said["failed"]))
        try:
            content = answer_content(task.kind, answer, self.config.resources.most_bytes)
            check_tensors(content, question)
        except MessageError as error:
            logger.error("%s, round %d: the worker's answer may not leave: %s", task.kind, task.round, error)
            return self._refuse(task.kind, task.round, asked, "its answer was nothing that may leave the site")
        self._note("out", task.kind, task.round, answer, content, answer_to=asked)
        return {}, answer

    def _work(self, task: documents.Task, payload: bytes) -> _Frame:
        key = (task.kind, task.round, task.begun, sha256(payload).hexdigest())
        with self._one_at_a_time:
            if self._last is not None and self._last[0] == key:
                return self._last[1]
            seconds = min(task.seconds, self.config.resources.task_seconds)
            asked = task.model_dump(include={"kind", "round", "begun"})
            found = self.worker.ask(asked, payload, seconds)
            # Before a run, the data, or what lies in the work folder, may have changed since.
            self._last = (key, found) if task.kind in _REMEMBERED and "failed" not in found[0] else None
            if "failed" in found[0]:
                # Where the worker has ended, the next task need not wait for a new one's start.
                threading.Thread(target=self._replace_worker, daemon=True).start()
            return found

    def _replace_worker(self) -> None:
        with self._one_at_a_time, suppress(WorkerLost):
            self.worker.start()

    def _refuse(self, kind: str, round_: int, asked: int | None, reason: str) -> _Frame:
        # Flower carries no lone surrogates, which a file's name may hold.
        words = reason[: frames.LONGEST_REASON].encode(errors="replace")
        self._note("out", kind, round_, words, {"run": None, "refused": words.decode()}, answer_to=asked)
        return {"failed": words.decode()}, b""

    def _note(
        self,
        direction: Direction,
        kind: str,
        round_: int,
        sent: bytes,
        content: Mapping[str, Any],
        answer_to: int | None = None,
    ) -> int:
        return self.log.add(
            direction, site=self.config.site, kind=kind, round_=round_, sent=sent, content=content, answer_to=answer_to
        )

    def _attend(self, line: socket.socket) -> None:
        with line, suppress(OSError, EOFError):
            try:
                try:
                    answer = self.answer(*frames.receive(line, self.config.resources.most_bytes))
                except frames.FrameError as error:
                    answer = self._refuse(_UNKNOWN, 0, None, f"resources.max_message: {error}")
            except AuditError as error:
                logger.error("%s", error)
                answer = {"failed": _UNLOGGED}, b""
            frames.send(line, *answer)
