"""The site's worker as a process: started when needed, ended when it takes too long, replaced when it has died."""

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
from fedsca_pipeline.flower.processes.leash import Leashed
from fedsca_pipeline.flower.site.memory_limit import fate

logger = logging.getLogger(__name__)


class WorkerLost(Exception):  # noqa: N818 - what happened
    """A worker ended, took too long or answered too much; the message says which, and the cure if one is known."""


class WorkerProcess:
    """One worker at a time, which never outlives this process; whoever asks waits for its answer.

    Args:
        command: of the worker, without the number of its socket, which is appended.
        resources: of the site; ``max_message`` limits answers, ``memory`` is named where it was too little.
        held: numbers of open files that the worker inherits, for the sake of their locks.
        start_seconds: that a worker may take to load what it needs.
    """

    def __init__(
        self, command: Sequence[str], resources: Resources, held: Sequence[int] = (), start_seconds: float = 300.0
    ) -> None:
        self._command, self._resources, self._held = command, resources, held
        self._start_seconds = start_seconds
        self._process: Leashed | None = None
        self._line: socket.socket | None = None

    def start(self) -> None:
        """Start a worker, unless one is alive, and wait until it is ready.

        Raises:
            WorkerLost: it ended, or is not ready in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._line = ours
            self._process = Leashed(
                [*self._command, str(theirs.fileno())],
                {**os.environ, "OMP_WAIT_POLICY": "passive"},
                patience=0.0,
                pass_fds=[theirs.fileno(), *self._held],
            )
        with self._told(self._start_seconds):
            frames.receive(ours, 0)

    def ask(self, task: dict[str, Any], payload: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Return the worker's answer, or what became of it as ``failed``; the site is free again in any case.

        A worker that calls itself ``spent`` is ended after its answer.
        """
        try:
            self.start()
            with self._told(seconds):
                frames.send(self._line, task, payload)
                said, answer = frames.receive(self._line, self._resources.most_bytes)
        except WorkerLost as lost:
            logger.warning("%s, round %s: %s", task.get("kind"), task.get("round"), lost)
            self.end()
            return {"failed": str(lost)}, b""
        if said.pop("spent", False):
            self.end()
        return said, answer

    @contextmanager
    def _told(self, seconds: float) -> Iterator[None]:
        """Say of a worker that breaks off, in ``WorkerLost``, what became of it; it may take ``seconds``."""
        self._line.settimeout(seconds)
        try:
            yield
        except TimeoutError as error:
            raise WorkerLost(f"its worker took longer than {seconds:.0f} s and was ended") from error
        except frames.FrameError as error:
            raise WorkerLost(f"resources.max_message: its worker's answer was refused ({error})") from error
        except (EOFError, OSError) as error:
            try:
                raise WorkerLost(fate(self._process.wait(5), self._resources.memory)) from error
            except subprocess.TimeoutExpired:
                raise WorkerLost(f"its worker hung up ({error})") from error

    def end(self) -> None:
        """Kill the worker, if there is one."""
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.end()
        self._line = self._process = None


def worker_command(file: Path) -> list[str]:
    """Return the command of the worker of the site that a YAML file describes."""
    return [sys.executable, "-m", "fedsca_pipeline.flower.site.worker", str(file)]
