"""A federation of real processes on loopback for tests: SuperLink, nginx, hospitals, coordinator."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
import yaml
from warm import Server

from demo import PROJECT, LocalFederation
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.files import read_tensors
from fedsca_pipeline.flower.processes import leash

SITES = ("hospital_a", "hospital_b", "hospital_c")
SMALL = {"foundation.name": "random", "preprocessing.image_size": 32, "adapters.width": 4, "run.threads": 1}


@dataclass
class Deployed:
    """A running federation, and the commands of its coordinator."""

    federation: LocalFederation
    database: Path
    commands: Server | None

    @property
    def folder(self) -> Path:
        return self.federation.folder

    def start(self, name: str = "kedro", **parameters: Any) -> subprocess.Popen:
        given = {key.replace("__", "."): value for key, value in parameters.items()}
        command = self.federation.coordinate({**SMALL, "federation.rounds": 2, "flower.retry": 5, **given})
        env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{self.database}", "COLUMNS": "200"}
        self.federation.start(name, command, env)
        return self.federation.processes[name]

    def run(self, name: str = "kedro", **parameters: Any) -> str:
        code = self.start(name, **parameters).wait(900)
        assert code == 0, self.output(name)
        return self.output(name)

    def record_requests(self) -> None:
        """Configure nginx, before it starts, to store the body of each request that it forwards."""
        file = self.federation.certificates / "nginx.conf"
        text = file.read_text().replace("proxy_request_buffering off;", "client_body_in_file_only on;")
        # If root starts nginx, it writes as a user without access to the folder.
        file.write_text(f"user {pwd.getpwuid(os.getuid()).pw_name} {grp.getgrgid(os.getgid()).gr_name};\n{text}")

    def block_large_answers(self, *, refused: str, stalled: str) -> None:
        """Let objects of more than 4 KiB of two sites never arrive: nginx refuses the one's with 413, the other's wait.

        Messages have small objects too, which arrive. A SuperNode sends again after 503, for as long as it runs.
        """
        file, port = self.federation.certificates / "nginx.conf", self.federation.superlink_port
        opening = "location = /v1/fleet/push-object {"
        head, rest = file.read_text().split(opening)
        forward = f"client_max_body_size 4k; proxy_pass https://127.0.0.1:{port}/v1/fleet/push-object;"
        locations = f"""
            location = /refused {{ {forward} }}
            location = /stalled {{ {forward} error_page 413 =503 /busy; }}
            location = /busy {{ return 503; }}
            {opening}
                if ($hospital = "{refused}") {{ rewrite ^ /refused last; }}
                if ($hospital = "{stalled}") {{ rewrite ^ /stalled last; }}
        """
        file.write_text(f"{head}{locations}{rest}")
        self.federation.stop("nginx")
        self.federation.start_nginx()

    def recorded_requests(self) -> list[Path]:
        """Return the bodies that the hospitals have sent, one file per request."""
        return [path for path in (self.federation.certificates / "body").rglob("*") if path.is_file()]

    def change_file(self, site: str, **values: object) -> None:
        """Change the YAML file of a hospital, which its command reads at the start."""
        file = self.folder / f"{site}.yml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **values}))

    def output(self, name: str = "kedro") -> str:
        """Return the log of a process with single spaces."""
        return " ".join(self.federation.log(name).split())

    def server(self, round_: int) -> dict[str, torch.Tensor]:
        (run,) = (self.folder / "data" / "07_model_output" / "checkpoints").glob("*/")
        return read_tensors(run / "server" / f"round_{round_:05d}.safetensors")

    def model(self, site: str, name: str = "last") -> dict[str, torch.Tensor]:
        (run,) = (self.folder / site / "07_model_output" / "checkpoints").glob("*/*/")
        return read_tensors(run / "sites" / site / f"{name}.safetensors")

    def rounds_missed(self, site: str) -> list[int]:
        """Return the rounds in which a site was absent."""
        (run,) = (self.folder / "data" / "07_model_output" / "checkpoints").glob("*/")
        folder = CheckpointFolder(run / "server", run.name)
        return [record.round for record in folder.records(folder.latest().round) if record.sites[site].absent]

    def rounds_received(self, site: str) -> list[int]:
        """Return the rounds that a site has received, in order."""
        return self._rounds(site, "in")

    def rounds_answered(self, site: str) -> list[int]:
        """Return the rounds that a site has answered, in order."""
        return self._rounds(site, "out")

    def _rounds(self, site: str, direction: str) -> list[int]:
        record = self.folder / site / "audit.jsonl"
        lines = record.read_text().splitlines() if record.is_file() else []
        entries = [json.loads(line) for line in lines]
        return [entry["round"] for entry in entries if (entry["kind"], entry["direction"]) == ("round", direction)]

    def process(self, site: str, word: str) -> psutil.Process:
        """Return a process that the command of a site has started, by a part of its command line."""
        for child in psutil.Process(self.federation.processes[site].pid).children(recursive=True):
            # A process that has just ended has no command line.
            with suppress(psutil.NoSuchProcess):
                command = child.cmdline()
                if any(word in part for part in command) and leash.__file__ not in command:
                    return child
        raise AssertionError(f"{site}: no process with {word} in its command line")


def until(ready: Callable[[], bool], seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_process(
    deployed: Deployed, root: Path, *, absent: Mapping[str, Sequence[int]] = MappingProxyType({}), **parameters: Any
) -> Path:
    """Run the same sites in process, with sites ``absent`` in the given rounds; return the checkpoint folder."""
    raw = root / "01_raw"
    for site, data in zip(SITES, sorted((deployed.folder / "raw").iterdir()), strict=False):
        shutil.copytree(data, raw / site)
    given = {**SMALL, "federation.rounds": 2, "federation.quorum": 2, "data_root": root, **parameters}
    given["foundation_root"] = deployed.folder / "foundations"
    command = ["kedro", "run", "--pipeline=federated_training"]
    if absent:
        # --params cannot hold a list.
        conf = Path(shutil.copytree(PROJECT / "conf", root.with_name("conf")))
        path = conf / "base" / "parameters_federation.yml"
        values = yaml.safe_load(path.read_text())
        values["federation"]["inject_failures"] = {site: list(rounds) for site, rounds in absent.items()}
        path.write_text(yaml.safe_dump(values))
        command += ["--conf-source", str(conf)]
    command += ["--params=" + ",".join(f"{key}={value}" for key, value in given.items())]
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{deployed.database}"}
    if deployed.commands:
        started: Any = deployed.commands.start(command, cwd=PROJECT, env=env)
    else:
        pipe = subprocess.PIPE
        started = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=PROJECT, env=env, stdout=pipe, stderr=pipe, text=True
        )
    stdout, stderr = started.communicate(timeout=500)
    assert started.returncode == 0, stdout + stderr
    (run,) = (root / "07_model_output" / "checkpoints").glob("*/")
    return run
