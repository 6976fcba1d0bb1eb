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
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.data.demo.sites import write_demo_sites
from fedsca_pipeline.flower.processes.engine import engine_folder, environment
from fedsca_pipeline.flower.processes.leash import Leashed

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_SERVERS = ("superlink", "superexec", "nginx")
_LOG_END = 2_000  # characters
# Debian keeps nginx where only root looks.
_TOOLS = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"


class PartEnded(Exception):  # noqa: N818 - what happened
    """A process of the federation has ended that should not have."""


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
    processes: dict[str, Leashed] = field(default_factory=dict)

    @property
    def certificates(self) -> Path:
        """Folder of certificates and keys."""
        return self.folder / "certificates"

    @property
    def home(self) -> Path:
        """The coordinator's ``flower.home``."""
        return self.folder / "coordinator"

    def found(self, sites: Sequence[str]) -> None:
        """Make authority, certificates and keys anew, and let a SuperLink that knew older ones forget them."""
        shutil.rmtree(self.certificates, ignore_errors=True)
        for left in self.folder.glob("state.db*"):
            left.unlink()
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
        nginx = shutil.which("nginx", path=_TOOLS) or "nginx"
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
        self.start(
            site, [sys.executable, "-m", "fedsca_pipeline.flower.site.command", str(self.folder / f"{site}.yml")]
        )

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
        """Start a process that ends with this one."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with (self.folder / "logs" / f"{name}.log").open("a") as log:
            self.processes[name] = Leashed(
                command, surroundings, patience=_STOP_SECONDS, stdout=log, stderr=log, cwd=PROJECT
            )

    def log(self, name: str) -> str:
        """Return what a process has said so far."""
        return (self.folder / "logs" / f"{name}.log").read_text()

    def run(self, command: Sequence[str]) -> int:
        """Run the coordinator's command on this terminal, Ctrl-C included; return its exit status.

        Raises:
            PartEnded: another process has ended before it.
        """
        self.processes["kedro"] = coordinator = Leashed(command, patience=_STOP_SECONDS, cwd=PROJECT)
        try:
            while (status := coordinator.poll()) is None:
                self.check_parts()
                time.sleep(0.2)
        except KeyboardInterrupt:
            # In a session of its own, it has not got it from the terminal.
            coordinator.send(signal.SIGINT)
            return coordinator.wait()
        return status

    def check_parts(self) -> None:
        """Do nothing while all but the coordinator run.

        Raises:
            PartEnded: one has ended; with the end of its log.
        """
        for name, process in self.processes.items():
            if name != "kedro" and process.poll() is not None:
                raise PartEnded(f"{name} has ended. The end of its log:\n{self.log(name)[-_LOG_END:]}")

    def stop(self, name: str) -> int:
        """End a process and all below it; return its exit status."""
        return self.processes.pop(name).end()

    def kill(self, name: str) -> None:
        """Kill a process, and what of its group has no leash of its own, as a power cut would."""
        process = self.processes.pop(name)
        process.send(signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """End all that was started, the latest first: sites at once, and then what they take their leave of."""
        for name, process in self.processes.items():
            if name not in _SERVERS:
                process.let_go()
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


def missing_tools(engine: Path | None) -> list[str]:
    """Return what this machine lacks for the demonstration, each with its cure."""
    lacking = [
        f"there is no {tool} here: apt-get install {package}"
        for tool, package in (("nginx", "nginx-light"), ("openssl", "openssl"), ("ssh-keygen", "openssh-client"))
        if shutil.which(tool, path=_TOOLS) is None
    ]
    try:
        engine_folder(engine)
    except FileNotFoundError as error:
        lacking.append(str(error))
    return lacking


def main() -> int:
    """Run the demonstration, or what is left of it; return the exit status of ``kedro run``."""
    parser = argparse.ArgumentParser(description="A deployed federation on one machine.")
    parser.add_argument("--folder", type=Path, default=Path("data/flower_demo"), help="for all that it writes")
    parser.add_argument("--engine", type=Path, help="bin folder of the environment that flwr is in")
    parser.add_argument("--params", default="", help="more parameters for kedro run")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # So that what was started is ended, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if lacking := missing_tools(given.engine):
        logger.error("Error: %s", "\n       ".join(lacking))
        return 1
    folder = given.folder.resolve()
    if folder.exists():
        logger.info("%s is there: going on with what is in it; delete it to begin anew", given.folder)
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
    0: "What the hospitals keep is in {folder}/hospital_*, what their coordinator has is in {folder}/data",
    _INTERRUPTED: "'make flower-demo' goes on from here",
}
_FAILED = "Without {folder}, 'make flower-demo' begins anew"


def _demonstrate(folder: Path, engine: Path, params: str) -> int:
    sites = ("hospital_a", "hospital_b", "hospital_c")
    raw = folder / "raw"
    write_demo_sites(raw, DemoSitesConfig())
    with LocalFederation(folder, engine, free_port(), free_port()) as federation:
        logger.info("Starting SuperLink, nginx and %s; their logs are in %s", ", ".join(sites), folder / "logs")
        federation.found(sites)
        federation.start_superlink()
        federation.start_nginx()
        federation.register(sites)
        for site, data in zip(sites, sorted(raw.iterdir()), strict=False):
            federation.site_file(site, data)
            federation.start_site(site)
        logger.info("Starting their coordinator: kedro run --pipeline=federated_training --env=flower")
        parameters = dict(pair.split("=", 1) for pair in params.split(",") if pair)
        # Three hospitals share this machine.
        return federation.run(federation.coordinate({"run.threads": 1, **parameters}))


if __name__ == "__main__":
    sys.exit(main())
