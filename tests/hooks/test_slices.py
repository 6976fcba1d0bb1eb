"""Options of the command line that name what is not there, or what cannot work, end in one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from kedro.pipeline import Pipeline

from fedsca_pipeline.errors import ConfigError, RefusedImportError
from fedsca_pipeline.hooks import slices
from fedsca_pipeline.hooks.slices import check_runner, check_slices
from fedsca_pipeline.pipeline_registry import raw_folder, register_pipelines

PARALLEL = "<kedro.runner.parallel_runner.ParallelRunner object at 0x1>"


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Pipeline]:
    """The pipelines of two sites."""
    for site in ("north", "south"):
        (tmp_path / site / "images").mkdir(parents=True)
    token = raw_folder.set(tmp_path)
    found = register_pipelines()
    raw_folder.reset(token)
    monkeypatch.setattr(slices, "pipelines", found)
    return found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"node_names": ["federated_training.trian"]},
            "--nodes: .*'federated_training.trian'.*did you mean 'federated",
        ),
        ({"from_nodes": ["tabulat"]}, "--from-nodes: there is no 'tabulat' here; did you mean 'tabulate'"),
        ({"to_nodes": ["x"]}, "--to-nodes: there is no 'x' here. Allowed: .*preprocessing.north.prepare"),
        ({"tags": ["x"]}, "--tags: there is no 'x' here. Allowed: none"),
        ({"namespaces": ["preprocessing.nort"]}, "--namespaces: .*did you mean 'preprocessing.north'"),
        ({"from_inputs": ["north.maniefst"]}, "--from-inputs: .*did you mean 'north.manifest'"),
        ({"to_outputs": ["final_metric"]}, "--to-outputs: .*did you mean 'final_metrics'"),
        ({"node_names": ["tabulate"], "namespaces": ["preprocessing"]}, "--nodes, --namespaces: .*leave no node"),
    ],
)
def test_a_name_that_is_not_there_is_refused_in_one_line_with_near_ones(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        check_slices(None, given)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (None, {}),
        (["preprocessing"], {"tags": (), "node_names": [], "to_outputs": None}),
        (["preprocessing"], {"namespaces": ["preprocessing.north"]}),
        (["preprocessing"], {"namespaces": ["preprocessing"], "to_outputs": ["north.manifest"]}),
        (["preprocessing", "foundation"], {"node_names": ["fetch_foundation", "preprocessing.south.prepare"]}),
        (["preprocessing"], {"from_inputs": ["params:preprocessing"]}),
    ],
)
def test_names_that_are_there_pass(names: list[str] | None, given: dict[str, Any]) -> None:
    check_slices(names, given)


@pytest.mark.parametrize("name", ["import_sites", "demo_sites", "preprocessing", "foundation", "data_report"])
def test_parallel_runner_may_run_what_shares_nothing_but_files(registry: dict[str, Pipeline], name: str) -> None:
    check_runner(PARALLEL, registry[name])
    for node in registry[name].nodes:
        assert pickle.loads(pickle.dumps(node)).name == node.name


@pytest.mark.parametrize(
    "name", ["training", "federated_training", "evaluation", "comparison", "forget_site", "__default__"]
)
def test_parallel_runner_is_refused_for_anything_else(registry: dict[str, Pipeline], name: str) -> None:
    with pytest.raises(ConfigError, match=r"--runner: ParallelRunner cannot run .*kedro run --pipeline=preprocessing"):
        check_runner(PARALLEL, registry[name])


def test_thread_runner_is_refused_and_the_sequential_one_runs_all(registry: dict[str, Pipeline]) -> None:
    for runner in ("None", "<kedro.runner.sequential_runner.SequentialRunner object at 0x1>"):
        check_runner(runner, registry["__default__"])

    with pytest.raises(ConfigError, match="--runner: ThreadRunner"):
        check_runner("<kedro.runner.thread_runner.ThreadRunner object at 0x1>", registry["preprocessing"])


def test_every_node_can_be_pickled(registry: dict[str, Pipeline]) -> None:
    for pipeline in registry.values():
        pickle.dumps(pipeline.nodes)


def test_a_refused_import_comes_out_of_a_runner_s_process_as_it_went_in() -> None:
    error = RefusedImportError("2 files are broken", {"north": {"broken": [{"file": "a.png"}], "images": 3}})

    back = pickle.loads(pickle.dumps(error))

    assert str(back) == str(error) == "2 files are broken"
    assert back.found == error.found == {"north": {"broken": [{"file": "a.png"}]}}
