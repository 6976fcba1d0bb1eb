from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.pipeline_registry import raw_folder, register_pipelines


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Path]:
    """The raw folder that the registry looks into."""
    token = raw_folder.set(tmp_path)
    yield tmp_path
    raw_folder.reset(token)


def nodes(name: str) -> set[str]:
    return {node.name for node in register_pipelines()[name].nodes}


def test_the_documented_pipelines_are_there(raw: Path) -> None:
    documented = {"demo_sites", "data_report", "preprocessing", "foundation", "federated_training", "evaluation"}
    assert documented | {"__default__"} <= set(register_pipelines())


def test_without_raw_data_the_sites_are_the_demonstration_s(raw: Path) -> None:
    assert {f"preprocessing.{site}.prepare" for site in DEMO_SITES} <= nodes("preprocessing")


def test_every_site_folder_gets_nodes_of_its_own(raw: Path) -> None:
    for site in ("north", "south", "_hidden"):
        (raw / site / "images").mkdir(parents=True)

    assert {name for name in nodes("preprocessing") if name.startswith("preprocessing.")} == {
        "preprocessing.north.prepare",
        "preprocessing.south.prepare",
    }
    assert {"evaluation.north.score", "evaluation.south.draw_overlays"} <= nodes("evaluation")


def test_one_site_can_be_run_alone_by_its_namespace(raw: Path) -> None:
    for site in ("north", "south"):
        (raw / site / "images").mkdir(parents=True)

    alone = register_pipelines()["__default__"].only_nodes_with_namespaces(["preprocessing.north"])

    assert {node.name for node in alone.nodes} == {"preprocessing.north.prepare"}
    assert alone.outputs() == {"north.manifest", "north.arrays", "north.report"}


def test_federated_training_is_the_default_without_its_figures(raw: Path) -> None:
    missing = nodes("__default__") - nodes("federated_training")

    assert nodes("federated_training") < nodes("__default__")
    assert missing == {"draw_curves", *(f"evaluation.{site}.draw_overlays" for site in DEMO_SITES)}


def test_a_whole_run_starts_from_raw_data_and_parameters_alone(raw: Path) -> None:
    inputs = {name for name in register_pipelines()["__default__"].inputs() if not name.startswith("param")}
    previous = {f"{site}.previous_manifest" for site in DEMO_SITES}

    assert inputs - previous == {
        "settings", "raw_sites", "model_input", "private_sites", "foundations", "checkpoints", "models",
    }  # fmt: skip


def test_the_data_report_needs_raw_data_and_changes_no_data_set_of_training(raw: Path) -> None:
    report, training = (register_pipelines()[name] for name in ("data_report", "federated_training"))
    inputs = {name for name in report.inputs() if not name.startswith("param")}

    assert inputs == {
        "raw_sites",
        "foundations",
        *(f"{site}.previous_manifest" for site in DEMO_SITES),
    }
    assert report.all_outputs() & training.all_outputs() == {"demo_sites_summary"}


def test_a_folder_that_cannot_name_a_site_is_refused(raw: Path) -> None:
    (raw / "St. Mary's" / "images").mkdir(parents=True)

    with pytest.raises(DataError, match="rename the folder"):
        register_pipelines()
