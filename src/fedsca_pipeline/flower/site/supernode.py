"""Run the SuperNode and the SuperExec of a site: their commands, the guarded ClientApp, and restarts."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from fedsca_pipeline.files import write_bytes
from fedsca_pipeline.flower.config import SiteConfig
from fedsca_pipeline.flower.processes.engine import SITE_SOCKET, engine_folder, environment
from fedsca_pipeline.flower.processes.leash import LeashedProcess

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""Seconds that the Flower processes may take to end."""

_RESTART_SECONDS = 5.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class FlowerProcesses:
    """The Flower processes of a site: SuperNode and SuperExec.

    Args:
        config: settings of the site.
        socket: path at which the gateway listens for the shim.
        lock: open file whose lock the processes inherit.
        port: port on loopback of the SuperNode's runtime interface.
    """

    config: SiteConfig
    socket: Path
    lock: TextIO
    port: int = field(default_factory=_free_port)

    def commands(self, folder: Path) -> Sequence[list[str]]:
        """Return the commands of SuperNode and SuperExec, whose secret is in ``folder``."""
        secret, runtime = str(folder / "superexec.secret"), f"127.0.0.1:{self.port}"
        engine = engine_folder(self.config.engine)
        certificates = self.config.certificates
        return (
            [
                str(engine / "flower-supernode"), "--superlink", self.config.coordinator,
                "--root-certificates", str(certificates.authority),
                "--auth-supernode-private-key", str(certificates.key),
                "--isolation", "process", "--host", "127.0.0.1", "--port", str(self.port),
                "--superexec-auth-secret-file", secret,
            ],
            [
                str(engine / "flower-superexec"), "--runtime-api-address", runtime, "--insecure",
                "--superexec-auth-secret-file", secret,
            ],
        )  # fmt: skip

    @contextmanager
    def running(self, stopped: threading.Event) -> Iterator[None]:
        """Run the processes for the duration of the block, and restart each one that ends."""
        home = self.config.work / "flower"
        path = home / "bin"
        _write_client_app(path, engine_folder(self.config.engine))
        write_bytes(home / "superexec.secret", secrets.token_bytes(48), mode=0o600)
        env = environment(path, home, {SITE_SOCKET: str(self.socket)})
        threads = [
            threading.Thread(target=keep_running, args=(command, env, self.lock, stopped), daemon=True)
            for command in self.commands(home)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopped.set()
            for thread in threads:
                thread.join(2 * STOP_SECONDS)


def _write_client_app(folder: Path, engine: Path) -> None:
    """Write the guarded ``flwr-clientapp``, the only executable in the folder that is Flower's whole PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(
        folder / "flwr-clientapp",
        f"#!{engine / 'python'}\nfrom fedsca_pipeline.flower.site.guard import main\n\nmain()\n".encode(),
        mode=0o700,
    )


def keep_running(command: list[str], env: Mapping[str, str], lock: TextIO, stopped: threading.Event) -> None:
    """Run a command, and restart it whenever it ends, until ``stopped``."""
    name = Path(command[0]).name
    while not stopped.is_set():
        try:
            process = LeashedProcess(command, env, pass_fds=[lock.fileno()])
        except OSError as error:
            logger.warning("%s cannot be started: %s; trying again", name, error)
            stopped.wait(_RESTART_SECONDS)
            continue
        while process.poll() is None and not stopped.wait(0.2):
            pass
        status = process.end()
        if not stopped.is_set():
            logger.warning("%s ended with status %s; restarting", name, status)
            stopped.wait(_RESTART_SECONDS)
