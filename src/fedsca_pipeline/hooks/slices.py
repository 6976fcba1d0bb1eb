"""What the options of ``kedro run`` ask for: names that exist, and a runner that can do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from kedro.framework.project import pipelines
from kedro.pipeline import Pipeline

from fedsca_pipeline.errors import ConfigError, suggestion

RUNNERS = ("SequentialRunner", "ParallelRunner")
"""Kedro's runners that this project works with."""

_OPTIONS = {
    "node_names": "--nodes",
    "from_nodes": "--from-nodes",
    "to_nodes": "--to-nodes",
    "tags": "--tags",
    "namespaces": "--namespaces",
    "from_inputs": "--from-inputs",
    "to_outputs": "--to-outputs",
}
SLICES = (*_OPTIONS, "load_versions")
"""Kedro's names of what selects a part of a pipeline."""

# Their nodes share nothing but files, and log nothing to MLflow.
_SIDE_BY_SIDE = ("import_sites", "demo_sites", "preprocessing", "foundation", "data_report")


def check_slices(pipeline_names: Sequence[str] | None, given: Mapping[str, Any]) -> None:
    """Check that the given slices name what is in the pipelines, and leave a node. Kedro passes over an unknown tag.

    Args:
        pipeline_names: names of known pipelines; None or none: the default one.
        given: Kedro's options; other keys than those of slices are not looked at.

    Raises:
        ConfigError: the option, the unknown name and near ones.
    """
    if not any(given.get(key) for key in _OPTIONS):
        return
    whole: Pipeline = reduce(add, (pipelines[name] for name in pipeline_names or ["__default__"]))
    nodes = {node.name for node in whole.nodes}
    known = {
        **dict.fromkeys(("node_names", "from_nodes", "to_nodes"), nodes),
        **dict.fromkeys(("from_inputs", "to_outputs"), whole.datasets()),
        "tags": {tag for node in whole.nodes for tag in node.tags},
        "namespaces": {prefix for node in whole.nodes for prefix in node.namespace_prefixes},
    }
    for key, option in _OPTIONS.items():
        for name in given.get(key) or ():
            if name not in known[key]:
                raise ConfigError(f"{option}: there is no {name!r} here{suggestion(name, sorted(known[key]))}")
    wanted = {("node_namespaces" if key == "namespaces" else key): given.get(key) or None for key in _OPTIONS}
    try:
        whole.filter(**wanted)
    except ValueError as error:
        options = ", ".join(option for key, option in _OPTIONS.items() if given.get(key))
        raise ConfigError(f"{options}: together they leave no node; leave one of them out") from error


def check_runner(runner: str, pipeline: Pipeline) -> None:
    """Check that a runner with processes or threads gets nodes only that may run side by side.

    Args:
        runner: Kedro's description of the runner.
        pipeline: what will run.

    Raises:
        ConfigError: which node it cannot run, and what to do.
    """
    if "ThreadRunner" in runner:
        raise ConfigError("--runner: ThreadRunner is not for this project; use ParallelRunner to prepare sites")
    if "ParallelRunner" not in runner:
        return
    may = {node.name for name in _SIDE_BY_SIDE for node in pipelines[name].nodes}
    if alone := sorted({node.name for node in pipeline.nodes} - may):
        raise ConfigError(
            f"--runner: ParallelRunner cannot run {alone[0]}, which needs the command's own process; prepare sites "
            "side by side with kedro run --pipeline=preprocessing --runner=ParallelRunner, then run without --runner "
            "(sites train side by side with federation.fleet=processes)"
        )
