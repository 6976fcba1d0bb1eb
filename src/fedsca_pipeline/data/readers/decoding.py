"""Decoding in a child process. Files are untrusted, and native decoders crash, hang or fill the memory on hostile ones.

Only the child dies of such a file, which is then a broken sample like any other. The child starts with the first file,
decodes one file after the other, and ends with this process (``decoding_process``).
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np

from fedsca_pipeline.data.readers.common import COPY_AGAIN, BrokenSampleError, unreadable
from fedsca_pipeline.data.readers.volume import Volume, most_voxels

if TYPE_CHECKING:
    from fedsca_pipeline.config import DecodeConfig

P = ParamSpec("P")
R = TypeVar("R", np.ndarray, Volume)


# Decoders use one core; a pool of threads would only take address space, which is limited. An image's memory is used
# again for the next one: new pages from the system cost as much as the way between the processes.
_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
    }
)
# MiB beyond the image's own size, and seconds: the defaults of ``preprocessing.decode``.
_LIMITS: ContextVar[tuple[int, float]] = ContextVar("decode_limits", default=(1024, 60.0))


@contextmanager
def decode_limits(limits: DecodeConfig) -> Iterator[None]:
    """Apply ``limits``, in place of the default ones, to the files that a block decodes."""
    token = _LIMITS.set((limits.memory, limits.seconds))
    try:
        yield
    finally:
        _LIMITS.reset(token)


def in_child(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that calls ``function``, of a module of this folder, in the child process.

    Its first argument is a file or several, the others are JSON values, or a volume, of which only the grid is sent.

    Raises:
        BrokenSampleError: the function's own; or the child died, took too long or needed too much memory.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast("R", _child_of(os.getpid()).ask(_request(function, args, kwargs)))

    return call


def decode_ahead(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
    """Let the child begin with a call of a function of ``in_child``, which is made later with the same arguments.

    The child works while this process does something else. Calls are made in the order of these announcements; another
    call in between forgets those announced before it, which then cost their time twice.
    """
    # A file that is gone is told when it is its turn.
    with suppress(BrokenSampleError):
        _child_of(os.getpid()).begin(_request(function, args, kwargs))


def _request(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Request:
    files: Path | Sequence[Path] = args[0]
    memory, seconds = _LIMITS.get()
    try:
        size = sum(file.stat().st_size for file in ([files] if isinstance(files, Path) else files))
    except OSError as error:
        raise unreadable(error) from error
    sizes: list[int] = [math.prod(arg.shape) for arg in args if isinstance(arg, Volume)]
    content = {
        "function": [function.__module__, function.__name__],
        "args": [_to_json(arg) for arg in args],
        "kwargs": {name: _to_json(arg) for name, arg in kwargs.items()},
        "folder": os.getcwd(),  # noqa: PTH109 - JSON has no paths
        # No value takes more than eight bytes.
        "memory": memory * 2**20 + 8 * max([most_voxels(size), *sizes]),
        "seconds": seconds,
    }
    return _Request(json.dumps(content).encode() + b"\n", seconds)


@dataclass(frozen=True)
class _Request:
    line: bytes
    seconds: float


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Volume):
        return {
            "shape": value.shape,
            "affine": value.affine.tolist(),
            "frame_of_reference": value.frame_of_reference,
        }
    if isinstance(value, Mapping):
        return {"numbers": list(value.items())}
    return [_to_json(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


class _Child:
    """The process that decodes; after its death, the next file starts another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        # Requests in the order they were sent, and will be answered.
        self._sent: deque[_Request] = deque()

    def begin(self, request: _Request) -> None:
        """Let the child work on a request, whose answer is asked for later."""
        # If the child is dead, who asks for its answer finds out which file it died of.
        with self._lock:
            if not self._sent or self._running().poll() is None:
                with suppress(BrokenPipeError):
                    self._send(request)

    def ask(self, request: _Request) -> np.ndarray | Volume:
        """Return what the request's function returns."""
        with self._lock:
            try:
                answer = self._answer_to(request)
            except BaseException:
                # The rest of an answer must not be taken for the next one.
                self._stop()
                raise
        if isinstance(answer, BrokenSampleError):
            raise answer
        return answer

    def _answer_to(self, request: _Request) -> np.ndarray | Volume | BrokenSampleError:
        while True:
            try:
                # Only when every answer has been read, so that the two never wait for one another at full pipes.
                if not self._sent:
                    self._send(request)
                answer = _read_answer(self._running())
                first = self._sent.popleft()
            except (EOFError, BrokenPipeError):
                first = self._sent.popleft()
                answer = _death(self._running().wait(), first.seconds)
                self._sent.clear()
            if first == request:
                return answer

    def _send(self, request: _Request) -> None:
        if not self._sent and self._process is not None and self._process.poll() is not None:
            self._stop()
        requests: Any = self._running().stdin
        self._sent.append(request)
        requests.write(request.line)
        requests.flush()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {**os.environ, **_ENVIRONMENT}
            self._process = subprocess.Popen(  # noqa: S603 - Python itself
                [sys.executable, "-m", f"{__package__}.decoding_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Native decoders print there, and could name a patient.
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._process

    def _stop(self) -> None:
        self._sent.clear()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def _child_of(_process: int) -> _Child:
    """Return this process's child: one that was forked must not answer two processes."""
    return _Child()


def _read_answer(process: subprocess.Popen[bytes]) -> np.ndarray | Volume | BrokenSampleError:
    """Return the next answer of the child.

    Raises:
        EOFError: it died.
    """
    # A pipe; its declared type is None, or has no ``readinto``.
    answers: Any = process.stdout
    line = answers.readline()
    # The child may die within a line.
    if not line.endswith(b"\n"):
        raise EOFError
    answer = json.loads(line)
    if "broken" in answer:
        return BrokenSampleError(*answer["broken"])
    values = np.empty(answer["shape"], answer["dtype"])
    if answers.readinto(values.reshape(-1).view(np.uint8).data) < values.nbytes:
        raise EOFError
    values = values.T if answer["transposed"] else values
    if "affine" not in answer:
        return values
    return Volume(values, np.array(answer["affine"]), answer["frame_of_reference"], tuple(answer["alerts"]))


def _death(status: int, seconds: float) -> BrokenSampleError:
    """Return the error for a file that the child did not survive. ``status``: its exit status."""
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    if name in ("SIGALRM", "SIGXCPU"):
        return BrokenSampleError(
            f"takes more than {seconds:g} seconds to decode", "export it again, or raise preprocessing.decode.seconds"
        )
    return BrokenSampleError(f"crashes its decoder ({name})", COPY_AGAIN)
