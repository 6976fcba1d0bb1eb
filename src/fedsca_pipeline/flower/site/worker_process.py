"""Run the worker of a site as a process: start it when needed, end it when it is too slow, replace it when it dies."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsca_pipeline.flower.config import Resources
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.leash import LeashedProcess
from fedsca_pipeline.flower.site.memory_limit import describe_exit

logger = logging.getLogger(__name__)


class WorkerLost(Exception):  # noqa: N818 - an event
    """A worker ended, took too long or sent too much; the message says which, and the fix if one is known."""


class WorkerProcess:
    """The worker process of a site, one at a time. It ends with this process.

    Args:
        command: command of the worker; the number of its socket is appended.
        resources: resources of the site: ``max_message`` limits answers, ``memory`` is named if it was too small.
        inherited: file descriptors that the worker inherits together with their locks.
        start_seconds: seconds that a worker may take to start.
    """

    def __init__(
        self, command: Sequence[str], resources: Resources, inherited: Sequence[int] = (), start_seconds: float = 300.0
    ) -> None:
        self._command, self._resources, self._inherited = command, resources, inherited
        self._start_seconds = start_seconds
        self._process: LeashedProcess | None = None
        self._connection: socket.socket | None = None

    def start(self) -> tuple[LeashedProcess, socket.socket]:
        """Start a worker unless one runs, wait until it is ready, and return its process and the connection to it.

        Raises:
            WorkerLost: the worker ended, or is not ready in time.
        """
        if self._process is not None and self._connection is not None and self._process.poll() is None:
            return self._process, self._connection
        self.end()
        connection, theirs = socket.socketpair()
        self._connection = connection
        with theirs:
            self._process = process = LeashedProcess(
                [*self._command, str(theirs.fileno())],
                {**os.environ, "OMP_WAIT_POLICY": "passive"},
                stop_seconds=0.0,
                pass_fds=[theirs.fileno(), *self._inherited],
            )
        with self._reporting_loss(process, connection, self._start_seconds):
            frames.receive(connection, 0)
        return process, connection

    def ask(self, task: dict[str, Any], payload: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Return the answer of the worker, or ``failed`` with the reason if it ends or takes longer than ``seconds``.

        A worker that reports itself as ``spent`` is ended after its answer.
        """
        try:
            process, connection = self.start()
            with self._reporting_loss(process, connection, seconds):
                frames.send(connection, task, payload)
                header, answer = frames.receive(connection, self._resources.max_message_bytes)
        except WorkerLost as lost:
            logger.warning("%s, round %s: %s", task.get("kind"), task.get("round"), lost)
            self.end()
            return {"failed": str(lost)}, b""
        if header.pop("spent", False):
            self.end()
        return header, answer

    @contextmanager
    def _reporting_loss(self, process: LeashedProcess, connection: socket.socket, seconds: float) -> Iterator[None]:
        """Limit the block to ``seconds``, and raise ``WorkerLost`` with the reason if the worker fails in it."""
        connection.settimeout(seconds)
        try:
            yield
        except TimeoutError as error:
            raise WorkerLost(f"its worker took longer than {seconds:.0f} s and was ended") from error
        except frames.FrameError as error:
            raise WorkerLost(f"resources.max_message: the answer of its worker was refused ({error})") from error
        except (EOFError, OSError) as error:
            try:
                raise WorkerLost(describe_exit(process.wait(5), self._resources.memory)) from error
            except subprocess.TimeoutExpired:
                raise WorkerLost(f"its worker closed the connection ({error})") from error

    def end(self) -> None:
        """Kill the worker, if one runs."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.end()
        self._connection = self._process = None


def worker_command(file: Path) -> list[str]:
    """Return the command that starts the worker of the site with this YAML file."""
    return [sys.executable, "-m", "fedsca_pipeline.flower.site.worker", str(file)]
