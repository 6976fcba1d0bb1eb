"""A worker that dies, hangs or answers too much is ended, and the next task gets another one."""

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
from fedsca_pipeline.flower import frames

line = socket.socket(fileno=int(sys.argv[1]))
frames.send(line, {"ready": True})
while True:
    task, payload = frames.receive(line, 1 << 20)
    if task["kind"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task["kind"] == "leave":
        sys.exit(task["status"])
    if task["kind"] == "hang":
        time.sleep(3600)
    said = {"pid": os.getpid(), **({"spent": True} if task["kind"] == "last" else {})}
    frames.send(line, said, payload * task.get("times", 1))
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    process = WorkerProcess([sys.executable, str(script)], Resources(max_message=1, memory=2))
    yield process
    process.end()


def test_one_worker_answers_task_after_task(worker) -> None:
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
def test_what_became_of_it_is_the_answer_and_the_next_task_gets_another_worker(worker, task, seconds, reason) -> None:
    before = worker.ask({"kind": "work"}, b"x", 60)[0]["pid"]

    said, payload = worker.ask(task, b"abc", seconds)

    assert payload == b""
    assert re.search(reason, said["failed"])
    assert not psutil.pid_exists(before)
    after = worker.ask({"kind": "work"}, b"x", 60)
    assert after[1] == b"x"
    assert after[0]["pid"] != before


def test_a_worker_that_cannot_start_is_a_failure_of_the_task() -> None:
    worker = WorkerProcess([sys.executable, "-c", "raise SystemExit(3)"], Resources())

    said, _ = worker.ask({"kind": "work"}, b"", 5)

    assert "exit code 3" in said["failed"]


def test_a_worker_that_calls_itself_spent_answers_and_is_replaced(worker) -> None:
    said, payload = worker.ask({"kind": "last"}, b"x", 60)

    assert payload == b"x"
    assert "spent" not in said
    assert not psutil.pid_exists(said["pid"])
    assert worker.ask({"kind": "work"}, b"x", 60)[0]["pid"] != said["pid"]


def test_none_is_left_behind(worker) -> None:
    pid = worker.ask({"kind": "work"}, b"", 60)[0]["pid"]

    worker.end()

    assert not psutil.pid_exists(pid)
