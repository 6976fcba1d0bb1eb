"""Commands that are killed: what they have started ends with them, and the next start finds the place free."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from demo import LocalFederation, free_port

# The command, with a worker that needs no torch. It has no coordinator: its SuperNode tries again and again.
SITE = """
import logging, signal, sys, threading
from pathlib import Path
from fedsca_pipeline.flower.config import read_site_config
from fedsca_pipeline.flower.site.command import run_site

logging.basicConfig(level=logging.INFO)
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
run_site(read_site_config(Path(sys.argv[1])), [sys.executable, "-c", sys.argv[2]], stopped)
"""
WORKER = """
import socket, sys, time
from fedsca_pipeline.flower import frames

frames.send(socket.socket(fileno=int(sys.argv[1])), {"ready": True})
time.sleep(600)
"""


@pytest.fixture
def start(engine: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts the command of one hospital, and waits until its three parts run."""
    # pytest's own folders are too long for unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="fedsca-"))
    federation = LocalFederation(folder, engine, free_port(), free_port())
    federation.found(["a"])
    file = federation.site_file("a", folder / "data")
    started = []

    def begin() -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", SITE, str(file), WORKER], stderr=subprocess.DEVNULL)
        started.append(process)
        until(lambda: parts(process).keys() >= {"flower-supernode", "flower-superexec", "worker"})
        # To its SuperNode, which so is up, too.
        until(parts(process)["flower-superexec"].net_connections)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(folder)


def parts(process: psutil.Process | subprocess.Popen) -> dict[str, psutil.Process]:
    """What a command has started, by name; leashes by their number."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        # One that has just ended has no command line any more.
        with suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            leash = any(word.endswith("leash.py") for word in words)
            name = next((Path(word).name for word in words if Path(word).name.startswith("flower-super")), "worker")
            found[str(child.pid) if leash else name] = child
    return found


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_command_leaves_no_process_and_can_be_started_again_at_once(start) -> None:
    killed = start()
    left = parts(killed)
    # One that does not even hear that its owner is gone.
    left["worker"].suspend()

    killed.kill()
    again = start()

    assert all(map(gone, left.values()))
    here = parts(again)
    again.terminate()
    assert again.wait(60) == 0
    until(lambda: all(map(gone, here.values())))


DEMONSTRATION = """
import sys, time
from pathlib import Path
from demo import LocalFederation, free_port

federation = LocalFederation(Path(sys.argv[1]), Path(sys.argv[2]), free_port(), free_port())
federation.found(["a"])
federation.start_superlink()
federation.start_nginx()
print("up", flush=True)
time.sleep(600)
"""


def test_a_killed_demonstration_leaves_no_process(engine: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEMONSTRATION, str(tmp_path), str(engine)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "up\n"
        left = psutil.Process(killed.pid).children(recursive=True)
        words = {Path(word).name for process in left for word in process.cmdline()}

        killed.kill()

    assert words >= {"flower-superlink", "flower-superexec", "nginx"}

    until(lambda: all(map(gone, left)))
