"""A worker that dies, hangs or sends too much is ended, and the next task gets a new worker."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsca_pipeline.flower.config import Resources
from fedsca_pipeline.flower.site.worker_process import WorkerProcess

WORKER = """
import os, signal, socket, sys, time
from fedsca_pipeline.flower.messages import frames

connection = socket.socket(fileno=int(sys.argv[1]))
frames.send(connection, {"ready": True})
while True:
    task, payload = frames.receive(connection, 1 << 20)
    if task["kind"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task["kind"] == "leave":
        sys.exit(task["status"])
    if task["kind"] == "hang":
        time.sleep(3600)
    header = {"pid": os.getpid(), **({"spent": True} if task["kind"] == "last" else {})}
    frames.send(connection, header, payload * task.get("times", 1))
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    process = WorkerProcess([sys.executable, str(script)], Resources(max_message=1, memory=2))
    yield process
    process.end()


def test_one_worker_answers_several_tasks(worker) -> None:
    first = worker.ask({"kind": "work"}, b"one", 60)
    second = worker.ask({"kind": "work"}, b"two", 60)

    assert (first[1], second[1]) == (b"one", b"two")
    assert first[0]["pid"] == second[0]["pid"]


@pytest.mark.parametrize(
    ("task", "seconds", "reason"),
    [
        ({"kind": "die"}, 60, "SIGKILL.*resources.memory in the site's YAML file allows 2 GiB; raise it"),
        ({"kind": "hang"}, 0.5, "took longer than"),
        ({"kind": "work", "times": 2**20}, 60, "resources.max_message.*larger than the 1048576 allowed"),
        ({"kind": "leave", "status": 112}, 60, "out of memory.*resources.memory in the site's YAML file allows 2 GiB"),
        ({"kind": "leave", "status": 3}, 60, "died .exit code 3"),
    ],
)
def test_a_lost_worker_is_reported_with_the_reason_and_the_next_task_gets_a_new_worker(
    worker, task, seconds, reason
) -> None:
    before = worker.ask({"kind": "work"}, b"x", 60)[0]["pid"]

    header, payload = worker.ask(task, b"abc", seconds)

    assert payload == b""
    assert re.search(reason, header["failed"])
    assert not psutil.pid_exists(before)
    after = worker.ask({"kind": "work"}, b"x", 60)
    assert after[1] == b"x"
    assert after[0]["pid"] != before


def test_a_worker_that_cannot_start_fails_the_task() -> None:
    worker = WorkerProcess([sys.executable, "-c", "raise SystemExit(3)"], Resources())

    header, _ = worker.ask({"kind": "work"}, b"", 5)

    assert "exit code 3" in header["failed"]


def test_a_worker_that_reports_itself_as_spent_answers_and_is_replaced(worker) -> None:
    header, payload = worker.ask({"kind": "last"}, b"x", 60)

    assert payload == b"x"
    assert "spent" not in header
    assert not psutil.pid_exists(header["pid"])
    assert worker.ask({"kind": "work"}, b"x", 60)[0]["pid"] != header["pid"]


def test_no_worker_runs_after_end(worker) -> None:
    pid = worker.ask({"kind": "work"}, b"", 60)[0]["pid"]

    worker.end()

    assert not psutil.pid_exists(pid)
