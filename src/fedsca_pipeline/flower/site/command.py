"""The hospital's one command: ``fedsca-site site.yml``. It checks the data, then runs worker and SuperNode together.

It owns four processes: the site worker, the SuperNode, the SuperExec that starts a ClientApp for every message, and
those ClientApps, which hand their task to this process through a unix socket.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from fedsca_pipeline.errors import (
    AuditError,
    ConfigError,
    FedscaError,
    MessageError,
    UnavailableError,
    UnwritableAuditError,
)
from fedsca_pipeline.files import write_bytes
from fedsca_pipeline.flower.audit.log import AuditLog, Direction
from fedsca_pipeline.flower.audit.table import show_audit
from fedsca_pipeline.flower.config import SiteConfig, check_certificates, read_site_config
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.messages.contents import answer_content, check_tensors, question_content
from fedsca_pipeline.flower.processes.engine import SITE_SOCKET, engine_folder, environment
from fedsca_pipeline.flower.processes.leash import Leashed
from fedsca_pipeline.flower.processes.lock import Held, locked
from fedsca_pipeline.flower.site.worker_process import WorkerLost, WorkerProcess, worker_command

logger = logging.getLogger(__name__)

_MOST_CLASSES = 254
_INTERRUPTED = 130
_RESTART_SECONDS = 5.0
_STOP_SECONDS = 10.0
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


@dataclass
class Engine:
    """The site's Flower processes, kept alive together."""

    config: SiteConfig
    socket: Path
    port: int
    lock: TextIO

    def commands(self, folder: Path) -> Sequence[list[str]]:
        """Return the commands of SuperNode and SuperExec, whose secret is in ``folder``."""
        secret, runtime = str(folder / "superexec.secret"), f"127.0.0.1:{self.port}"
        found = engine_folder(self.config.engine)
        certificates = self.config.certificates
        return (
            [
                str(found / "flower-supernode"), "--superlink", self.config.coordinator,
                "--root-certificates", str(certificates.authority),
                "--auth-supernode-private-key", str(certificates.key),
                "--isolation", "process", "--host", "127.0.0.1", "--port", str(self.port),
                "--superexec-auth-secret-file", secret,
            ],
            [
                str(found / "flower-superexec"), "--runtime-api-address", runtime, "--insecure",
                "--superexec-auth-secret-file", secret,
            ],
        )  # fmt: skip

    @contextmanager
    def running(self, stopped: threading.Event) -> Iterator[None]:
        """Run the processes for the duration of the block; one that ends is started again."""
        home = self.config.work / "flower"
        folder = home / "bin"
        _write_guard(folder, engine_folder(self.config.engine))
        write_bytes(home / "superexec.secret", secrets.token_bytes(48), mode=0o600)
        surroundings = environment(folder, home, {SITE_SOCKET: str(self.socket)})
        keepers = [
            threading.Thread(target=_keep_alive, args=(command, surroundings, self.lock, stopped), daemon=True)
            for command in self.commands(home)
        ]
        for keeper in keepers:
            keeper.start()
        try:
            yield
        finally:
            stopped.set()
            for keeper in keepers:
                keeper.join(2 * _STOP_SECONDS)


def _write_guard(folder: Path, engine: Path) -> None:
    """Make the folder that is all of Flower's PATH: its one executable is the guarded ``flwr-clientapp``."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "flwr-clientapp"
    write_bytes(
        script,
        f"#!{engine / 'python'}\nfrom fedsca_pipeline.flower.site.guard import main\n\nmain()\n".encode(),
        mode=0o700,
    )


def _keep_alive(command: list[str], surroundings: Mapping[str, str], lock: TextIO, stopped: threading.Event) -> None:
    name = Path(command[0]).name
    while not stopped.is_set():
        try:
            process = Leashed(command, surroundings, pass_fds=[lock.fileno()])
        except OSError as error:
            logger.warning("%s cannot be started: %s; it is tried again", name, error)
            stopped.wait(_RESTART_SECONDS)
            continue
        while process.poll() is None and not stopped.wait(0.2):
            pass
        status = process.end()
        if not stopped.is_set():
            logger.warning("%s ended with status %s; it is started again", name, status)
            stopped.wait(_RESTART_SECONDS)


def check_data(config: SiteConfig) -> int:
    """Return how many usable images a site has, after preparing them once, small and for nobody.

    What only a run decides (the number of classes, the shares of the split) is checked when the coordinator asks.

    Raises:
        DataError: naming what is broken and its cure, or why there are too few.
        UnavailableError: the folder is not there, is empty, as a mount point is, or cannot be read.
    """
    from fedsca_pipeline.config import PreprocessingConfig, RunConfig
    from fedsca_pipeline.pipelines.preprocessing.nodes import prepare_for

    if (reason := _away(config.data)) is not None:
        raise UnavailableError(
            f"{config.data}: {reason}; mount it, or name the one that holds images/ and masks/ as data"
        )
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        (raw / config.site).symlink_to(config.data.resolve())
        preprocessing = PreprocessingConfig(classes=_MOST_CLASSES, image_size=32)
        prepare = prepare_for(config.site)
        manifest, _, _ = prepare(raw, Path(folder), Path(folder) / "private", {}, None, preprocessing, RunConfig())
    return len(manifest)


def _away(folder: Path) -> str | None:
    try:
        if not folder.is_dir():
            return "there is no such folder"
        # A mount point with nothing mounted is an empty one.
        return None if any(folder.iterdir()) else "it is empty"
    except OSError as error:
        return f"it cannot be read ({error.strerror}); let the user who runs this read it"


def run_site(config: SiteConfig, worker: Sequence[str], stopped: threading.Event) -> None:
    """Take part in the federation until ``stopped``; no process is left then, nor if this one is killed.

    ``worker`` is the command of a worker, without the number of its socket.

    Raises:
        AuditError: the audit log is broken or cannot be written.
        ConfigError: the engine is missing, or the work folder's path is too long.
        UnavailableError: the worker cannot start, or another command serves this site.
        OSError: the work folder cannot be written to.
    """
    home = config.work / "flower"
    try:
        engine_folder(config.engine)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    try:
        # All that this command starts inherits the lock; were it killed, they would end within that time.
        with (
            locked(home / "lock", 2 * _STOP_SECONDS) as lock,
            AuditLog(config.audit) as log,
            _listening(home / "site.sock") as listener,
        ):
            desk = Desk(config, WorkerProcess(worker, config.resources, [lock.fileno()]), log)
            _take_part(desk, listener, lock, stopped)
    except Held as error:
        raise UnavailableError(
            f"work: another fedsca-site, or what it has started, still runs in {config.work}; stop it, or give every "
            "site a work folder of its own"
        ) from error


def _listening(path: Path) -> socket.socket:
    try:
        return frames.listen(path)
    except ValueError as error:
        raise ConfigError(f"work: {error}") from error


def _take_part(desk: Desk, listener: socket.socket, lock: TextIO, stopped: threading.Event) -> None:
    config, worker = desk.config, desk.worker
    address = Path(listener.getsockname())
    try:
        worker.start()
        threading.Thread(target=desk.serve, args=(listener,), daemon=True).start()
        with Engine(config, address, _free_port(), lock).running(stopped):
            logger.info("%s: ready, connecting to %s; Ctrl-C leaves the federation", config.site, config.coordinator)
            stopped.wait()
    except WorkerLost as lost:
        if not stopped.is_set():
            raise UnavailableError(f"{lost}; what it said is above") from lost
    finally:
        stopped.set()
        worker.end()
        address.unlink(missing_ok=True)


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Yield what SIGINT and SIGTERM set for as long as the block lasts."""
    stopped = threading.Event()
    with _on_signals(lambda *_: stopped.set()):
        yield stopped


@contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Be ``fedsca-site``; return its status.

    0; 75 for what may pass without anybody's doing, so that it is worth starting again; 78 where file, data or log are
    refused; 130 if ended in the check.
    """
    parser = argparse.ArgumentParser(prog="fedsca-site", description="Take part in a federation as one hospital.")
    parser.add_argument("file", type=Path, help="the site's YAML file; deploy/site.yml is an example")
    parser.add_argument("--check", action="store_true", help="check configuration and data, then stop")
    parser.add_argument("--audit", action="store_true", help="check the audit log, show what came and left, then stop")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = read_site_config(given.file)
        if given.audit:
            show_audit(config.audit)
            return 0
        check_certificates(config.certificates)
        # A check of many images takes longer than systemd waits, and holds nothing that would have to end in order.
        with _on_signals(signal.default_int_handler):
            logger.info("%s: %d images, none broken", config.site, check_data(config))
            if not given.check:
                with _told_to_stop() as stopped:
                    run_site(config, worker_command(given.file), stopped)
    except KeyboardInterrupt:
        logger.info("stopped before the site had joined")
        return _INTERRUPTED
    except (UnavailableError, UnwritableAuditError, OSError) as error:
        logger.error("Error: %s", error)
        return os.EX_TEMPFAIL
    except FedscaError as error:
        logger.error("Error: %s", error)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
