"""Workers that answer, raise, die once and die twice."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from fedsca_pipeline.federation.fleets.worker_pool import Died, Raised, Report, Work, WorkerPool

# Workers find the functions of this file by the name that pytest imports it by.
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@dataclass(frozen=True)
class Job:
    """A task that holds the function to call."""

    name: str
    do: Callable[..., Any]
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.name


@contextmanager
def start(equipment: str, settings: str) -> Iterator[Work[Job, Any]]:
    if settings == "raises":
        raise ValueError(f"no {equipment} here")
    if settings == "dies":
        os._exit(3)

    def work(job: Job, report: Report) -> Any:
        return job.do(report, *job.arguments) if job.do is not equipped else (equipment, settings)

    yield work


def equipped() -> None:
    """Stands for the answer that ``start`` itself gives."""


def double(report: Report, number: int) -> int:
    return 2 * number


def process(report: Report) -> int:
    return os.getpid()


def count(report: Report, to: int) -> str:
    for number in range(to):
        report(number)
    return "counted"


def warn(report: Report, words: str) -> None:
    logging.getLogger("a.worker").warning(words)
    logging.getLogger("a.worker").debug("not these")


def meet(report: Report, mine: Path, other: Path) -> None:
    """End only if another worker is at work too."""
    mine.touch()
    while not other.exists():
        time.sleep(0.005)


def die(report: Report, folder: Path, times: int) -> str:
    """Kill the worker on the first ``times`` attempts."""
    attempt = len(list(folder.iterdir())) + 1
    (folder / str(attempt)).touch()
    if attempt <= times:
        os._exit(7)
    return f"attempt {attempt}"


def hold(report: Report) -> None:
    report(os.getpid())
    time.sleep(600)


def fail(report: Report, error: Exception | type[Exception], *arguments: Any) -> None:
    raise error(*arguments)


def opened_lambda(report: Report) -> Callable[[], None]:
    return lambda: None


def report_lambda(report: Report) -> None:
    report(lambda: None)


class TwoArgumentsError(Exception):
    """Cannot be unpickled: it passes on one argument and needs two."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Unreadable:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return fail, (None, EOFError, "cannot be unpickled")


def pool(workers: int | list[str] = 1, **hooks: Any) -> WorkerPool[Job, Any]:
    names = workers if isinstance(workers, list) else [f"worker {number}" for number in range(workers)]
    return WorkerPool(start, "equipment", names, **hooks)


def outcomes(of: WorkerPool[Job, Any], *jobs: Job) -> dict[str, Any]:
    return {job.name: outcome for job, outcome in of.run(jobs)}


def workers() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def test_every_task_is_answered_whatever_the_number_of_workers() -> None:
    jobs = [Job(f"double {number}", double, (number,)) for number in range(7)]

    for count in (1, 3):
        with pool(count) as opened:
            assert outcomes(opened, *jobs) == {f"double {number}": 2 * number for number in range(7)}
            assert outcomes(opened) == {}


def test_a_worker_has_the_equipment_and_its_own_settings() -> None:
    with pool(["north"]) as opened:
        assert outcomes(opened, Job("equipped", equipped)) == {"equipped": ("equipment", "north")}


def test_tasks_run_at_the_same_time_and_answers_come_as_they_end(tmp_path: Path) -> None:
    first, second, end = tmp_path / "first", tmp_path / "second", tmp_path / "end"
    jobs = [Job("waits", meet, (first, end)), Job("meets", meet, (second, first)), Job("ends", meet, (end, first))]

    with pool(2) as opened:
        assert [job.name for job, _ in opened.run(jobs)] in (["meets", "ends", "waits"], ["meets", "waits", "ends"])


def test_a_task_is_requested_when_a_worker_is_free_and_can_depend_on_the_answers() -> None:
    answers = [1]

    def until_100() -> Iterator[Job]:
        while answers[-1] < 100:
            yield Job("double", double, (answers[-1],))

    with pool() as opened:
        for _, answer in opened.run(until_100()):
            answers.append(answer)

    assert answers == [1, 2, 4, 8, 16, 32, 64, 128]


def test_no_more_tasks_are_requested_than_workers_are_free() -> None:
    asked: list[int] = []
    jobs = (asked.append(number) or Job(f"double {number}", double, (number,)) for number in range(9))

    with pool(2) as opened:
        ahead = [len(asked) - done for done, _ in enumerate(opened.run(jobs))]

    assert len(asked) == 9
    assert max(ahead) == 2


def test_a_task_whose_worker_dies_is_tried_once_more_before_any_other(tmp_path: Path, caplog) -> None:
    dead: list[str] = []
    jobs = [Job("first", process), Job("dies", die, (tmp_path, 1)), Job("last", process)]

    with pool(on_death=lambda job: dead.append(job.name)) as opened:
        answered = {job.name: outcome for job, outcome in opened.run(jobs)}
        assert workers() == {answered["last"]}

    assert list(answered) == ["first", "dies", "last"]
    assert answered["dies"] == "attempt 2"
    assert answered["first"] != answered["last"]
    assert dead == ["dies"]
    assert "dies: its worker died (exit code 7); it is tried once more" in caplog.text


def test_a_task_whose_worker_dies_twice_is_lost_and_the_others_are_not(tmp_path: Path) -> None:
    dead: list[str] = []
    jobs = [Job("dies", die, (tmp_path, 9)), *(Job(f"double {number}", double, (number,)) for number in range(3))]

    with pool(2, on_death=lambda job: dead.append(job.name)) as opened:
        answered = outcomes(opened, *jobs)
        assert len(workers()) == 2

    assert answered == {
        "dies": Died("its worker died twice (exit code 7)"),
        "double 0": 0,
        "double 1": 2,
        "double 2": 4,
    }
    assert dead == ["dies", "dies"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_task_that_raises_is_an_outcome_and_its_worker_continues() -> None:
    jobs = [Job("before", process), Job("bad", fail, (OSError, 2, "gone")), Job("after", process)]

    with pool() as opened:
        answered = outcomes(opened, *jobs)

    assert answered["before"] == answered["after"]
    error = answered["bad"].error
    assert isinstance(error, FileNotFoundError)
    assert error.__notes__[0].startswith("In bad:\nTraceback")
    assert "in fail" in error.__notes__[0]


@pytest.mark.parametrize("kind", [EOFError, BrokenPipeError, ConnectionResetError])
def test_an_error_of_a_task_s_own_pipes_does_not_end_the_worker(kind: type[Exception]) -> None:
    with pool() as opened:
        answered = outcomes(opened, Job("bad", fail, (kind, "mine")), Job("good", double, (1,)))

    assert isinstance(answered["bad"], Raised)
    assert isinstance(answered["bad"].error, kind)
    assert answered["good"] == 2


def test_a_value_that_cannot_be_pickled_is_an_error_of_its_task() -> None:
    with pool() as opened:
        answered = outcomes(
            opened,
            Job("answer", opened_lambda),
            Job("report", report_lambda),
            Job("task", double, (Unreadable(),)),
            Job("error", fail, (TwoArgumentsError, "this", "that")),
        )

    errors = {name: str(raised.error) for name, raised in answered.items() if isinstance(raised, Raised)}
    assert errors.keys() == {"answer", "report", "task", "error"}
    assert "lambda" in errors["answer"]
    assert "lambda" in errors["report"]
    assert errors["task"] == "cannot be unpickled"
    assert errors["error"] == "TwoArgumentsError: this and that"


def test_reports_arrive_in_order_and_before_the_answer() -> None:
    heard: list[Any] = []

    with pool(on_report=heard.append) as opened:
        for job, outcome in opened.run([Job("three", count, (3,)), Job("two", count, (2,))]):
            heard.append((job.name, outcome))

    assert heard == [0, 1, 2, ("three", "counted"), 0, 1, ("two", "counted")]


def test_workers_log_through_this_process(caplog) -> None:
    caplog.set_level(logging.INFO)

    with pool() as opened:
        outcomes(opened, Job("warns", warn, ("take care",)))

    assert [record.message for record in caplog.records if record.name == "a.worker"] == ["take care"]


def test_an_error_of_a_worker_s_start_is_raised_here() -> None:
    with pytest.raises(ValueError, match="no equipment here") as raised, pool(["raises"]) as opened:
        outcomes(opened, Job("never", process))

    assert raised.value.__notes__[0].startswith("In a worker's start:\nTraceback")


def test_a_task_is_lost_if_no_worker_survives_its_start() -> None:
    with pool(["dies"]) as opened:
        assert outcomes(opened, Job("never", process)) == {"never": Died("its worker died twice (exit code 3)")}


def test_workers_stay_between_runs_and_end_with_the_pool() -> None:
    with pool(2) as opened:
        running = workers()
        assert len(running) == 2
        used = {*outcomes(opened, Job("a", process)).values(), *outcomes(opened, Job("b", process)).values()}
        assert used <= running

    assert workers() == set()


def test_workers_end_even_at_work_when_an_error_leaves_the_pool() -> None:
    class Interrupted(BaseException):
        """Stands for Ctrl-C."""

        @classmethod
        def now(cls, _: object) -> Self:
            raise cls

    with pytest.raises(Interrupted), pool(2, on_report=Interrupted.now) as opened:
        outcomes(opened, Job("holds", hold), Job("holds, too", hold))

    assert workers() == set()


def test_a_worker_that_is_busy_with_an_earlier_run_is_replaced() -> None:
    dead: list[str] = []

    with pool(2, on_death=lambda job: dead.append(job.name)) as opened:
        for job, _ in opened.run([Job("holds", hold), Job("ends", process)]):
            assert job.name == "ends"
            break
        answered = outcomes(opened, *(Job(str(number), double, (number,)) for number in range(4)))

    assert answered == {"0": 0, "1": 2, "2": 4, "3": 6}
    assert dead == ["holds"]


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# Two workers at work and one that waits; the fork server imports nothing early, so that this is quick.
KILLED = """
import json, multiprocessing, os, signal
from fedsca_pipeline.federation.fleets import forkserver
from tests.federation.fleets.test_worker_pool import Job, hold, pool

forkserver._PRELOADED = ()
at_work = []

def hear(pid):
    at_work.append(pid)
    if len(at_work) == 2:
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

with pool(3, on_report=hear) as opened:
    list(opened.run([Job("one", hold), Job("two", hold)]))
"""


def test_workers_do_not_outlive_a_parent_that_was_killed() -> None:
    if not Path("/proc/self/stat").is_file():
        pytest.skip("this system has no /proc to find processes in")
    command = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    # Its workers hold its output open as long as they live.
    printed, _ = command.communicate(timeout=60)
    left = json.loads(printed)

    limit = time.monotonic() + 30
    while any(map(alive, left)) and time.monotonic() < limit:
        time.sleep(0.01)

    assert len(left) == 3
    assert not any(map(alive, left))
