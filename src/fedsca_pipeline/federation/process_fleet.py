"""Sites on this machine, several at once: one worker process each, one frozen foundation for all.

Every worker has a pipe of its own: one that is killed, at whatever moment, can break no other's. (A queue that all
share stays locked when its holder dies, which is why this is no ``ProcessPoolExecutor`` beside a progress queue.)
A worker is an in-process fleet, so that a site's work is the same bits in both.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType

import torch
from torch import Tensor

from fedsca_pipeline.adapters import fel
from fedsca_pipeline.config import FederationConfig, RunConfig
from fedsca_pipeline.federation import forkserver
from fedsca_pipeline.federation.devices import deterministic, worker_devices
from fedsca_pipeline.federation.fleet import Failure, InProcessFleet, LocalSites
from fedsca_pipeline.federation.fleet_kinds import available_cores
from fedsca_pipeline.federation.local import StepCallback
from fedsca_pipeline.federation.shared_model import share, with_values, without_values
from fedsca_pipeline.files import remove_partial_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ready:
    """From a worker: it has its model and waits for work."""


@dataclass(frozen=True)
class _Step:
    """From a worker: the arguments of a ``StepCallback``."""

    site: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class _Raised:
    """From a worker: what ended it, with its traceback as a note."""

    error: Exception


@dataclass(frozen=True)
class _Visit:
    """To a worker: one site's payload of one round."""

    round: int
    site: str
    payload: bytes
    attempt: int = 1


_Report = _Ready | _Step | _Raised | logging.LogRecord | bytes | Failure


@dataclass(frozen=True)
class _Equipment:
    """What every worker starts with.

    ``sites`` is the pickled ``LocalSites``, its model without values (0.1 MB), with ``inject_failures``; ``values`` are
    the model's, uint8 [bytes] in shared memory.
    """

    sites: bytes
    values: Tensor
    log_level: int


class _WorkerDied(Exception):  # noqa: N818 - what happened, and no error of this process
    """A worker's pipe ended; the message says how the worker did."""


def open_processes(config: FederationConfig, here: LocalSites, on_step: StepCallback) -> ProcessFleet:
    """Return the fleet ``processes``, whose workers start when it is entered.

    Raises:
        ConfigError: a device it asks for is not there, or there is not enough shared memory.
    """
    devices = worker_devices(here.device, config, threads=here.threads, cores=available_cores(), sites=len(here.data))
    return ProcessFleet(here, devices, config.inject_failures, on_step)


class ProcessFleet:
    """All sites on this machine, as many at once as there are workers, those with most training images first.

    A worker that dies is replaced and its site tried once more; where that worker dies, too, the site counts as absent.
    An error that is not the site's own is raised here, with a note that names the site. ``deadline`` and ``grace`` mean
    nothing: a worker answers or dies. Workers end when the context is left, and when this process is killed.

    Args:
        here: picklable data (``SiteData``); its model moves into shared memory, where all hold it together.
        devices: of each worker; on the CPU one ``cpu`` a worker.
        inject_failures: for tests; site to the rounds in which it fails.
        on_step: is told of every local step, of whichever site.
    """

    def __init__(
        self,
        here: LocalSites,
        devices: Sequence[torch.device],
        inject_failures: Mapping[str, Sequence[int]],
        on_step: StepCallback,
    ) -> None:
        self._folder = here.folder
        # Every site does as many local epochs, so the images are what makes one longer than another.
        self._images = {site: len(here.data[site].rows("train")) for site in sorted(here.data)}
        self._devices = devices
        self._on_step = on_step
        values = share(here.model)
        sites = ForkingPickler.dumps((replace(here, model=without_values(here.model)), dict(inject_failures)))
        self._equipment = _Equipment(bytes(sites), values, log_level=logger.getEffectiveLevel())
        self._workers: list[_Worker] = []

    def __enter__(self) -> ProcessFleet:
        forkserver.start()
        with ExitStack() as started:
            for device in self._devices:
                self._workers.append(_Worker(self._equipment, device))
                started.callback(self._workers[-1].end)
            started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()

    def sites(self) -> Sequence[str]:
        """Every site there is data of, sorted."""
        return tuple(self._images)

    def exchange(
        self, round_: int, payloads: Mapping[str, bytes], *, deadline: float | None, quorum: int, grace: float
    ) -> Mapping[str, bytes | Failure]:
        """Give every free worker the longest site that still waits, until all have answered."""
        longest_first = sorted(payloads, key=lambda site: (-self._images[site], site))
        waiting = deque(_Visit(round_, site, payloads[site]) for site in longest_first)
        answers: dict[str, bytes | Failure] = {}
        while len(answers) < len(payloads):
            for worker in self._workers:
                if worker.visit is None and waiting:
                    worker.give(waiting.popleft())
            for worker, visit in self._heard():
                try:
                    answer = self._take(worker.receive())
                except _WorkerDied as death:
                    self._replace(worker)
                    if visit.attempt == 1:
                        logger.warning(
                            "%s: its worker died (%s); it is tried once more in a new one", visit.site, death
                        )
                        waiting.appendleft(replace(visit, attempt=2))
                        continue
                    answer = Failure(f"its worker died twice ({death})")
                if answer is not None:
                    answers[visit.site] = answer
                    worker.visit = None
        return answers

    def _heard(self) -> list[tuple[_Worker, _Visit]]:
        """Wait for the workers that are on a visit; return those that have something to say."""
        visiting = {worker.pipe: (worker, worker.visit) for worker in self._workers if worker.visit is not None}
        return [visiting[pipe] for pipe in wait(list(visiting))]

    def _take(self, report: _Report) -> bytes | Failure | None:
        """Pass on what a worker reports; return a site's answer, None where it is none."""
        match report:
            case bytes() | Failure():
                return report
            case _Step():
                self._on_step(report.site, report.step, report.steps, report.loss)
            case logging.LogRecord() if (named := logging.getLogger(report.name)).isEnabledFor(report.levelno):
                named.handle(report)
            case _Raised():
                raise report.error
        return None

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        if worker.visit is not None:
            remove_partial_files(self._folder / worker.visit.site)
        self._workers[self._workers.index(worker)] = _Worker(self._equipment, worker.device)


class _Worker:
    """This process's side of one worker: it starts at once, and is on a visit or free (``visit`` None)."""

    def __init__(self, equipment: _Equipment, device: torch.device) -> None:
        self.device = device
        self.visit: _Visit | None = None
        self._ready = False
        context = forkserver.context()
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, equipment, device), daemon=True)
        with forkserver.interrupts_blocked():
            self._process.start()
        theirs.close()

    def give(self, visit: _Visit) -> None:
        """Send a free worker on a visit; where it is still starting, as soon as it is ready."""
        self.visit = visit
        if self._ready:
            self._send()

    def receive(self) -> _Report:
        """Return what the worker reports next.

        Raises:
            _WorkerDied: there will be no more.
        """
        try:
            report = self.pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise _WorkerDied(f"exit code {self._process.exitcode}") from error
        if isinstance(report, _Ready):
            self._ready = True
            self._send()
        return report

    def end(self) -> None:
        """Kill the process. Whatever it writes, it writes atomically."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _send(self) -> None:
        # One that has died meanwhile is noticed when it is listened to.
        with suppress(OSError):
            self.pipe.send(self.visit)


class _Line:
    """The worker's end of its pipe, safe to use from any of its threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, report: _Report) -> None:
        with self._lock:
            self._pipe.send(report)


class _LogLine(QueueHandler):
    """Sends log records to the parent, formatted, so that they can be pickled."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(record)


def _serve(pipe: Connection, equipment: _Equipment, device: torch.device) -> None:
    """Be a worker: answer visits until the parent ends this process, or is gone."""
    # Ctrl-C reaches the whole group; the parent, which gets it too, ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    line, visit = _Line(pipe), None
    logging.basicConfig(handlers=[_LogLine(line)], level=equipment.log_level, force=True)
    logging.captureWarnings(capture=True)
    try:
        here, inject_failures = _unpacked(equipment, device)
        with deterministic(RunConfig(device=device.type), here.threads):
            worker = here.worker(device)
            fleet = InProcessFleet(
                worker, here.data, here.folder, inject_failures, lambda *step: line.send(_Step(*step))
            )
            line.send(_Ready())
            while True:
                visit = pipe.recv()
                answers = fleet.exchange(visit.round, {visit.site: visit.payload}, deadline=None, quorum=1, grace=0.0)
                line.send(answers[visit.site])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:
        line.send(_Raised(_portable(error, f"{visit.site}, round {visit.round}" if visit else "a worker's start")))


def _unpacked(equipment: _Equipment, device: torch.device) -> tuple[LocalSites, Mapping[str, Sequence[int]]]:
    # PEFT must know its methods before their names can be read.
    fel.register()
    here, inject_failures = ForkingPickler.loads(equipment.sites)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = with_values(here.model, equipment.values, device, own=here.layout.shapes)
    return replace(here, model=model), inject_failures


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _portable(error: Exception, where: str) -> Exception:
    """Return an error that survives the pipe, with a note of where it came from."""
    note = f"In {where}:\n{traceback.format_exc()}"
    try:
        found = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # a class may ask for more than its message when it is unpickled
        found = RuntimeError(f"{type(error).__name__}: {error}")
    found.add_note(note)
    return found
