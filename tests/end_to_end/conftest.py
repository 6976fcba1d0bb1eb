"""The real command line, in folders of its own: every test here starts ``kedro run`` as a user does, in a process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from deployed import SITES, Deployed
from mlflow import MlflowClient
from mlflow.entities import Run
from warm import Command, Server

from demo import LocalFederation, free_port
from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.data.demo.sites import write_demo_sites

ROUNDS = 4

Started = Command | subprocess.Popen[str]


@dataclass(frozen=True)
class Finished:
    """An ended command: exit status, and what it printed (both streams, line breaks of the log taken out)."""

    code: int
    stdout: str
    output: str

    @property
    def words(self) -> str:
        """The output with every run of white space as one blank."""
        return " ".join(self.output.split())


@dataclass(frozen=True)
class Workplace:
    """Data, foundations and MLflow of one user, and the commands typed there."""

    root: Path
    project: Path
    server: Server | None
    conf: Path | None = None

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def raw(self) -> Path:
        return self.data / "01_raw"

    @property
    def models(self) -> Path:
        return self.data / "06_models"

    @property
    def checkpoints(self) -> Path:
        return self.data / "07_model_output" / "checkpoints"

    @property
    def reporting(self) -> Path:
        return self.data / "08_reporting"

    @property
    def description(self) -> Path:
        return self.models / "run_description.json"

    def manifest(self, site: str) -> Path:
        return self.data / "03_primary" / site / "manifest.csv"

    def report(self, site: str) -> Path:
        return self.data / "02_intermediate" / site / "report.json"

    def test_scores(self, site: str) -> Path:
        return self.data / "07_model_output" / "test_scores" / f"{site}.csv"

    def overlays(self, site: str) -> Path:
        return self.reporting / "overlays" / f"{site}.png"

    @property
    def foundations(self) -> Path:
        return self.root / "foundations"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self._uri)

    @property
    def _uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def start(
        self,
        pipeline: str = "__default__",
        params: str = "",
        *,
        env: str = "smoke",
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
        options: Sequence[str] = (),
        cold: bool = False,
    ) -> Started:
        """Start ``kedro run`` in a process group of its own; no file may outgrow ``largest_file`` bytes.

        ``cold``: in a new interpreter, which imports all. ``options``: further ones of the command line.
        """
        roots = f"data_root={self.data},foundation_root={self.foundations}"
        words = ["kedro", "run", f"--pipeline={pipeline}", f"--env={env}"]
        words += [f"--params={roots},{params}" if params else f"--params={roots}"]
        words += [*options, *([f"--conf-source={self.conf}"] if self.conf else [])]
        variables = {**os.environ, "MLFLOW_TRACKING_URI": self._uri, "OMP_WAIT_POLICY": "passive"}
        variables |= environment or {}
        if self.server and not cold:
            return self.server.start(words, cwd=self.project, env=variables, largest_file=largest_file)

        def prepare() -> None:
            # Started in the background, a test run ignores Ctrl-C and would hand that down.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=self.project,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )

    def run(self, pipeline: str = "__default__", params: str = "", **options: Any) -> Finished:
        """Run ``kedro run`` to its end."""
        return ended(self.start(pipeline, params, **options))

    def signal_when(
        self, ready: Callable[[], bool], number: signal.Signals, params: str = "", *, after: float = 0.0, **options: Any
    ) -> Finished:
        """Start a run, wait until ``ready``, and ``after`` seconds more, and send its process group a signal."""
        return self.signalled(self.start(params=params, **options), ready, number, after=after)

    def signalled(
        self, process: Started, ready: Callable[[], bool], number: signal.Signals, *, after: float = 0.0
    ) -> Finished:
        """Send a started run's process group a signal, as ``signal_when`` does."""
        while not ready() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(after)
        if process.poll() is None:
            os.killpg(process.pid, number)
        return ended(process)

    def moved(self, root: Path) -> Workplace:
        """Return a copy of everything at another place."""
        shutil.copytree(self.root, root)
        return replace(self, root=root)

    def parents(self) -> list[Run]:
        """Return the MLflow runs that are not nested."""
        return [run for run in self._all_runs() if "mlflow.parentRunId" not in run.data.tags]

    def nested(self, parent: Run) -> dict[str, Run]:
        """Return the nested runs of one, by site."""
        found = (run for run in self._all_runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id)
        return {run.data.tags["fedsca.site"]: run for run in found}

    def _all_runs(self) -> list[Run]:
        client = self.client
        return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])

    def steps(self, run: Run, metric: str) -> list[int]:
        """Return the steps at which a metric was logged, in order, repeated as often as it was."""
        return sorted(point.step for point in self.client.get_metric_history(run.info.run_id, metric))

    def contents(self, *folders: str) -> dict[str, str]:
        """Return the SHA-256 of every file but the lock below ``data`` (or some of its folders), by relative path."""
        roots = [self.data / folder for folder in folders] or [self.data]
        files = (path for root in roots for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock")
        return {path.relative_to(self.data).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def partial_files(self) -> list[Path]:
        """Return what an unfinished write would have left."""
        return [path for path in self.root.rglob("*") if ".partial" in path.name or path.name.startswith(".demo")]


def ended(process: Started) -> Finished:
    """Wait for a command."""
    try:
        stdout, stderr = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, stdout, stdout + stderr)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., tuple[Path, Any]]:
    """Makes a folder that all of pytest's processes share, the first that asks for it.

    It takes the folder's name and a function that fills it and returns what can be written as JSON. It returns the
    folder and that.
    """
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        root = root.parent

    def make(name: str, fill: Callable[[Path], Any]) -> tuple[Path, Any]:
        folder, result = root / f"shared-{name}", root / f"shared-{name}.json"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                # Another process may have failed.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                result.write_text(json.dumps(fill(folder)))
        return folder, json.loads(result.read_text())

    return make


@pytest.fixture(scope="session")
def empty_database(made_once: Callable[..., tuple[Path, Any]]) -> Path:
    """An MLflow database without runs: making one takes seconds, copying it none."""

    def fill(folder: Path) -> None:
        MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    folder, _ = made_once("database", fill)
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def server(project: Path) -> Iterator[Server | None]:
    """The process that commands are forked from; none on macOS, where imported frameworks break in a forked process."""
    if sys.platform != "linux":
        yield None
        return
    started = Server(project)
    yield started
    started.close()


@pytest.fixture(scope="session")
def new_workplace(
    project: Path, server: Server | None, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Workplace]:
    """Makes workplaces without data."""

    def make() -> Workplace:
        root = tmp_path_factory.mktemp("workplace")
        shutil.copy(empty_database, root / "mlflow.db")
        return Workplace(root, project, server)

    return make


@pytest.fixture
def workplace(new_workplace: Callable[[], Workplace]) -> Workplace:
    """A workplace without data."""
    return new_workplace()


@pytest.fixture(scope="session")
def finished_run(
    project: Path, server: Server | None, empty_database: Path, made_once: Callable[..., tuple[Path, Any]]
) -> tuple[Workplace, Finished]:
    """A whole ``__default__`` run of the smoke preset over ``ROUNDS`` rounds, not to be written to, and its output.

    It is a new interpreter's, so that what commands forked from the server write is compared with what a user gets.
    """

    def fill(folder: Path) -> dict[str, Any]:
        shutil.copy(empty_database, folder / "mlflow.db")
        done = Workplace(folder, project, server).run(params=f"federation.rounds={ROUNDS}", cold=True)
        assert done.code == 0, done.output
        return asdict(done)

    folder, done = made_once("finished-run", fill)
    return Workplace(folder, project, server), Finished(**done)


@pytest.fixture(scope="session")
def finished(finished_run: tuple[Workplace, Finished]) -> Workplace:
    """The workplace of ``finished_run``."""
    return finished_run[0]


@pytest.fixture(scope="session")
def new_sites(new_workplace: Callable[[], Workplace], finished: Workplace) -> Callable[[], Workplace]:
    """Makes workplaces that hold the raw demonstration sites, and no more."""

    def make() -> Workplace:
        place = new_workplace()
        shutil.copytree(finished.raw, place.raw)
        return place

    return make


@pytest.fixture
def sites(new_sites: Callable[[], Workplace]) -> Workplace:
    """A workplace that holds the raw demonstration sites."""
    return new_sites()


@pytest.fixture
def used(finished: Workplace, tmp_path: Path) -> Workplace:
    """A copy of the finished run's workplace."""
    return finished.moved(tmp_path / "used")


@pytest.fixture
def rounds() -> int:
    """Rounds of ``finished_run``."""
    return ROUNDS


@pytest.fixture
def no_mlflow(project: Path, tmp_path: Path) -> Path:
    """A copy of the project's configuration with tracking switched off."""
    conf = Path(shutil.copytree(project / "conf", tmp_path / "conf"))
    (conf / "smoke" / "mlflow.yml").write_text("enabled: false\n")
    return conf


@pytest.fixture
def fake_npm(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Puts a shell script named ``npm`` first on PATH; its last lines are the argument."""
    folder, temporary = tmp_path / "bin", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()

    def make(lines: str) -> dict[str, str]:
        script = folder / "npm"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(temporary)}

    return make


@pytest.fixture(scope="session")
def engine(project: Path) -> Path:
    """The bin folder of the environment that flwr is in."""
    folder = Path(os.environ.get("FEDSCA_ENGINE", project / ".flower-venv" / "bin"))
    if not (folder / "flwr").is_file() or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("needs 'make engine' (or FEDSCA_ENGINE, the folder of flwr) and nginx")
    return folder


@pytest.fixture
def new_deployed(
    engine: Path, server: Server | None, empty_database: Path, write_volume_site: Callable[..., None]
) -> Iterator[Callable[..., Deployed]]:
    """Starts federations of three hospitals; keywords are resources of each.

    ``volumes``: the last hospital has volumes. ``raw``: sites that replace the demonstration's. ``own``: further values
    of a hospital's YAML file. ``recorded``: nginx stores what the hospitals send, decrypted
    (``Deployed.recorded_requests``).
    """
    folders = []

    def make(
        *,
        volumes: bool = False,
        raw: Path | None = None,
        own: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
        recorded: bool = False,
        **resources: object,
    ) -> Deployed:
        # pytest's own folders are too long for unix sockets.
        folders.append(Path(tempfile.mkdtemp(prefix="fedsca-")))
        shutil.copy(empty_database, folders[-1] / "mlflow.db")
        if raw is None:
            write_demo_sites(folders[-1] / "raw", DemoSitesConfig(images_per_site=10, image_size=64))
        else:
            shutil.copytree(raw, folders[-1] / "raw")
        if volumes:
            last = sorted((folders[-1] / "raw").iterdir())[len(SITES) - 1]
            shutil.rmtree(last)
            write_volume_site(last, count=6)
        started.append(LocalFederation(folders[-1], engine, free_port(), free_port()))
        federation = started[-1]
        deployed = Deployed(federation, folders[-1] / "mlflow.db", server)
        federation.make_certificates(SITES)
        if recorded:
            deployed.record_requests()
        federation.start_superlink()
        federation.register(SITES)
        federation.start_nginx()
        for site, data in zip(SITES, sorted((folders[-1] / "raw").iterdir()), strict=False):
            federation.site_file(site, data, **resources)
            deployed.change_file(site, **own.get(site, {}))
            federation.start_site(site)
        return deployed

    started: list[LocalFederation] = []
    yield make
    for federation in started:
        federation.close()
    for folder in folders:
        shutil.rmtree(folder)
