"""``make flower-demo``: run a complete deployed federation on one machine, each part as a separate process on loopback.

The parts are a SuperLink with its SuperExec, nginx in front of them, three hospitals, and ``kedro run`` as coordinator.
They use TLS, node keys and the files of ``deploy/``. The data of the hospitals are the demonstration sites.
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
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.data.demo.sites import write_demo_sites
from fedsca_pipeline.flower.processes.engine import engine_folder, environment
from fedsca_pipeline.flower.processes.leash import LeashedProcess

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_SERVERS = ("superlink", "superexec", "nginx")
_LOG_END = 2_000  # characters
# On Debian, nginx is in a folder that is only in the PATH of root.
_TOOLS = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"


class PartEnded(Exception):  # noqa: N818 - an event
    """A process of the federation has ended unexpectedly."""


@dataclass
class LocalFederation:
    """The processes of a federation on this machine, by name. Each logs to ``<folder>/logs/<name>.log``.

    Args:
        folder: folder for certificates, keys, state and work folders; its path must be short enough for unix sockets.
        engine: bin folder of the environment that has flwr.
        superlink_port: port of the SuperLink on loopback.
        public_port: port of nginx on loopback, which the sites connect to.
        max_message: largest message in MiB, for nginx and ``flower.max_message``.
        processes: running processes by name.
    """

    folder: Path
    engine: Path
    superlink_port: int = 8000
    public_port: int = 8443
    max_message: int = 8
    processes: dict[str, LeashedProcess] = field(default_factory=dict)

    @property
    def certificates(self) -> Path:
        """Folder of certificates and keys."""
        return self.folder / "certificates"

    @property
    def home(self) -> Path:
        """The coordinator's ``flower.home``."""
        return self.folder / "coordinator"

    def make_certificates(self, sites: Sequence[str]) -> None:
        """Make a new authority, certificates and keys, and delete the state of a SuperLink that knows older ones."""
        shutil.rmtree(self.certificates, ignore_errors=True)
        for left in self.folder.glob("state.db*"):
            left.unlink()
        script = PROJECT / "deploy" / "make_authority.sh"
        _run(["bash", str(script), str(self.certificates), "localhost", *sites])
        conf = (PROJECT / "deploy" / "nginx.conf").read_text()
        conf = conf.replace("127.0.0.1:8000", f"127.0.0.1:{self.superlink_port}")
        conf = conf.replace("127.0.0.1:8443", f"127.0.0.1:{self.public_port}")
        conf = conf.replace("client_max_body_size 8m", f"client_max_body_size {self.max_message}m")
        (self.certificates / "nginx.conf").write_text(conf)

    def start_superlink(self) -> None:
        """Start the SuperLink and its SuperExec, and wait until it listens."""
        folder, secret = self.certificates, str(self.certificates / "superexec.secret")
        env = environment(self.engine, self.home)
        # SQLite keeps the mode: messages are for this user only.
        (self.folder / "state.db").touch(mode=0o600)
        self.start(
            "superlink",
            [
                str(self.engine / "flower-superlink"),
                "--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.pem"),
                "--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth",
                "--disable-runtime-dependency-installation", "--database", str(self.folder / "state.db"),
                "--host", "127.0.0.1", "--port", str(self.superlink_port), "--isolation", "process",
                "--superexec-auth-secret-file", secret,
            ],
            env,
        )  # fmt: skip
        _until_listening(self.superlink_port)
        self.start(
            "superexec",
            [
                str(self.engine / "flower-superexec"), "--runtime-api-address", f"127.0.0.1:{self.superlink_port}",
                "--root-certificates", str(folder / "ca.crt"), "--superexec-auth-secret-file", secret,
            ],
            env,
        )  # fmt: skip

    def start_nginx(self) -> None:
        """Start nginx, the filter in front of the SuperLink."""
        nginx = shutil.which("nginx", path=_TOOLS) or "nginx"
        command = [nginx, "-e", "stderr", "-p", str(self.certificates), "-c", "nginx.conf", "-g", "daemon off;"]
        self.start("nginx", command, dict(os.environ))
        _until_listening(self.public_port)

    def register(self, sites: Sequence[str]) -> None:
        """Register the public key of each site under its name, at the SuperLink and in nginx."""
        connection = f'[superlink.coordinator]\naddress = "127.0.0.1:{self.superlink_port}"\n'
        connection += f'root-certificates = "{self.certificates / "ca.crt"}"\n'
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(connection)
        script, env = PROJECT / "deploy" / "register.sh", environment(self.engine, self.home)
        env["PATH"] += f"{os.pathsep}{_TOOLS}"
        for site in sites:
            key = self.certificates / f"{site}.pub"
            _run(["bash", str(script), str(self.certificates), site, str(key)], env)

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
        """Start the command of a hospital with its YAML file."""
        self.start(
            site, [sys.executable, "-m", "fedsca_pipeline.flower.site.command", str(self.folder / f"{site}.yml")]
        )

    def coordinate(self, parameters: Mapping[str, object], env: str = "flower") -> list[str]:
        """Return the command of the coordinator."""
        defaults = {
            "data_root": self.folder / "data",
            "foundation_root": self.folder / "foundations",
            "flower.superlink": f"127.0.0.1:{self.superlink_port}",
            "flower.authority": self.certificates / "ca.crt",
            "flower.home": self.home,
            "flower.engine": self.engine,
            "flower.max_message": self.max_message,
        }
        given = ",".join(f"{key}={value}" for key, value in {**defaults, **parameters}.items())
        command = [sys.executable, "-m", "kedro", "run", "--pipeline=federated_training", f"--env={env}"]
        return [*command, f"--params={given}"]

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start a process, which ends with this one."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with (self.folder / "logs" / f"{name}.log").open("a") as log:
            self.processes[name] = LeashedProcess(
                command, env, stop_seconds=_STOP_SECONDS, stdout=log, stderr=log, cwd=PROJECT
            )

    def log(self, name: str) -> str:
        """Return the log of a process so far."""
        return (self.folder / "logs" / f"{name}.log").read_text()

    def run(self, command: Sequence[str]) -> int:
        """Run the command of the coordinator in this terminal and return its exit status; Ctrl-C interrupts it.

        Raises:
            PartEnded: another process ended first.
        """
        self.processes["kedro"] = coordinator = LeashedProcess(command, stop_seconds=_STOP_SECONDS, cwd=PROJECT)
        try:
            while (status := coordinator.poll()) is None:
                self.check_parts()
                time.sleep(0.2)
        except KeyboardInterrupt:
            # The command runs in another session, so the terminal has not sent it the signal.
            coordinator.send(signal.SIGINT)
            return coordinator.wait()
        return status

    def check_parts(self) -> None:
        """Check that all processes other than the coordinator still run.

        Raises:
            PartEnded: a process has ended; the message holds the end of its log.
        """
        for name, process in self.processes.items():
            if name != "kedro" and process.poll() is not None:
                raise PartEnded(f"{name} has ended. The end of its log:\n{self.log(name)[-_LOG_END:]}")

    def stop(self, name: str) -> int:
        """End a process and its children, and return its exit status."""
        return self.processes.pop(name).end()

    def kill(self, name: str) -> None:
        """Kill a process and its group at once, as in a power cut; leashed children end by themselves."""
        process = self.processes.pop(name)
        process.send(signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """End all processes: sites in parallel, then the servers that they sign off from, the last started first."""
        for name, process in self.processes.items():
            if name not in _SERVERS:
                process.request_stop()
        for name in reversed(list(self.processes)):
            self.stop(name)

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    subprocess.run(command, env=None if env is None else dict(env), check=True, capture_output=True)  # noqa: S603 - no shell


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
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def missing_tools(engine: Path | None) -> list[str]:
    """Return the tools that this machine lacks for the demonstration, each with the fix."""
    missing = [
        f"{tool} is missing: apt-get install {package}"
        for tool, package in (("nginx", "nginx-light"), ("openssl", "openssl"), ("ssh-keygen", "openssh-client"))
        if shutil.which(tool, path=_TOOLS) is None
    ]
    try:
        engine_folder(engine)
    except FileNotFoundError as error:
        missing.append(str(error))
    return missing


def main() -> int:
    """Start or resume the demonstration, and return the exit status of ``kedro run``."""
    parser = argparse.ArgumentParser(description="A deployed federation on one machine.")
    parser.add_argument(
        "--folder", type=Path, default=Path("data/flower_demo"), help="folder for everything that it writes"
    )
    parser.add_argument("--engine", type=Path, help="bin folder of the environment that has flwr")
    parser.add_argument("--params", default="", help="more parameters for kedro run")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # End all processes, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if missing := missing_tools(given.engine):
        logger.error("Error: %s", "\n       ".join(missing))
        return 1
    folder = given.folder.resolve()
    if folder.exists():
        logger.info("%s exists: resuming; delete it to start from scratch", given.folder)
    try:
        status = _demonstrate(folder, engine_folder(given.engine), given.params)
    except PartEnded as ended:
        logger.error("Error: %s", ended)
        return 1
    except KeyboardInterrupt:
        status = _INTERRUPTED
    logger.info("All processes are stopped. %s", _ENDS.get(status, _FAILED).format(folder=given.folder))
    return status


_INTERRUPTED = 130
_ENDS = {
    0: "The files of the hospitals are in {folder}/hospital_*, those of the coordinator in {folder}/data",
    _INTERRUPTED: "'make flower-demo' resumes from here",
}
_FAILED = "To start from scratch, delete {folder} and run 'make flower-demo' again"


def _demonstrate(folder: Path, engine: Path, params: str) -> int:
    sites = ("hospital_a", "hospital_b", "hospital_c")
    raw = folder / "raw"
    write_demo_sites(raw, DemoSitesConfig())
    parameters = dict(pair.split("=", 1) for pair in params.split(",") if pair)
    max_message = int(parameters.get("flower.max_message", LocalFederation.max_message))
    with LocalFederation(folder, engine, free_port(), free_port(), max_message) as federation:
        logger.info("Starting SuperLink, nginx and %s; their logs are in %s", ", ".join(sites), folder / "logs")
        federation.make_certificates(sites)
        federation.start_superlink()
        federation.register(sites)
        federation.start_nginx()
        for site, data in zip(sites, sorted(raw.iterdir()), strict=False):
            federation.site_file(site, data)
            federation.start_site(site)
        logger.info("Starting the coordinator: kedro run --pipeline=federated_training --env=flower")
        # One thread each, because three hospitals share this machine.
        return federation.run(federation.coordinate({"run.threads": 1, **parameters}))


if __name__ == "__main__":
    sys.exit(main())
