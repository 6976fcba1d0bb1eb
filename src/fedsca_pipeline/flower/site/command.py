"""The command of a hospital, ``fedsca-site site.yml``: checks the data, then runs worker, SuperNode and SuperExec.

The SuperExec starts a ClientApp for each message, which hands its task to this process through a unix socket.
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

from fedsca_pipeline.errors import ConfigError, FedscaError, UnavailableError, UnwritableAuditError, counted
from fedsca_pipeline.files import LockHeld, open_locked
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.audit.table import show_audit
from fedsca_pipeline.flower.config import SiteConfig, check_certificates, read_site_config
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import engine_folder
from fedsca_pipeline.flower.site.gateway import Gateway
from fedsca_pipeline.flower.site.supernode import STOP_SECONDS, FlowerProcesses
from fedsca_pipeline.flower.site.worker_process import WorkerLost, WorkerProcess, worker_command

logger = logging.getLogger(__name__)

_MAX_CLASSES = 254
_INTERRUPTED = 130


def check_data(config: SiteConfig) -> int:
    """Return the number of usable images of a site, after preparing all of them once at a small size.

    Settings that a run decides, such as classes and split, are checked when the coordinator sends them.

    Raises:
        DataError: files are broken, or there are too few; the message names them and the fix.
        UnavailableError: the data folder is missing, unreadable, or empty like an unused mount point.
    """
    from fedsca_pipeline.config import PreprocessingConfig, RunConfig
    from fedsca_pipeline.data.preprocessing.prepare import prepare_site

    if (reason := _unavailable(config.data)) is not None:
        raise UnavailableError(
            f"{config.data}: {reason}; mount it, or set data to the folder that holds images/ and masks/"
        )
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        (raw / config.site).symlink_to(config.data.resolve())
        preprocessing = PreprocessingConfig(classes=_MAX_CLASSES, image_size=32)
        prepared = prepare_site(raw, config.site, preprocessing, RunConfig().seed, scratch=Path(folder))
    return len(prepared.manifest)


def _unavailable(folder: Path) -> str | None:
    """Return why a data folder cannot be used now; None if it can."""
    try:
        if not folder.is_dir():
            return "there is no such folder"
        # An empty folder may be a mount point without its mount.
        return None if any(folder.iterdir()) else "the folder is empty"
    except OSError as error:
        return f"the folder cannot be read ({error.strerror}); give read access to the user that runs this"


def predict_images(config: SiteConfig, source: Path) -> None:
    """Segment the images of a file or folder with the model that this site took from its last run; nothing leaves.

    Raises:
        ConfigError: the site has no model yet, or there is no such file or folder.
        DataError: no image is there; or some could not be segmented, after all others were.
        WeightsError: the model is damaged.
    """
    from fedsca_pipeline.config import DecodeConfig, PredictConfig, RunConfig
    from fedsca_pipeline.flower.site.work_folder import WorkFolder
    from fedsca_pipeline.prediction.run import predict_folder

    folder = WorkFolder.of(config)
    if not (folder.models / config.site / "site_model.json").is_file():
        raise ConfigError(f"{config.site}: no model in {folder.models}; a run writes it when it ends")
    predict_folder(
        folder.models / config.site,
        folder.predicted / config.site,
        PredictConfig(source=str(source)),
        run=RunConfig(device=config.resources.device),
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        decode=DecodeConfig(),
        foundations=config.foundation_root,
    )


def run_site(config: SiteConfig, worker: Sequence[str], stopped: threading.Event) -> None:
    """Take part in the federation until ``stopped``. All child processes end with this one, even if it is killed.

    Args:
        config: settings of the site.
        worker: command of the worker, without the number of its socket.
        stopped: set by the caller to leave the federation.

    Raises:
        AuditError: the audit log is broken or cannot be written.
        ConfigError: the engine is missing, or the path of the work folder is too long.
        UnavailableError: the worker cannot start, or another command serves this site.
        OSError: the work folder cannot be written to.
    """
    home = config.work / "flower"
    try:
        engine_folder(config.engine)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    try:
        # Child processes inherit the lock. If an earlier command was killed, they end within this time.
        with (
            open_locked(home / "lock", 2 * STOP_SECONDS) as lock,
            AuditLog(config.audit) as log,
            _listening(home / "site.sock") as listener,
        ):
            gateway = Gateway(config, WorkerProcess(worker, config.resources, [lock.fileno()]), log)
            _take_part(gateway, listener, lock, stopped)
    except LockHeld as error:
        raise UnavailableError(
            f"work: another fedsca-site or a process that it started still runs in {config.work}; stop it, or give "
            "each site a separate work folder"
        ) from error


def _listening(path: Path) -> socket.socket:
    try:
        return frames.listen(path)
    except ValueError as error:
        raise ConfigError(f"work: {error}") from error


def _take_part(gateway: Gateway, listener: socket.socket, lock: TextIO, stopped: threading.Event) -> None:
    config, worker = gateway.config, gateway.worker
    address = Path(listener.getsockname())
    try:
        worker.start()
        threading.Thread(target=gateway.serve, args=(listener,), daemon=True).start()
        with FlowerProcesses(config, address, lock).running(stopped):
            logger.info("%s: ready, connecting to %s; Ctrl-C leaves the federation", config.site, config.coordinator)
            stopped.wait()
    except WorkerLost as lost:
        if not stopped.is_set():
            raise UnavailableError(f"{lost}; its log lines are above") from lost
    finally:
        stopped.set()
        worker.end()
        address.unlink(missing_ok=True)


@contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set during the block."""
    stopped = threading.Event()
    with _on_signals(lambda *_: stopped.set()):
        yield stopped


@contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fedsca-site`` and return its exit status.

    0: success. 75: a failure that may resolve itself, so that a restart can help. 78: the YAML file, the data or the
    audit log are refused. 130: interrupted during the check.
    """
    given = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if given.audit:
            is_log = given.file.suffix == ".jsonl"
            show_audit(given.file if is_log else read_site_config(given.file).audit, given.known)
            return 0
        config = read_site_config(given.file)
        if given.predict:
            predict_images(config, given.predict)
            return 0
        check_certificates(config.certificates)
        # The check of many images takes longer than systemd waits for a stop, and it can be interrupted at any point.
        with _on_signals(signal.default_int_handler):
            logger.info("%s: %s, none broken", config.site, counted(check_data(config), "image"))
            if not given.check:
                with _stopped_by_signal() as stopped:
                    run_site(config, worker_command(given.file), stopped)
    except KeyboardInterrupt:
        logger.info("stopped before the site joined")
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
    only.add_argument(
        "--predict",
        metavar="SOURCE",
        type=Path,
        help="segment an image, or a folder of them, with the site's own model",
    )
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
