"""``python -m`` commands that start at once: forked from a process that has imported what they import.

A command is a process of its own, as a new interpreter is: it has its folder, environment, streams, signals, limits
and exit status. It lacks only the seconds that imports take. A variable that Python or a library reads when it is
imported (``PYTHON...``, ``OMP_...``) has no effect.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import json
import math
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What a run, a report and a comparison import, by the modules that import the most.
_IMPORTED = (
    "kedro.framework.cli",
    "kedro.framework.cli.project",
    "kedro.framework.context",
    "kedro.framework.session",
    "kedro.runner",
    "kedro_datasets.json",
    "kedro_datasets.matplotlib",
    "kedro_datasets.pandas",
    "kedro_datasets.plotly",
    "kedro_datasets.text",
    "kedro_viz.integrations.kedro.hooks",
    "kedro_viz.launchers.cli.main",
    "fedsca_pipeline.comparison.grid",
    "fedsca_pipeline.comparison.report",
    "fedsca_pipeline.data.importers",
    "fedsca_pipeline.data_report.distance",
    "fedsca_pipeline.data_report.page",
    "fedsca_pipeline.evaluation.tables",
    "fedsca_pipeline.federation.export",
    "fedsca_pipeline.federation.server.rounds",
    "fedsca_pipeline.federation.setup",
    "fedsca_pipeline.model.foundation.build",
    "fedsca_pipeline.model.in_turn",
    "fedsca_pipeline.pipeline_registry",
    "matplotlib.pyplot",
    "mlflow.store.tracking.sqlalchemy_store",
    "plotly.express",
    "plotly.graph_objects",
    "rich.progress",
)


class Server:
    """The process that commands are forked from; it ends with this object, and commands that run go on."""

    def __init__(self, folder: Path) -> None:
        """Start it in a folder, whose ``conf/logging.yml`` Kedro reads when it is imported."""
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=folder,
                # Threads do not survive a fork.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(
        self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], largest_file: int | None = None
    ) -> Command:
        """Start ``python -m`` with these words in a process group of its own.

        ``largest_file``: the bytes that none of its files may outgrow.
        """
        pipes = [os.pipe() for _ in range(3)]
        request = {"words": list(words), "cwd": str(cwd), "env": dict(env), "largest_file": largest_file}
        socket.send_fds(self._ours, [json.dumps(request).encode()], [writing for _, writing in pipes])
        for _, writing in pipes:
            os.close(writing)
        return Command(*(reading for reading, _ in pipes))

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.wait()


class Command:
    """A started command, with the attributes and methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, stdout: int, stderr: int, status: int) -> None:
        self.stdout, self.stderr = os.fdopen(stdout), os.fdopen(stderr)
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, None while the command runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status."""
        if (code := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of both streams and of the command; return what it wrote to each."""
        written = {self.stdout: b"", self.stderr: b""}
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        with selectors.DefaultSelector() as selector:
            for stream in written:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                left = None if timeout is None else max(end - time.monotonic(), 0.0)
                if not (ready := selector.select(left)):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
                for key, _ in ready:
                    if not (piece := os.read(key.fd, 2**16)):
                        selector.unregister(key.fileobj)
                    written[key.fileobj] += piece  # type: ignore[index]  # one of the two streams
        self.wait(timeout)
        for stream in written:
            stream.close()
        stdout, stderr = (text.decode() for text in written.values())
        return stdout, stderr

    def _ended(self, timeout: float | None) -> int | None:
        with selectors.DefaultSelector() as selector:
            if self.returncode is None:
                selector.register(self._status, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = int(self._status.readline())
                    self._status.close()
        return self.returncode


def _serve(connection: socket.socket) -> list[str] | None:
    """Fork a command for each request. Return None at the end, and in a command the words of its line."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
        while _reaped(os.WNOHANG):
            pass
        if not message:
            while _reaped(0):
                pass
            return None
        if os.fork() == 0:
            connection.close()
            return _command(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _reaped(options: int) -> bool:
    try:
        return os.waitpid(-1, options)[0] != 0
    except ChildProcessError:
        return False


def _command(request: dict[str, Any], stdout: int, stderr: int, status: int) -> list[str]:
    """Become a command, and return its words; the process that waits for it does not return."""
    pid = os.fork()
    if pid:
        for descriptor in (stdout, stderr):
            os.close(descriptor)
        _, ended = os.waitpid(pid, 0)
        os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
        os._exit(0)
    os.setsid()
    # Who knows the number may send the group a signal, so there has to be one.
    os.write(status, f"{os.getpid()}\n".encode())
    os.close(status)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for descriptor in (stdout, stderr):
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # It depends on the environment, and may have been asked for already.
    tempfile.tempdir = None
    if (largest := request["largest_file"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    return request["words"]


def _leave(code: list[int]) -> None:
    """End a command at once: to tear an interpreter down touches, and so copies, all memory that commands share."""
    if not code:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if code[0] < 0:
        signal.signal(-code[0], signal.SIG_DFL)
        os.kill(os.getpid(), -code[0])
    os._exit(code[0])


if __name__ == "__main__":
    # The first to be registered runs last.
    code: list[int] = []
    atexit.register(_leave, code)
    # Started in the background, a test run ignores Ctrl-C and would hand that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in _IMPORTED:
        __import__(module)
    # Dynaconf asks for the stack, and of a frame whose file is no known module's, as runpy's is, Python goes through
    # all modules. So it knows them all, and runpy's.
    inspect.getmodule(inspect.currentframe(), "unknown")
    inspect.modulesbyfile["<frozen runpy>"] = "runpy"  # type: ignore[attr-defined]  # a plain dictionary, undocumented
    # Memory that the collector does not visit stays shared.
    gc.freeze()
    words = _serve(socket.socket(fileno=int(sys.argv[1])))
    if words:
        sys.argv, sys.path[0] = words, str(Path.cwd())
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code += [end.code or 0] if isinstance(end.code, int | None) else []
            raise
        except KeyboardInterrupt:
            code.append(-signal.SIGINT)
            raise
