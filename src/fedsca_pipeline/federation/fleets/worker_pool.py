"""Processes that work on tasks: a worker that dies is replaced, one that raises reports it, none outlives this process.

Every worker has its own pipe, so that a worker that is killed, at whatever moment, breaks no other's. A shared queue
stays locked if its holder dies, which is why this is not a ``ProcessPoolExecutor`` with a queue for progress.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

from fedsca_pipeline.federation.fleets import forkserver

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Answer = TypeVar("Answer")

Report = Callable[[Any], None]
"""Sends a picklable value to the parent while a task is worked on."""

Work = Callable[[Task, Report], Answer]
"""Answers one task."""

Start = Callable[[Any, Any], AbstractContextManager[Work[Task, Answer]]]
"""Makes a worker of a process, from the equipment of all workers and this worker's own settings."""


@dataclass(frozen=True)
class Died:
    """The outcome of a task whose two workers died; the reason is how the second one ended."""

    reason: str


@dataclass(frozen=True)
class Raised:
    """The outcome of a task that raised an error; the worker's traceback is a note of the error."""

    error: Exception


class WorkerPool(Generic[Task, Answer]):
    """Worker processes: they start when the context is entered, and are killed, even at work, when it is left.

    Workers ignore Ctrl-C, log through this process, and end when it is killed. They cannot have child processes.

    Args:
        start: a module's function, called once in every worker with ``equipment`` and the worker's own settings; the
            function in its context then answers one task after the other.
        equipment: picklable as an argument of a process, so that tensors can be in shared memory.
        settings: one entry per worker, picklable, such as the worker's device.
        on_report: called in this process with everything that work reports; ``run`` raises what it raises.
        on_death: called with a dead worker's task, before the task is tried again.
    """

    def __init__(
        self,
        start: Start[Task, Answer],
        equipment: Any,
        settings: Sequence[Any],
        *,
        on_report: Report = lambda _: None,
        on_death: Callable[[Task], None] = lambda _: None,
    ) -> None:
        # A worker's root logger passes on exactly what this process logs.
        self._start = (start, equipment, logger.getEffectiveLevel())
        self._settings = settings
        self._on_report = on_report
        self._on_death = on_death
        self._workers: list[_Worker[Task]] = []

    def __enter__(self) -> WorkerPool[Task, Answer]:
        forkserver.start()
        with ExitStack() as started:
            for own in self._settings:
                self._workers.append(_Worker(*self._start, own))
                started.callback(self._workers[-1].end)
            started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer | Died | Raised]]:
        """Yield every task with its outcome, in the order in which tasks end.

        A worker that dies is replaced and its task tried once more, before any other. Only one run is active at a time:
        if an earlier one was left before its end, the workers that are still busy with it are replaced first.

        Args:
            tasks: picklable, named by their ``str``. The next one is requested only when a worker is free and all
                outcomes so far have been yielded, so that it can depend on them.

        Raises:
            Exception: a worker could not start, a task could not be pickled, or an answer could not be unpickled.
        """
        for worker in [worker for worker in self._workers if worker.turn is not None]:
            self._replace(worker)
        again: deque[_Turn[Task]] = deque()
        fresh = map(_Turn, tasks)
        while True:
            for worker in self._workers:
                if worker.turn is None:
                    if (turn := again.popleft() if again else next(fresh, None)) is None:
                        break
                    worker.give(turn)
            busy = {worker.pipe: worker for worker in self._workers if worker.turn is not None}
            if not busy:
                return
            for pipe in wait(list(busy)):
                # wait returns the pipes it was given; its stub allows sockets and handles too.
                worker = busy[pipe]  # type: ignore[index]
                if worker.turn is not None:
                    yield from self._receive(worker, worker.turn, again)

    def _receive(
        self, worker: _Worker[Task], turn: _Turn[Task], again: deque[_Turn[Task]]
    ) -> Iterator[tuple[Task, Answer | Died | Raised]]:
        """Receive a busy worker's next message; yield its task's outcome, if the message is the outcome."""
        try:
            message = worker.receive()
        except _WorkerDied as death:
            self._replace(worker)
            if turn.attempt == 1:
                logger.warning("%s: its worker died (%s); it is tried once more in a new one", turn.task, death)
                again.appendleft(replace(turn, attempt=2))
            else:
                yield turn.task, Died(f"its worker died twice ({death})")
            return
        match message:
            case _Answered():
                worker.turn = None
                yield turn.task, message.answer
            case _Failed():
                worker.turn = None
                yield turn.task, Raised(message.noted(str(turn.task)))
            case _NotStarted():
                raise message.failed.noted("a worker's start")
            case _Reported():
                self._on_report(message.report)
            case logging.LogRecord() if (named := logging.getLogger(message.name)).isEnabledFor(message.levelno):
                named.handle(message)

    def _replace(self, worker: _Worker[Task]) -> None:
        worker.end()
        if worker.turn is not None:
            self._on_death(worker.turn.task)
        self._workers[self._workers.index(worker)] = _Worker(*self._start, worker.settings)


@dataclass(frozen=True)
class _Turn(Generic[Task]):
    """A task at a worker, in its first or second attempt."""

    task: Task
    attempt: int = 1


@dataclass(frozen=True)
class _Ready:
    """From a worker: it has started and waits for tasks."""


@dataclass(frozen=True)
class _Reported:
    """From a worker: a value that its work reported."""

    report: Any


@dataclass(frozen=True)
class _Answered:
    """From a worker: the answer to its task; the worker is free again."""

    answer: Any


@dataclass(frozen=True)
class _Failed:
    """From a worker: what its task raised, and the traceback, which pickle drops; the worker is free again."""

    error: Exception
    trace: str

    def noted(self, where: str) -> Exception:
        """Return the error with a note of where it was raised."""
        self.error.add_note(f"In {where}:\n{self.trace}")
        return self.error


@dataclass(frozen=True)
class _NotStarted:
    """From a worker, its last message: what its start raised."""

    failed: _Failed


_Message = _Ready | _Reported | _Answered | _Failed | _NotStarted | logging.LogRecord


class _WorkerDied(Exception):  # noqa: N818 - an event, not an error of this process
    """A worker's pipe ended; the message says how the worker ended."""


class _Worker(Generic[Task]):
    """This process's side of one worker, which starts at once; it is free if ``turn`` is None."""

    def __init__(self, start: Start[Task, Any], equipment: Any, log_level: int, settings: Any) -> None:
        self.settings = settings
        self.turn: _Turn[Task] | None = None
        self._ready = False
        context = forkserver.context()
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, start, equipment, log_level, settings)
        # The stub of BaseContext has no Process; every concrete context has one.
        self._process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)  # type: ignore[attr-defined]
        with forkserver.interrupts_blocked():
            self._process.start()
        theirs.close()

    def give(self, turn: _Turn[Task]) -> None:
        """Send a free worker its task, or, if it is still starting, wait until it is ready."""
        self.turn = turn
        if self._ready:
            self._send()

    def receive(self) -> _Message:
        """Return the worker's next message.

        Raises:
            _WorkerDied: the worker has ended.
        """
        try:
            pickled = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self._process.join()
            raise _WorkerDied(f"exit code {self._process.exitcode}") from error
        message: _Message = ForkingPickler.loads(pickled)
        if isinstance(message, _Ready):
            self._ready = True
            self._send()
        return message

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _send(self) -> None:
        if self.turn is None:
            return
        pickled = ForkingPickler.dumps(self.turn.task)
        # If the worker has died, the next receive finds out.
        with suppress(OSError):
            self.pipe.send_bytes(pickled)


class _Line:
    """The worker's end of its pipe; any of its threads can send.

    If the pipe breaks, the parent has ended, and this process ends at once: an error would look like one of the work,
    which can have pipes of its own.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: _Message) -> None:
        pickled = ForkingPickler.dumps(message)
        try:
            with self._lock:
                self._pipe.send_bytes(pickled)
        except OSError:
            os._exit(1)

    def receive(self) -> Any:
        try:
            pickled = self._pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        return ForkingPickler.loads(pickled)


class _LogLine(QueueHandler):
    """Sends log records to the parent, formatted, so that they can be pickled."""

    def __init__(self, line: _Line) -> None:
        # The stub asks for a queue; enqueue() below sends over the pipe instead.
        super().__init__(queue=None)  # type: ignore[arg-type]
        self._line = line

    def enqueue(self, record: logging.LogRecord) -> None:
        self._line.send(record)


def _serve(pipe: Connection, start: Start[Any, Any], equipment: Any, log_level: int, settings: Any) -> None:
    """Answer tasks until the parent ends this process, or ends itself: the main function of a worker."""
    # Ctrl-C reaches the whole process group; the parent gets it too, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    line = _Line(pipe)
    # The message alone: the record holds level and name, and the parent's handlers show them.
    logging.basicConfig(handlers=[_LogLine(line)], level=log_level, format="%(message)s", force=True)
    logging.captureWarnings(capture=True)
    with ExitStack() as stack:
        try:
            work = stack.enter_context(start(equipment, settings))
        except Exception as error:
            line.send(_NotStarted(_failed(error)))
            return
        line.send(_Ready())
        while True:
            try:
                # Without variables, so that between two tasks nothing of the last one stays in memory.
                line.send(_Answered(work(line.receive(), lambda report: line.send(_Reported(report)))))
            except Exception as error:
                line.send(_failed(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _failed(error: Exception) -> _Failed:
    """Return an error that is being handled in a form that can be pickled."""
    try:
        picklable = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # some classes need more than a message to be unpickled
        picklable = RuntimeError(f"{type(error).__name__}: {error}")
    return _Failed(picklable, "".join(traceback.format_exception(error)))
