"""A site's MLflow runs are deleted for good, and what their parents show of every site."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.tracking import forget
from fedsca_pipeline.tracking.forget import ForgettingWriter
from fedsca_pipeline.tracking.run import Tracker
from fedsca_pipeline.tracking.writer import TrackingConfig

DESCRIPTION = {
    "fingerprint": "0123456789abcdef",
    "configuration": {"federation": {"strategy": "fedsca"}, "foundation": {"name": "random"}, "run": {"seed": 0}},
    "data": {"north": "d0", "south": "d1"},
    "foundation": "f" * 64,
    "code": "c0de",
    "threads": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database of one training run and one comparison, of two sites each."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracker = Tracker(TrackingConfig(), folder, "kedro run")
    tracker.open(DESCRIPTION)
    for site in ("north", "south"):
        for name in ("test_scores", "report"):
            path = folder / site / f"{name}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"of {site}")
            tracker.saved(f"{site}.{name}", None, path)
    for name in ("final_table", "run_description", "learning_curves"):
        path = folder / f"{name}.json"
        path.write_text("north, south")
        tracker.saved(name, None, path)
    record = {"round": 1, "final": False, "weights": [1], "sites": {}}
    tracker.saved("round_metrics", {"r": record}, None)
    tracker.close("FINISHED")
    client = MlflowClient(tracker.uri)
    experiment = client.create_experiment("fedsca-comparison", artifact_location=(folder / "mlartifacts").as_uri())
    parent = client.create_run(experiment).info.run_id
    client.log_text(parent, "north, south", "comparison/table.csv")
    cell = client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
    for site in ("north", "south"):
        client.create_run(experiment, tags={"mlflow.parentRunId": cell, "fedsca.site": site})
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_site_s_runs_go_from_the_database_and_its_artifacts_and_rows_from_the_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They are more than MLflow returns at once.
    monkeypatch.setattr("fedsca_pipeline.tracking.writer._PAGE", 1)
    writer = ForgettingWriter(TrackingConfig(), place, "")
    client = MlflowClient(writer.uri)
    assert len(writer.runs_of("north")) == 2

    assert writer.forget("north") == 2

    assert writer.runs_of("north") == []
    assert len(writer.runs_of("south")) == 2
    with sqlite3.connect(place / "mlflow.db") as database:
        assert database.execute("select count(*) from tags where value = 'north'").fetchone() == (0,)
    texts = {path.read_text() for path in (place / "mlartifacts").rglob("*") if path.is_file()}
    assert texts == {"of south"}
    experiments = [found.experiment_id for found in client.search_experiments()]
    assert not [run for run in client.search_runs(experiments, "", ViewType.ALL) if "north" in str(run.data.tags)]


def test_the_same_deletion_again_finds_nothing(place: Path) -> None:
    assert ForgettingWriter(TrackingConfig(), place, "").forget("nowhere") == 0


def test_without_tracking_or_database_nothing_is_made_and_that_is_said(tmp_path: Path) -> None:
    absent, disabled = (ForgettingWriter(TrackingConfig(enabled=on), tmp_path, "") for on in (True, False))

    assert absent.runs_of("north") == disabled.runs_of("north") == []
    assert absent.forget("north") == 0
    assert list(tmp_path.iterdir()) == []
    assert any("enabled is false" in left for left in disabled.out_of_reach())
    assert not any("enabled is false" in left for left in absent.out_of_reach())


def test_a_server_is_said_to_keep_deleted_runs(tmp_path: Path) -> None:
    server = ForgettingWriter(TrackingConfig(tracking_uri="http://127.0.0.1:9"), tmp_path, "")

    assert any("until mlflow gc runs there" in left for left in server.out_of_reach())


def test_a_database_that_does_not_forget_is_an_error_with_its_cure(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback\ndatabase is locked\n")
    monkeypatch.setattr(forget.subprocess, "run", lambda *_, **__: failed)

    with pytest.raises(TrackingError, match=r"database is locked.*run the same command again"):
        ForgettingWriter(TrackingConfig(), place, "").forget("south")
