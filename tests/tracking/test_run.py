from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import Engine, event

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.files import open_locked
from fedsca_pipeline.tracking import writer
from fedsca_pipeline.tracking.run import Tracker
from fedsca_pipeline.tracking.writer import TrackingConfig, flat

NESTED = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda values: st.dictionaries(st.sampled_from("abc"), values, max_size=3),
    max_leaves=8,
)


def leaves(value: Any) -> int:
    return sum(map(leaves, value.values())) if isinstance(value, dict) and value else 1


class TestFlat:
    def test_keys_are_dotted_and_values_are_text(self) -> None:
        assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": "1", "a.d": "[1, 2]", "e": "None"}

    def test_an_empty_mapping_is_a_value(self) -> None:
        assert flat({"a": {}}) == {"a": "{}"}
        assert flat({}) == {}

    @given(values=st.dictionaries(st.sampled_from("abc"), NESTED, max_size=3))
    def test_no_value_is_lost(self, values: dict[str, Any]) -> None:
        assert len(flat(values)) == (leaves(values) if values else 0)


DYING = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from fedsca_pipeline.tracking.run import Tracker, TrackingConfig

done = []

@event.listens_for(Engine, "after_cursor_execute")
def die(*_):
    done.append(1)
    if len(done) == 120:
        os.kill(os.getpid(), signal.SIGKILL)

Tracker(TrackingConfig(), Path(sys.argv[1]), "").open({})
"""
"""A command that is killed while it creates the database."""

DESCRIPTION = {
    "fingerprint": "0123456789abcdef",
    "configuration": {"federation": {"strategy": "fedsca"}, "foundation": {"name": "random"}, "run": {"seed": 0}},
    "data": {"site_a": "d0", "site_b": "d1"},
    "foundation": "f" * 64,
    "code": "c0de",
    "threads": 1,
}


def record(round_: int, *, final: bool = False) -> dict[str, Any]:
    entry = {"loss": 0.5, "dice_validation": 0.1 * round_, "bytes_up": 10, "seconds": 1.0, "absent": None}
    entry |= {"self_weight": 0.5, "bytes_down": 10}
    sites = {site: dict(entry, loss=None if final else 0.5) for site in DESCRIPTION["data"]}
    return {f"run/round_{round_}": {"round": round_, "final": final, "sites": sites, "weights": []}}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def config(database: Path, request: pytest.FixtureRequest) -> TrackingConfig:
    """One experiment per test."""
    return TrackingConfig(tracking_uri=f"sqlite:///{database}", experiment=request.node.name)


@pytest.fixture
def tracker(config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker(config, tmp_path, "kedro run")


def parameters_after(resumed: Tracker, description: dict[str, Any]) -> dict[str, str]:
    """Return the run's parameters after a second command has resumed it."""
    resumed.open(description)
    assert resumed.run_id is not None
    return MlflowClient(tracking_uri=resumed.uri).get_run(resumed.run_id).data.params


def all_steps(client: MlflowClient, run_id: str) -> dict[str, list[int]]:
    run = client.get_run(run_id)
    return {key: [point.step for point in client.get_metric_history(run_id, key)] for key in run.data.metrics}


class TestTracker:
    # With pages of two runs, the parent and a site are not on the first one, as with more than 999 sites.
    @pytest.mark.parametrize("page", [1000, 2])
    def test_a_repeated_command_resumes_the_run_and_logs_no_step_twice(
        self, tracker: Tracker, config: TrackingConfig, tmp_path: Path, page: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "_PAGE", page)
        tracker.open(DESCRIPTION)
        first = tracker.run_id
        tracker.saved("round_metrics", record(1), None)

        resumed = Tracker(config, tmp_path, "kedro run")
        resumed.open(DESCRIPTION)
        for chunk in (record(1), record(2), record(3, final=True)):
            resumed.saved("round_metrics", chunk, None)
        resumed.close("FINISHED")

        client = MlflowClient(tracking_uri=config.tracking_uri)
        found = client.search_runs([client.get_experiment_by_name(config.experiment).experiment_id])
        assert first is not None
        assert len(found) == 3
        assert {run.info.status for run in found} == {"FINISHED"}
        for run in found:
            steps = all_steps(client, run.info.run_id)
            assert steps["loss" if run.info.run_id != first else "loss_mean"] == [1, 2]
            assert steps["dice_validation" if run.info.run_id != first else "dice_validation_mean"] == [0, 1, 2]

    def test_a_command_killed_between_two_sites_is_completed_by_the_next(
        self, tracker: Tracker, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tracker.open(DESCRIPTION)
        logged = MlflowClient.log_batch

        def killed_after_the_first(client: MlflowClient, *args: Any, **kwargs: Any) -> None:
            logged(client, *args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", killed_after_the_first)
            with pytest.raises(KeyboardInterrupt):
                tracker.saved("round_metrics", record(1), None)
        resumed = Tracker(config, tmp_path, "kedro run")
        resumed.open(DESCRIPTION)
        resumed.saved("round_metrics", record(1), None)

        client = MlflowClient(tracking_uri=config.tracking_uri)
        found = client.search_runs([client.get_experiment_by_name(config.experiment).experiment_id])
        assert len(found) == 3
        for run in found:
            assert run.data.metrics
            assert all(len(steps) == 1 for steps in all_steps(client, run.info.run_id).values())

    def test_a_thousand_sites_are_logged_in_a_tenth_of_the_time_of_a_hundred_rounds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The clock counts the seconds of rounds and calls; no run takes them."""
        clock, calls, points = [0.0], [], Counter[tuple[str, str]]()

        class Client:
            def log_batch(self, run_id: str, metrics: Sequence[Any]) -> None:
                assert 0 < len(metrics) <= 1000
                clock[0] += 0.008
                calls.append(run_id)
                points.update((run_id, metric.key) for metric in metrics)

            def set_terminated(self, run_id: str, status: str) -> None:
                """Do nothing."""

        sites = [f"site_{number}" for number in range(1000)]
        entry = record(1)["run/round_1"]["sites"]["site_a"]
        tracker = Tracker(TrackingConfig(), tmp_path, "")
        monkeypatch.setattr(tracker, "_client", Client())
        monkeypatch.setattr(tracker, "_runs", {site: site for site in ("", *sites)})
        monkeypatch.setattr("fedsca_pipeline.tracking.run.time.monotonic", lambda: clock[0])

        for round_ in range(1, 101):
            clock[0] += 1.0
            chunk = {"round": round_, "final": False, "sites": dict.fromkeys(sites, entry), "weights": []}
            tracker.saved("round_metrics", {f"run/round_{round_}": chunk}, None)
        # What is there is seen: the last rounds do not wait for the run's end.
        seen = points["site_7", "loss"]
        tracker.close("FINISHED")

        assert 80 <= seen < 100
        assert {points[site, "loss"] for site in sites} == {points["", "loss_mean"]} == {100}
        assert len(calls) <= 4 * 1001

    def test_after_an_interrupt_within_a_transaction_the_run_can_still_end(
        self, tracker: Tracker, config: TrackingConfig
    ) -> None:
        pressed = []

        def press_ctrl_c(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("INSERT INTO metrics") and not pressed:
                pressed.append(statement)
                signal.raise_signal(signal.SIGINT)

        tracker.open(DESCRIPTION)
        event.listen(Engine, "after_cursor_execute", press_ctrl_c)
        try:
            with pytest.raises(KeyboardInterrupt):
                tracker.saved("round_metrics", record(1), None)
        finally:
            event.remove(Engine, "after_cursor_execute", press_ctrl_c)
        tracker.close("KILLED")

        client = MlflowClient(tracking_uri=config.tracking_uri)
        found = client.search_runs([client.get_experiment_by_name(config.experiment).experiment_id])
        assert {run.info.status for run in found} == {"KILLED"}
        assert all(run.data.metrics for run in found)

    def test_the_next_command_logs_parameters_that_a_killed_command_did_not(
        self, tracker: Tracker, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(client: MlflowClient, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MlflowClient, "log_batch", killed)
            tracker.open(DESCRIPTION)

        assert parameters_after(Tracker(config, tmp_path, ""), DESCRIPTION)["federation.strategy"] == "fedsca"

    def test_the_next_command_completes_parameters_that_a_killed_command_logged_in_part(
        self, tracker: Tracker, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {f"option_{number:03d}": number for number in range(150)}
        description = {**DESCRIPTION, "configuration": {**DESCRIPTION["configuration"], "strategies": options}}
        logged = SqlAlchemyStore.log_batch

        def killed_after_the_first(*args: Any, **kwargs: Any) -> None:
            logged(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SqlAlchemyStore, "log_batch", killed_after_the_first)
            tracker.open(description)

        assert parameters_after(Tracker(config, tmp_path, ""), description) == flat(description["configuration"])

    def test_another_fingerprint_is_another_run(self, tracker: Tracker, config: TrackingConfig, tmp_path: Path) -> None:
        tracker.open(DESCRIPTION)
        other = Tracker(config, tmp_path, "kedro run")

        other.open({**DESCRIPTION, "fingerprint": "another"})

        assert None is not other.run_id != tracker.run_id

    def test_disabled_tracking_does_nothing(self, tmp_path: Path) -> None:
        tracker = Tracker(TrackingConfig(enabled=False, tracking_uri=f"sqlite:///{tmp_path}/m.db"), tmp_path, "")

        tracker.open(DESCRIPTION)
        tracker.saved("round_metrics", record(1), None)
        tracker.close("FINISHED")

        assert tracker.run_id is None
        assert list(tmp_path.iterdir()) == []

    def test_an_unreadable_database_is_named_with_the_cure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (tmp_path / "mlflow.db").write_bytes(b"no database at all, but long enough to be looked at" * 100)

        with pytest.raises(TrackingError, match=r"MLflow at sqlite:///.*mlflow\.db: (.|\n)*enabled: false"):
            Tracker(TrackingConfig(), tmp_path, "").open(DESCRIPTION)

    def test_a_command_killed_while_it_creates_the_database_leaves_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        command = [sys.executable, "-c", DYING, str(tmp_path)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "mlflow.db").exists()

        tracker = Tracker(TrackingConfig(), tmp_path, "kedro run")
        tracker.open(DESCRIPTION)

        assert MlflowClient(tracking_uri=tracker.uri).get_run(tracker.run_id).info.status == "RUNNING"
        assert list(tmp_path.glob("*.partial")) == []

    def test_what_a_killed_command_left_goes_also_if_another_command_created_the_database(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shutil.copy(database, tmp_path / "mlflow.db")
        (tmp_path / ".mlflow.db.ab12.partial").mkdir()
        (tmp_path / ".mlflow.db.ab12.partial" / "mlflow.db").touch()

        Tracker(TrackingConfig(), tmp_path, "kedro run").open(DESCRIPTION)

        assert list(tmp_path.glob("*.partial")) == []

    def test_a_database_that_another_command_creates_for_ever_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setattr(writer, "_CREATION_SECONDS", 0.0)
        with (
            open_locked(tmp_path / ".mlflow.db.lock"),
            pytest.raises(TrackingError, match="another command is still creating it"),
        ):
            Tracker(TrackingConfig(), tmp_path, "").open(DESCRIPTION)

    def test_a_database_that_another_command_created_meanwhile_is_not_replaced(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setattr(MlflowClient, "search_experiments", lambda *_, **__: shutil.copy(database, path))
        path, tracker = tmp_path / "mlflow.db", Tracker(TrackingConfig(), tmp_path, "kedro run")
        MlflowClient(tracking_uri=f"sqlite:///{database}").create_experiment("created meanwhile")

        tracker.open(DESCRIPTION)

        assert MlflowClient(tracking_uri=tracker.uri).get_experiment_by_name("created meanwhile")

    def test_a_relative_database_path_starts_at_the_project(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

        assert Tracker(TrackingConfig(), tmp_path, "").uri == f"sqlite:///{tmp_path / 'mlflow.db'}"

    def test_the_environment_s_uri_takes_precedence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")

        assert Tracker(TrackingConfig(), tmp_path, "").uri == "http://mlflow.example"

    def test_a_misspelt_key_of_mlflow_yml_is_refused(self) -> None:
        with pytest.raises(ValueError, match="enabeld"):
            TrackingConfig.model_validate({"enabeld": False})
