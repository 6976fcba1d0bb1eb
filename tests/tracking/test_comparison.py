from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.tracking.comparison import ComparisonTracker
from fedsca_pipeline.tracking.writer import TrackingConfig

PLAN = {
    "base": {"federation": {"rounds": 2}},
    "comparison": {"methods": {f"m{number}": {"options": {"a": 1, "b": 2}} for number in range(80)}},
    "data": {"a": "d"},
}


def result(fingerprint: str = "c0ffee", **changes: Any) -> dict[str, Any]:
    site = {"round": 2, "dice_validation": 0.75, "images": ["x", "y"], "dice": [0.2, 0.4], "hd95": [3.0, 5.0]}
    sites = {"a": site, "b": {**site, "dice": [0.6, 0.8]}}
    reported = {"dice_validation": 0.5, "loss": 1.0}
    return {
        "fingerprint": fingerprint,
        "code": "c0de",
        "method": "strong",
        "left_out": None,
        "description": {
            "seed": 3,
            "train_images": None,
            "configuration": {
                "strategies": {"fedprox": {"mu": 0.5}},
                "training": {},
                "adapters": {},
                "federation": {"rounds": 2},
            },
        },
        "sites": sites,
        "rounds": [
            {
                "round": 1,
                "final": False,
                "bytes": 9,
                "accepted": ["a", "b"],
                "sites": {"a": reported, "b": {"loss": 3.0}},
            },
            {"round": 2, "final": True, "bytes": 9, "accepted": [], "sites": {"a": {"dice_validation": 0.25}}},
        ],
        "traffic": {"bytes_up": 10.0, "bytes_down": 20.0, "bytes_to_95": None},
        "unseen": {},
        "seconds": 2.5,
        "peak_memory": None,
        **changes,
    }


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def config(database: Path, request: pytest.FixtureRequest) -> TrackingConfig:
    """One experiment per test."""
    return TrackingConfig(tracking_uri=f"sqlite:///{database}", experiment=request.node.name)


@pytest.fixture
def opened(config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ComparisonTracker]:
    """Open a tracker, as every command does."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(plan: Any = PLAN) -> ComparisonTracker:
        tracker = ComparisonTracker(config, tmp_path, "kedro run --pipeline=comparison")
        tracker.open(plan)
        return tracker

    return make


@pytest.fixture
def client(config: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=config.tracking_uri)


@pytest.fixture
def below(client: MlflowClient, config: TrackingConfig) -> Callable[[str | None], list[Run]]:
    """Return the child runs of a run; of None: the parent runs."""

    def find(parent: str | None) -> list[Run]:
        experiment = client.get_experiment_by_name(f"{config.experiment}-comparison").experiment_id
        return [run for run in client.search_runs([experiment]) if run.data.tags.get("mlflow.parentRunId") == parent]

    return find


def test_a_cell_is_a_run_with_a_nested_run_per_site(opened, below, client) -> None:
    tracker = opened()
    tracker.cell(result())

    (child,) = below(tracker.run_id)
    sites = {run.data.tags["fedsca.site"]: run for run in below(child.info.run_id)}
    assert {run.info.status for run in (child, *sites.values())} == {"FINISHED"}
    assert child.info.run_name == "strong-seed3-all-rate0.001"
    expected = {
        "fedsca.method": "strong", "fedsca.strategy": "fedprox", "fedsca.seed": "3", "fedsca.train_images": "all",
        "fedsca.code": "c0de", "fedsca.cell": "c0ffee",
    }  # fmt: skip
    assert expected.items() <= child.data.tags.items()
    # MLflow compares only parameters that both runs have, so defaults are logged, too.
    logged = {
        "method": "strong", "train_images": "all", "strategies.fedprox.mu": "0.5", "federation.wire_dtype": "fp16",
        "adapters.method": "fel",
    }  # fmt: skip
    assert logged.items() <= child.data.params.items()
    assert child.data.metrics == pytest.approx(
        {
            "test dice mean": 0.5, "test dice worst": 0.3, "test dice sd": 0.2, "test hd95 mean": 4.0,
            "bytes_up": 10.0, "bytes_down": 20.0, "seconds": 2.5, "dice_before_round_mean": 0.25, "loss_mean": 2.0,
        }
    )  # fmt: skip
    assert sites["a"].data.metrics == pytest.approx(
        {"test dice": 0.3, "test hd95": 4.0, "dice_validation_best": 0.75, "best_round": 2, "dice_before_round": 0.25,
         "loss": 1.0}
    )  # fmt: skip
    history = client.get_metric_history(sites["a"].info.run_id, "dice_before_round")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]


def test_classes_are_logged_at_each_site_that_has_them(opened, below) -> None:
    tracker, found = opened(), result()
    found["sites"]["a"]["dice_by_class"] = {"1": [0.2, 0.4], "3": [1.0, 0.0]}

    tracker.cell(found)

    (child,) = below(tracker.run_id)
    of_a = next(run for run in below(child.info.run_id) if run.data.tags["fedsca.site"] == "a").data.metrics
    by_class = {name: value for name, value in of_a.items() if name.startswith("test dice class")}
    assert by_class == pytest.approx({"test dice class 1": 0.3, "test dice class 3": 0.5})


def test_a_cell_logged_twice_makes_one_child(opened, below) -> None:
    tracker = opened()

    tracker.cell(result())
    tracker.cell(result())

    assert len(below(tracker.run_id)) == 1


@pytest.mark.parametrize("page", [1000, 1])
def test_the_same_plan_resumes_the_run_and_logs_no_cell_again(opened, below, page: int, monkeypatch) -> None:
    monkeypatch.setattr("fedsca_pipeline.tracking.writer._PAGE", page)
    first = opened()
    run_id = first.run_id
    first.cell(result())
    first.close("KILLED")
    (parent,) = below(None)
    assert parent.info.status == "KILLED"

    second = opened()
    second.cell(result())
    second.cell(result("beef", left_out="b"))
    second.close("FINISHED")
    third = opened()
    third.cell(result("beef", left_out="b"))
    third.close("FINISHED")

    (parent,) = below(None)
    assert parent.info.run_id == run_id
    assert parent.info.status == "FINISHED"
    # More parameters than MLflow takes at once.
    assert len(parent.data.params) == 161
    cells = [(run.data.tags["fedsca.cell"], run.data.tags["fedsca.left_out"]) for run in below(run_id)]
    assert sorted(cells) == [("beef", "b"), ("c0ffee", "")]


def test_another_plan_is_another_run(opened, below) -> None:
    assert opened().run_id != opened({**PLAN, "data": {"a": "new"}}).run_id
    assert len(below(None)) == 2


def test_a_partially_logged_cell_is_logged_again(opened, below, monkeypatch) -> None:
    tracker = opened()
    with monkeypatch.context() as patch:
        patch.setattr(ComparisonTracker, "_log_metrics", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracker.cell(result())

    again = opened()
    again.cell(result())

    whole = [run for run in below(again.run_id) if run.data.tags.get("fedsca.cell") == "c0ffee"]
    assert len(whole) == 1
    assert len(below(whole[0].info.run_id)) == 2


@pytest.mark.parametrize("batches", [0, 1])
def test_the_next_command_logs_parameters_that_a_killed_command_did_not(
    opened, below, monkeypatch, batches: int
) -> None:
    logged, count = SqlAlchemyStore.log_batch, itertools.count()

    def killed(*args: Any, **kwargs: Any) -> None:
        if next(count) == batches:
            raise KeyboardInterrupt
        logged(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SqlAlchemyStore, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            opened()
    (before,) = below(None)
    assert len(before.data.params) == 100 * batches

    opened()

    (parent,) = below(None)
    assert len(parent.data.params) == 161


def test_only_files_and_figures_of_the_comparison_are_artifacts(opened, client, tmp_path) -> None:
    tracker = opened()
    for name in ("results.md", "plan.json", "other.json"):
        (tmp_path / name).write_text("text")

    tracker.saved("comparison_page", tmp_path / "results.md")
    tracker.saved("comparison_plan", tmp_path / "plan.json")
    tracker.saved("comparison_scratch", tmp_path / "other.json")
    tracker.saved("comparison_cells", None)
    tracker.figures({"8_images/curves": Figure()})

    def names(folder: str) -> set[str]:
        return {item.path for item in client.list_artifacts(tracker.run_id, folder)}

    assert names("comparison") == {
        "comparison/results.md",
        "comparison/plan.json",
        "comparison/results_figures",
    }
    assert names("comparison/results_figures/8_images") == {"comparison/results_figures/8_images/curves.png"}


@pytest.mark.parametrize(
    "act",
    [
        lambda tracker: tracker.cell(result("new")),
        lambda tracker: tracker.figures({"curves": Figure()}),
        lambda tracker: tracker.saved("comparison_page", Path(__file__)),
        lambda tracker: tracker.close("FINISHED"),
    ],
)
def test_a_failure_of_mlflow_is_a_tracking_error_that_says_what_to_do(opened, monkeypatch, act) -> None:
    tracker = opened()

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("disk is full")

    for name in ("create_run", "log_figure", "log_artifact", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, fail)

    with pytest.raises(TrackingError, match=r"MLflow at sqlite:///.*disk is full.*enabled: false"):
        act(tracker)


def test_an_unreadable_database_is_named_with_the_cure(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but long enough to be looked at" * 100)

    with pytest.raises(TrackingError, match=r"MLflow at sqlite:///.*mlflow\.db: (.|\n)*enabled: false"):
        ComparisonTracker(TrackingConfig(), tmp_path, "").open(PLAN)


def test_disabled_tracking_does_nothing(tmp_path) -> None:
    config = TrackingConfig(enabled=False, tracking_uri=f"sqlite:///{tmp_path}/m.db")
    tracker = ComparisonTracker(config, tmp_path, "")

    tracker.open(PLAN)
    tracker.cell(result())
    tracker.saved("comparison_page", Path(__file__))
    tracker.figures({"curves": Figure()})
    tracker.close("FINISHED")

    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []
