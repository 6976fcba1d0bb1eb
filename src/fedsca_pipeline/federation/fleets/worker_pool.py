"""Processes that work on tasks: one that dies is replaced, one that raises says what, and none outlives this process.

Every worker has a pipe of its own: one that is killed, at whatever moment, can break no other's. (A queue that all
share stays locked when its holder dies, which is why this is no ``ProcessPoolExecutor`` beside a progress queue.)
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
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

from fedsca_pipeline.federation.fleets import forkserver

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Answer = TypeVar("Answer")

Report = Callable[[Any], None]
"""Tells the parent something that can be pickled, while a task is worked on."""

Work = Callable[[Task, Report], Answer]
"""Answers one task."""

Start = Callable[[Any, Any], AbstractContextManager[Work[Task, Answer]]]
"""Makes a worker of a process, out of its equipment and its place."""


@dataclass(frozen=True)
class Died:
    """The outcome of a task that two workers died of; the reason says how the second did."""

    reason: str


@dataclass(frozen=True)
class Raised:
    """The outcome of a task that ended in an error, which has the worker's traceback as a note."""

    error: Exception


class WorkerPool(Generic[Task, Answer]):
    """Worker processes, which start when this is entered and are killed when it is left, whatever they do then.

    They ignore Ctrl-C, log through this process, and end when it is killed. They may have no children.

    Args:
        start: function of a module, called once in every worker with ``equipment`` and its place; what it gives then
            answers one task after the other.
        equipment: picklable as an argument of a process, so that tensors may be in shared memory.
        places: one a worker, picklable: what is its own, such as its device.
        on_report: is told here of everything that work reports. What it raises, ``run`` raises.
        on_death: is told of the task that a worker was on, once that worker has ended, before the task is tried again.
    """

    def __init__(
        self,
        start: Start[Task, Answer],
        equipment: Any,
        places: Sequence[Any],
        *,
        on_report: Report = lambda _: None,
        on_death: Callable[[Task], None] = lambda _: None,
    ) -> None:
        # A worker's root logger lets through what this process would, and no more.
        self._start = (start, equipment, logger.getEffectiveLevel())
        self._places = places
        self._on_report = on_report
        self._on_death = on_death
        self._workers: list[_Worker[Task]] = []

    def __enter__(self) -> WorkerPool[Task, Answer]:
        forkserver.start()
        with ExitStack() as started:
            for place in self._places:
                self._workers.append(_Worker(*self._start, place))
                started.callback(self._workers[-1].end)
            started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer | Died | Raised]]:
        """Yield every task with its outcome, in the order in which they end.

        A worker that dies is replaced and its task tried once more, before any other. One run at a time; of one that is
        left before its end, workers that are still at a task are replaced by the next.

        Args:
            tasks: picklable, named by their ``str``; asked for the next one only when a worker is free, at the start of
                the run or after all outcomes so far were taken, so that it may depend on those.

        Raises:
            Exception: a worker could not start; or a task could not be pickled, an answer not unpickled.
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
                yield from self._hear(busy[pipe], again)

    def _hear(self, worker: _Worker[Task], again: deque[_Turn[Task]]) -> Iterator[tuple[Task, Answer | Died | Raised]]:
        """Take what a busy worker says next; yield its task's outcome if that was it."""
        turn = worker.turn
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
        self._workers[self._workers.index(worker)] = _Worker(*self._start, worker.place)


@dataclass(frozen=True)
class _Turn(Generic[Task]):
    """A task on its way to a worker, for the first or the second time."""

    task: Task
    attempt: int = 1


@dataclass(frozen=True)
class _Ready:
    """From a worker: it has started and waits for tasks."""


@dataclass(frozen=True)
class _Reported:
    """From a worker: what its work told ``Report``."""

    report: Any


@dataclass(frozen=True)
class _Answered:
    """From a worker: the answer to its task; it is free again."""

    answer: Any


@dataclass(frozen=True)
class _Failed:
    """From a worker: what its task raised, and the traceback, which is not pickled with it; it is free again."""

    error: Exception
    trace: str

    def noted(self, where: str) -> Exception:
        """Return the error with a note of where it was raised."""
        self.error.add_note(f"In {where}:\n{self.trace}")
        return self.error


@dataclass(frozen=True)
class _NotStarted:
    """From a worker, its last: what its start raised."""

    failed: _Failed


_Message = _Ready | _Reported | _Answered | _Failed | _NotStarted | logging.LogRecord


class _WorkerDied(Exception):  # noqa: N818 - what happened, and no error of this process
    """A worker's pipe ended; the message says how the worker did."""


class _Worker(Generic[Task]):
    """This process's side of one worker: it starts at once, and has a task or is free (``turn`` None)."""

    def __init__(self, start: Start[Task, Any], equipment: Any, log_level: int, place: Any) -> None:
        self.place = place
        self.turn: _Turn[Task] | None = None
        self._ready = False
        context = forkserver.context()
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, start, equipment, log_level, place), daemon=True)
        with forkserver.interrupts_blocked():
            self._process.start()
        theirs.close()

    def give(self, turn: _Turn[Task]) -> None:
        """Send a free worker its task; where it is still starting, as soon as it is ready."""
        self.turn = turn
        if self._ready:
            self._send()

    def receive(self) -> _Message:
        """Return what the worker says next.

        Raises:
            _WorkerDied: there will be no more.
        """
        try:
            pickled = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self._process.join()
            raise _WorkerDied(f"exit code {self._process.exitcode}") from error
        message = ForkingPickler.loads(pickled)
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
        pickled = ForkingPickler.dumps(self.turn.task)
        # One that has died meanwhile is noticed when it is listened to.
        with suppress(OSError):
            self.pipe.send_bytes(pickled)


class _Line:
    """The worker's end of its pipe, safe to send on from any of its threads.

    Where the pipe itself is broken, the parent is gone, and this process ends. It does so here, so that no such error
    can be taken for one of the work, which may have pipes of its own.
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

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(record)


def _serve(pipe: Connection, start: Start[Any, Any], equipment: Any, log_level: int, place: Any) -> None:
    """Be a worker: answer tasks until the parent ends this process, or is gone."""
    # Ctrl-C reaches the whole group; the parent, which gets it too, ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    line = _Line(pipe)
    # The message alone: level and name travel beside it, and the parent's handlers show them.
    logging.basicConfig(handlers=[_LogLine(line)], level=log_level, format="%(message)s", force=True)
    logging.captureWarnings(capture=True)
    with ExitStack() as stack:
        try:
            work = stack.enter_context(start(equipment, place))
        except Exception as error:
            line.send(_NotStarted(_failed(error)))
            return
        line.send(_Ready())
        while True:
            try:
                # Neither has a name here: between two tasks nothing of the last stays in memory.
                line.send(_Answered(work(line.receive(), lambda report: line.send(_Reported(report)))))
            except Exception as error:
                line.send(_failed(error))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _failed(error: Exception) -> _Failed:
    """Return an error that is being handled as one that survives the pipe."""
    try:
        found = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # a class may ask for more than its message when it is unpickled
        found = RuntimeError(f"{type(error).__name__}: {error}")
    return _Failed(found, "".join(traceback.format_exception(error)))
