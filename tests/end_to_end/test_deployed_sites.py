"""After a command is killed, its child processes end and the next command can start at once."""

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

# The command of a site with a worker without torch. There is no coordinator, so its SuperNode keeps retrying.
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
from fedsca_pipeline.flower.messages import frames

frames.send(socket.socket(fileno=int(sys.argv[1])), {"ready": True})
time.sleep(600)
"""


@pytest.fixture
def start(engine: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts the command of one hospital and waits until its three child processes run."""
    # The paths of pytest's folders are too long for unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="fedsca-"))
    federation = LocalFederation(folder, engine, free_port(), free_port())
    federation.make_certificates(["a"])
    file = federation.site_file("a", folder / "data")
    started = []

    def begin() -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", SITE, str(file), WORKER], stderr=subprocess.DEVNULL)
        started.append(process)
        until(lambda: parts(process).keys() >= {"flower-supernode", "flower-superexec", "worker"})
        # The SuperExec is connected to its SuperNode, so both run.
        until(parts(process)["flower-superexec"].net_connections)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(folder)


def parts(process: psutil.Process | subprocess.Popen) -> dict[str, psutil.Process]:
    """Return the child processes of a command by name, leashes by their process id."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        # A process that has just ended has no command line.
        with suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            leash = any(word.endswith("leash.py") for word in words)
            name = next((Path(word).name for word in words if Path(word).name.startswith("flower-super")), "worker")
            found[str(child.pid) if leash else name] = child
    return found


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_command_leaves_no_process_and_can_be_restarted_at_once(start) -> None:
    killed = start()
    left = parts(killed)
    # A suspended process does not notice that its owner has ended.
    left["worker"].suspend()

    killed.kill()
    again = start()

    assert all(map(gone, left.values()))
    restarted = parts(again)
    again.terminate()
    assert again.wait(60) == 0
    until(lambda: all(map(gone, restarted.values())))


DEPLOY = Path(__file__).parents[2] / "deploy"
DEMONSTRATION = """
import sys, time
from pathlib import Path
from demo import LocalFederation, free_port

federation = LocalFederation(Path(sys.argv[1]), Path(sys.argv[2]), free_port(), free_port())
federation.make_certificates(["a"])
federation.start_superlink()
federation.start_nginx()
print("up", flush=True)
time.sleep(600)
"""


def test_a_killed_demonstration_leaves_no_process(engine: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEMONSTRATION, str(tmp_path), str(engine)]
    # The working folder is the first place that -c imports from.
    with subprocess.Popen(command, cwd=DEPLOY, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "up\n"
        left = psutil.Process(killed.pid).children(recursive=True)
        words = {Path(word).name for process in left for word in process.cmdline()}

        killed.kill()

    assert words >= {"flower-superlink", "flower-superexec", "nginx"}

    until(lambda: all(map(gone, left)))
