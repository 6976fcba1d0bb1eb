"""The hospital's one command: ``fedsca-site site.yml``. It checks the data, then runs worker and SuperNode together.

It owns four processes: the site worker, the SuperNode, the SuperExec that starts a ClientApp for every message, and
those ClientApps, which hand their task to this process through a unix socket.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from fedsca_pipeline.errors import (
    ConfigError,
    FedscaError,
    UnavailableError,
    UnwritableAuditError,
)
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.audit.table import show_audit
from fedsca_pipeline.flower.config import SiteConfig, check_certificates, read_site_config
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import engine_folder
from fedsca_pipeline.flower.processes.lock import Held, locked
from fedsca_pipeline.flower.site.desk import Desk
from fedsca_pipeline.flower.site.engine_room import _STOP_SECONDS, Engine, _free_port
from fedsca_pipeline.flower.site.worker_process import WorkerLost, WorkerProcess, worker_command

logger = logging.getLogger(__name__)

_MOST_CLASSES = 254
_INTERRUPTED = 130


def check_data(config: SiteConfig) -> int:
    """Return how many usable images a site has, after preparing them once, small and for nobody.

    What only a run decides (the number of classes, the shares of the split) is checked when the coordinator asks.

    Raises:
        DataError: naming what is broken and its cure, or why there are too few.
        UnavailableError: the folder is not there, is empty, as a mount point is, or cannot be read.
    """
    from fedsca_pipeline.config import PreprocessingConfig, RunConfig
    from fedsca_pipeline.data.preprocessing.prepare import prepare_site

    if (reason := _away(config.data)) is not None:
        raise UnavailableError(
            f"{config.data}: {reason}; mount it, or name the one that holds images/ and masks/ as data"
        )
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        (raw / config.site).symlink_to(config.data.resolve())
        preprocessing = PreprocessingConfig(classes=_MOST_CLASSES, image_size=32)
        prepared = prepare_site(raw, config.site, preprocessing, RunConfig().seed, scratch=Path(folder))
    return len(prepared.manifest)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Be ``fedsca-site``; return its status.

    0; 75 for what may pass without anybody's doing, so that it is worth starting again; 78 where file, data or log are
    refused; 130 if ended in the check.
    """
    given = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if given.audit:
            is_log = given.file.suffix == ".jsonl"
            show_audit(given.file if is_log else read_site_config(given.file).audit, given.known)
            return 0
        config = read_site_config(given.file)
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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fedsca-site", description="Take part in a federation as one hospital.")
    parser.add_argument(
        "file", type=Path, help="a site's YAML file (example: deploy/site.yml); with --audit also an audit log (.jsonl)"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="check configuration and data, then stop")
    only.add_argument("--audit", action="store_true", help="check the audit log, show what came and left, then stop")
    parser.add_argument(
        "--known",
        metavar="HASH",
        action="append",
        default=[],
        help="with --audit: hash of a line that an earlier --audit showed; fail unless the log has it",
    )
    given = parser.parse_args(arguments)
    if given.known and not given.audit:
        parser.error("--known needs --audit")
    return given


if __name__ == "__main__":
    sys.exit(main())
