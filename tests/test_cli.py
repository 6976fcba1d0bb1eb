from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from kedro.io import DatasetError

from fedsca_pipeline import cli
from fedsca_pipeline.errors import DataError, WeightsError
from fedsca_pipeline.hooks import slices
from fedsca_pipeline.hooks.root_lock import RootLock
from fedsca_pipeline.hooks.up_to_date import RunUpToDate
from fedsca_pipeline.pipeline_registry import register_pipelines
from fedsca_pipeline.settings import ROOT_LOCK, TRACKING


@pytest.fixture
def kedro_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs ``kedro run`` with what Kedro does replaced by raising an error."""

    def run(error: BaseException, *given: str) -> Any:
        def raising(**options: Any) -> None:
            raise error

        monkeypatch.setattr(cli.kedro_run, "callback", raising)
        return CliRunner().invoke(cli.run, given)

    return run


@pytest.mark.parametrize(
    "error", [DataError("site a: broken"), WeightsError("no weights"), DatasetError("cannot be saved")]
)
def test_errors_for_the_user_are_one_message_without_a_traceback(kedro_run, error: Exception) -> None:
    result = kedro_run(error)

    assert result.exit_code == 1
    assert result.output == f"Error: {error}\n"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("comparison.only=fedsca,local,run.seed=3", {"comparison": {"only": ["fedsca", "local"]}, "run": {"seed": 3}}),
        ("run.seed=3,comparison.seeds=[1, 2]", {"comparison": {"seeds": [1, 2]}, "run": {"seed": 3}}),
        ("comparison.seeds=[1]", {"comparison": {"seeds": [1]}}),
        ("a.b=1,a.c=x y,a.d=null,source=/data/x", {"a": {"b": 1, "c": "x y", "d": None}, "source": "/data/x"}),
        ("", {}),
    ],
)
def test_params_take_lists_and_all_that_kedro_takes(monkeypatch, given: str, read: dict[str, Any]) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(cli.kedro_run, "callback", lambda **found: options.update(found))

    result = CliRunner().invoke(cli.run, ["--params", given])

    assert result.exit_code == 0, result.output
    assert options["params"] == read


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("comparison.only=[fedsca,local", "write comparison.only=one,two or comparison.only=[one,two]"),
        ("fedsca,run.seed=1", "Item `fedsca` must contain a key"),
        ("=1", "cannot be an empty string"),
    ],
)
def test_params_that_cannot_be_read_are_named(given: str, said: str) -> None:
    result = CliRunner().invoke(cli.run, ["--params", given])

    assert result.exit_code == 2
    assert said in result.output


def test_a_full_disk_names_the_file(kedro_run) -> None:
    result = kedro_run(OSError(28, "No space left on device", "/data/06_models/x"))

    assert result.exit_code == 1
    assert "No space left on device: /data/06_models/x" in result.output


def test_a_fault_of_the_program_is_not_hidden(kedro_run) -> None:
    result = kedro_run(ZeroDivisionError("oops"))

    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_marks_the_run_as_killed_and_exits_with_130(kedro_run, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(TRACKING, "interrupted", lambda: closed.append("KILLED"))

    result = kedro_run(KeyboardInterrupt())

    assert result.exit_code == 130
    assert closed == ["KILLED"]
    assert "resumes from the last finished round" in result.output


def test_an_up_to_date_run_ends_well_with_its_table(kedro_run) -> None:
    row = {"Dice before": 0.1, "Dice after": 0.7, "Dice chosen": 0.8, "HD95": 3.0, "bytes up": 5, "bytes down": 6}
    table = {"north": {**row, "best round": 2}, "mean over sites": {**row, "best round": None}}

    volume = {"volume Dice": 0.765, "volume HD95 mm": 2.5, "volume ASD mm": 0.5, "volume NSD": 0.9, "volumes": 4}
    volumes = {"north": volume, "mean over sites": volume}

    result = kedro_run(RunUpToDate(table, {"run_id": "abc123", "uri": "sqlite:///mlflow.db"}, volumes))

    assert result.exit_code == 0
    for expected in (
        "up to date",
        "north",
        "0.800",
        "0.765",
        "MLflow run: abc123",
        "mlflow ui --backend-store-uri sqlite:///mlflow.db",
    ):
        assert expected in result.output


def test_kedro_s_own_options_are_all_there() -> None:
    assert {option.name for option in cli.run.params} == {option.name for option in cli.kedro_run.params}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("broken"), ZeroDivisionError("oops")])
def test_the_data_root_is_free_however_a_command_ends(kedro_run, tmp_path, error: BaseException) -> None:
    ROOT_LOCK.take(tmp_path)

    kedro_run(error)

    RootLock().take(tmp_path)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines of this project, which Kedro's own command would register."""
    monkeypatch.setattr(slices, "pipelines", register_pipelines())


def test_a_wrong_name_is_one_line_in_the_place_of_kedro_s_traceback(kedro_run, registered) -> None:
    result = kedro_run(ValueError("Pipeline does not contain nodes named ['tabulat']."), "--nodes=tabulat")

    assert result.exit_code == 1
    assert result.output.startswith("Error: --nodes: there is no 'tabulat' here; did you mean 'tabulate'?")
    assert result.output.count("\n") == 1


def test_a_value_error_that_no_name_explains_is_not_hidden(kedro_run, registered) -> None:
    for given in ((), ("--nodes=tabulate",)):
        assert isinstance(kedro_run(ValueError("oops"), *given).exception, ValueError)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--async", "--async: rounds are saved one after the other"),
        ("--runner-params=is_async=true", "--async: rounds are saved one after the other"),
        ("--runner=ParalelRunner", "did you mean 'ParallelRunner'"),
        ("--runner=ThreadRunner", "--runner: 'ThreadRunner' cannot run this project"),
    ],
)
def test_a_runner_that_cannot_work_is_refused_before_anything_runs(kedro_run, given: str, said: str) -> None:
    result = kedro_run(AssertionError("it ran"), given)

    assert result.exit_code == 1
    assert said in result.output
    assert result.output.count("\n") == 1
