"""Commands forked from a warm process behave as those of a new interpreter do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROBE = """
import atexit, json, os, signal, sys, time
sys.excepthook = sys.__excepthook__
atexit.register(lambda: sys.stderr.write("and at the end\\n"))
seen = {"cwd": os.getcwd(), "arguments": sys.argv[1:], "environment": dict(os.environ), "name": __name__}
seen |= {"path": sys.path[0], "group": os.getpgid(0) == os.getpid(), "handler": str(signal.getsignal(signal.SIGINT))}
seen |= {"terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)]}
print(json.dumps(seen), flush=True)
if "wait" in sys.argv:
    time.sleep(60)
if "fail" in sys.argv:
    raise ValueError("no")
if "write" in sys.argv:
    open("large", "wb", buffering=0).write(bytes(2000))
sys.exit({"quit": 3, "say": "a last word"}.get(sys.argv[1]))
"""


@pytest.fixture
def started(server, tmp_path: Path):
    """Starts the probe in a new interpreter or, ``warm``, in a process forked from the server."""
    if server is None:
        pytest.skip("commands are forked on Linux only")
    (tmp_path / "probe.py").write_text(PROBE)

    def start(*words: str, warm: bool):
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        if warm:
            return server.start(["probe", *words], cwd=tmp_path, env=env, largest_file=1000)
        limited = ["prlimit", "--fsize=1000", sys.executable, "-m", "probe", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            limited, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
            start_new_session=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize("word", ["quit", "say", "fail", "write", "end"])
def test_status_streams_arguments_folder_environment_and_limits_are_those_of_a_new_interpreter(
    started, word: str
) -> None:
    found = []
    for warm in (True, False):
        process = started(word, warm=warm)
        stdout, stderr = process.communicate(60)
        lines = [line for line in stderr.splitlines() if not line.startswith(" ")]
        found.append((process.returncode, json.loads(stdout), lines))

    assert found[0] == found[1]
    assert found[0][2][-1] == "and at the end"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_ends_it_with_the_status_of_a_new_interpreter(started, number: signal.Signals) -> None:
    found = []
    for warm in (True, False):
        process = started("wait", warm=warm)
        process.stdout.readline()
        time.sleep(0.1)
        assert process.poll() is None
        os.killpg(process.pid, number)
        _, stderr = process.communicate(60)
        found.append((process.returncode, stderr.splitlines()[-2:]))

    assert found[0] == found[1]
    assert found[0][0] == -number


def test_commands_run_side_by_side(started) -> None:
    first, second = started("wait", warm=True), started("quit", warm=True)

    assert second.wait(60) == 3
    assert first.poll() is None
    first.stdout.close()
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL


def test_kedro_prints_the_same(workplace) -> None:
    warm, cold = (workplace.run(params="federation.rounds=0", cold=cold) for cold in (False, True))

    assert warm.code == 1
    assert warm == cold
