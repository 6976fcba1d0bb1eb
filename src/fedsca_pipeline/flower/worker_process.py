"""The site's worker as a process: started when needed, ended when it takes too long, replaced when it has died."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedsca_pipeline.flower import frames

logger = logging.getLogger(__name__)


class WorkerProcess:
    """One worker at a time; whoever asks waits for its answer.

    Args:
        command: of the worker, without the number of its socket, which is appended.
        most: bytes that an answer may have.
        start_seconds: that a worker may take to load what it needs.
    """

    def __init__(self, command: list[str], most: int, start_seconds: float = 300.0) -> None:
        self._command, self._most, self._start_seconds = command, most, start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    @classmethod
    def of_site(cls, file: Path, most: int) -> WorkerProcess:
        """Return the worker of the site that a YAML file describes."""
        return cls([sys.executable, "-m", "fedsca_pipeline.flower.worker", str(file)], most)

    @property
    def pid(self) -> int | None:
        """Of the worker, if there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start a worker, unless one is alive, and wait until it is ready.

        Raises:
            EOFError, OSError: it ended, or is not ready in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._line = ours
            self._process = subprocess.Popen(  # noqa: S603 - the command is this package's own
                [*self._command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
            )
        ours.settimeout(self._start_seconds)
        frames.receive(ours, 0)

    def ask(self, task: dict[str, Any], payload: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Return the worker's answer, or what became of it as ``failed``; the site is free again in any case.

        A worker that calls itself ``spent`` is ended after its answer.
        """
        try:
            self.start()
            self._line.settimeout(seconds)
            frames.send(self._line, task, payload)
            said, answer = frames.receive(self._line, self._most)
        except TimeoutError:
            reason = f"its worker took longer than {seconds:.0f} s and was ended"
        except (EOFError, OSError, frames.FrameError) as error:
            reason = f"its worker died ({self._how(error)})"
        else:
            if said.pop("spent", False):
                self.end()
            return said, answer
        logger.warning("%s, round %s: %s", task.get("kind"), task.get("round"), reason)
        self.end()
        return {"failed": reason}, b""

    def end(self) -> None:
        """Kill the worker, if there is one."""
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._line = self._process = None

    def _how(self, error: Exception) -> str:
        if self._process is None:
            return str(error)
        try:
            return f"exit code {self._process.wait(5)}"
        except subprocess.TimeoutExpired:
            return str(error)
