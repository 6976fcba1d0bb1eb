"""The gateway of a site: hands each message from Flower to the worker, checks the answer, and logs both."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from fedsca_pipeline.errors import AuditError, MessageError
from fedsca_pipeline.flower.audit.log import AuditLog, Direction
from fedsca_pipeline.flower.config import SiteConfig
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.messages.contents import answer_content, check_tensors, request_content
from fedsca_pipeline.flower.site.worker_process import WorkerLost, WorkerProcess

logger = logging.getLogger(__name__)

# Kind of a message that cannot be read as a task.
_UNKNOWN = "unknown"

# Tasks whose last answer is stored. Before a run, the data or the work folder can change between two requests.
_CACHED = ("round", "finish")

# The only answer that leaves the site without a line in the audit log. Its text is fixed.
_LOG_FAILED = "its audit log cannot be written, so nothing leaves the site; its own log says more"

_Frame = tuple[dict[str, Any], bytes]


@dataclass
class Gateway:
    """Answers the tasks of the shim, one at a time, through the worker.

    Each message in or out is in the audit log before it is handled or sent. A round that is requested twice in a row is
    computed once.
    """

    config: SiteConfig
    worker: WorkerProcess
    log: AuditLog
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last: tuple[tuple[str, int, str, str], _Frame] | None = None

    def serve(self, listener: socket.socket) -> None:
        """Accept connections until the listener is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer_connection, args=(connection,), daemon=True).start()

    def answer(self, header: Mapping[str, Any], payload: bytes) -> _Frame:
        """Return the frame that answers a task.

        Raises:
            AuditError: the audit log cannot be written, so nothing may be sent.
        """
        try:
            task = documents.read_task(header)
        except MessageError as error:
            content = {"run": None, "unreadable": str(error)}
            line = self._log("in", _UNKNOWN, 0, payload, content)
            return self._refuse(_UNKNOWN, 0, line, f"a task of an unknown form ({error})")
        request = request_content(task.kind, payload, self.config.resources.max_message_bytes)
        line = self._log("in", task.kind, task.round, payload, request)
        if task.site != self.config.site:
            return self._refuse(task.kind, task.round, line, f"this site is {self.config.site}, not {task.site}")
        reply, answer = self._work(task, payload)
        if "failed" in reply:
            return self._refuse(task.kind, task.round, line, str(reply["failed"]))
        try:
            content = answer_content(task.kind, answer, self.config.resources.max_message_bytes)
            check_tensors(content, request)
        except MessageError as error:
            logger.error("%s, round %d: the answer of the worker may not leave: %s", task.kind, task.round, error)
            return self._refuse(task.kind, task.round, line, "its answer may not leave the site")
        self._log("out", task.kind, task.round, answer, content, answer_to=line)
        return {}, answer

    def _work(self, task: documents.Task, payload: bytes) -> _Frame:
        """Return the worker's answer to a task, or the stored one if the same task came last."""
        key = (task.kind, task.round, task.begun, sha256(payload).hexdigest())
        with self._lock:
            if self._last is not None and self._last[0] == key:
                return self._last[1]
            seconds = min(task.seconds, self.config.resources.task_seconds)
            request = task.model_dump(include={"kind", "round", "begun"})
            frame = self.worker.ask(request, payload, seconds)
            failed = "failed" in frame[0]
            self._last = (key, frame) if task.kind in _CACHED and not failed else None
            if failed:
                # If the worker has ended, the next task does not wait for a new one to start.
                threading.Thread(target=self._replace_worker, daemon=True).start()
            return frame

    def _replace_worker(self) -> None:
        with self._lock, suppress(WorkerLost):
            self.worker.start()

    def _refuse(self, kind: str, round_: int, line: int | None, reason: str) -> _Frame:
        # Flower cannot carry lone surrogates, which file names may contain.
        text = reason[: frames.MAX_REASON].encode(errors="replace")
        self._log("out", kind, round_, text, {"run": None, "refused": text.decode()}, answer_to=line)
        return {"failed": text.decode()}, b""

    def _log(
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

    def _answer_connection(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, EOFError):
            try:
                try:
                    answer = self.answer(*frames.receive(connection, self.config.resources.max_message_bytes))
                except frames.FrameError as error:
                    answer = self._refuse(_UNKNOWN, 0, None, f"resources.max_message: {error}")
            except AuditError as error:
                logger.error("%s", error)
                answer = {"failed": _LOG_FAILED}, b""
            frames.send(connection, *answer)
