"""A site's Flower engine: its process, its guard and its restarts."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fedsca_pipeline.files import write_bytes
from fedsca_pipeline.flower.config import SiteConfig
from fedsca_pipeline.flower.processes.engine import SITE_SOCKET, engine_folder, environment
from fedsca_pipeline.flower.processes.leash import Leashed

logger = logging.getLogger(__name__)


_RESTART_SECONDS = 5.0


_STOP_SECONDS = 10.0


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
