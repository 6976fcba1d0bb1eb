"""``make flower-demo``: a whole deployed federation on one machine, every part a process of its own, on loopback.

One SuperLink, its SuperExec, nginx in front of them, three hospitals, and ``kedro run`` as their coordinator; with TLS,
node keys and files of ``deploy/``. The demonstration sites are the hospitals' data.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.flower.engine import engine_folder, environment
from fedsca_pipeline.sites.demo import write_demo_sites

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[3]
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0


@dataclass
class LocalFederation:
    """The processes of a federation on this machine, by name; each logs to ``<folder>/logs/<name>.log``.

    Args:
        folder: for certificates, keys, state and work folders; short, since unix sockets lie in it.
        engine: bin folder of the environment that flwr is in.
        superlink_port, public_port: on loopback; what the sites reach is the public one, nginx's.
    """

    folder: Path
    engine: Path
    superlink_port: int = 8000
    public_port: int = 8443
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def certificates(self) -> Path:
        """Folder of certificates and keys."""
        return self.folder / "certificates"

    @property
    def home(self) -> Path:
        """The coordinator's ``flower.home``."""
        return self.folder / "coordinator"

    def found(self, sites: Sequence[str]) -> None:
        """Make authority, certificates and keys."""
        script = PROJECT / "deploy" / "make_authority.sh"
        _run(["bash", str(script), str(self.certificates), "localhost", *sites])
        conf = (PROJECT / "deploy" / "nginx.conf").read_text()
        conf = conf.replace("127.0.0.1:8000", f"127.0.0.1:{self.superlink_port}")
        conf = conf.replace("127.0.0.1:8443", f"127.0.0.1:{self.public_port}")
        (self.certificates / "nginx.conf").write_text(conf)

    def start_superlink(self) -> None:
        """Start the SuperLink and its SuperExec, and wait until it listens."""
        own, secret = self.certificates, str(self.certificates / "superexec.secret")
        surroundings = environment(self.engine, self.home)
        self.start(
            "superlink",
            [
                str(self.engine / "flower-superlink"),
                "--ssl-ca-certfile", str(own / "ca.crt"), "--ssl-certfile", str(own / "server.pem"),
                "--ssl-keyfile", str(own / "server.key"), "--enable-supernode-auth",
                "--disable-runtime-dependency-installation", "--database", str(self.folder / "state.db"),
                "--host", "127.0.0.1", "--port", str(self.superlink_port), "--isolation", "process",
                "--superexec-auth-secret-file", secret,
            ],
            surroundings,
        )  # fmt: skip
        _until_listening(self.superlink_port)
        self.start(
            "superexec",
            [
                str(self.engine / "flower-superexec"), "--runtime-api-address", f"127.0.0.1:{self.superlink_port}",
                "--root-certificates", str(own / "ca.crt"), "--superexec-auth-secret-file", secret,
            ],
            surroundings,
        )  # fmt: skip

    def start_nginx(self) -> None:
        """Start the filter in front of the SuperLink."""
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
        command = [nginx, "-e", "stderr", "-p", str(self.certificates), "-c", "nginx.conf", "-g", "daemon off;"]
        self.start("nginx", command, dict(os.environ))
        _until_listening(self.public_port)

    def register(self, sites: Sequence[str]) -> None:
        """Register the sites' public keys under their names."""
        connection = f'[superlink.coordinator]\naddress = "127.0.0.1:{self.superlink_port}"\n'
        connection += f'root-certificates = "{self.certificates / "ca.crt"}"\n'
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(connection)
        for site in sites:
            key = str(self.certificates / f"{site}.pub")
            command = [str(self.engine / "flwr"), "supernode", "register", key, "coordinator", "--name", site]
            _run([*command, "--format", "json"], environment(self.engine, self.home))

    def site_file(self, site: str, data: Path, **resources: object) -> Path:
        """Write the YAML file of a site and return its path."""
        values = {
            "site": site,
            "data": str(data),
            "work": str(self.folder / site),
            "coordinator": f"localhost:{self.public_port}",
            "certificates": {
                "authority": str(self.certificates / "ca.crt"),
                "key": str(self.certificates / f"{site}.key"),
            },
            "resources": dict(resources),
            "foundations": str(self.folder / "foundations"),
            "engine": str(self.engine),
        }
        path = self.folder / f"{site}.yml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    def start_site(self, site: str) -> None:
        """Start a hospital's command on its YAML file."""
        self.start(site, [sys.executable, "-m", "fedsca_pipeline.flower.site", str(self.folder / f"{site}.yml")])

    def coordinate(self, parameters: Mapping[str, object], env: str = "flower") -> list[str]:
        """Return the coordinator's command."""
        own = {
            "data_root": self.folder / "data",
            "foundation_root": self.folder / "foundations",
            "flower.superlink": f"127.0.0.1:{self.superlink_port}",
            "flower.authority": self.certificates / "ca.crt",
            "flower.home": self.home,
            "flower.engine": self.engine,
        }
        given = ",".join(f"{key}={value}" for key, value in {**own, **parameters}.items())
        command = [sys.executable, "-m", "kedro", "run", "--pipeline=federated_training", f"--env={env}"]
        return [*command, f"--params={given}"]

    def start(self, name: str, command: Sequence[str], surroundings: Mapping[str, str] | None = None) -> None:
        """Start a process in a group of its own."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with (self.folder / "logs" / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 - no shell
                command, env=None if surroundings is None else dict(surroundings), stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, cwd=PROJECT,
            )  # fmt: skip

    def log(self, name: str) -> str:
        """Return what a process has said so far."""
        return (self.folder / "logs" / f"{name}.log").read_text()

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a process's whole group a signal, and return its exit status once it has ended."""
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    def close(self) -> None:
        """End all that was started, the latest first."""
        for name in reversed(list(self.processes)):
            self.stop(name)

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(command: Sequence[str], surroundings: Mapping[str, str] | None = None) -> None:
    env = None if surroundings is None else dict(surroundings)
    subprocess.run(command, env=env, check=True, capture_output=True)  # noqa: S603 - no shell


def _until_listening(port: int) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return


def free_port() -> int:
    """Return a port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    """Run the demonstration; return the exit status of ``kedro run``."""
    parser = argparse.ArgumentParser(description="A deployed federation on one machine.")
    parser.add_argument("--folder", type=Path, default=Path("data/flower_demo"), help="for all that it writes")
    parser.add_argument("--engine", type=Path, help="bin folder of the environment that flwr is in")
    parser.add_argument("--params", default="", help="more parameters for kedro run")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # So that what was started is ended, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    sites = ("hospital_a", "hospital_b", "hospital_c")
    raw = folder / "raw"
    write_demo_sites(raw, DemoSitesConfig())
    with LocalFederation(folder, engine_folder(given.engine), free_port(), free_port()) as federation:
        federation.found(sites)
        federation.start_superlink()
        federation.start_nginx()
        federation.register(sites)
        for site, data in zip(sites, sorted(raw.iterdir()), strict=False):
            federation.site_file(site, data)
            federation.start_site(site)
        logger.info("SuperLink, nginx and %s are up; their logs are in %s", ", ".join(sites), folder / "logs")
        parameters = dict(pair.split("=", 1) for pair in given.params.split(",") if pair)
        # Three hospitals share this machine.
        command = federation.coordinate({"run.threads": 1, **parameters})
        return subprocess.run(command, check=False, cwd=PROJECT).returncode  # noqa: S603 - no shell


if __name__ == "__main__":
    sys.exit(main())
