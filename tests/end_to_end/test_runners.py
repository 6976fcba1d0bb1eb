"""Kedro's runner with processes."""

from __future__ import annotations

PARALLEL = ("--runner=ParallelRunner",)
PREPARED = ("02_intermediate", "03_primary", "05_model_input")


def test_sites_prepared_side_by_side_are_those_prepared_one_after_the_other(new_sites) -> None:
    parallel, sequential = new_sites(), new_sites()

    for place, options in ((parallel, PARALLEL), (sequential, ())):
        done = place.run("preprocessing", options=options)
        assert done.code == 0, done.output

    assert parallel.contents(*PREPARED) == sequential.contents(*PREPARED)
    assert any(path.endswith("meadow_mri.safetensors") for path in parallel.contents("05_model_input"))
    assert parallel.partial_files() == []


def test_a_data_report_can_be_made_side_by_side(sites) -> None:
    done = sites.run("data_report", options=PARALLEL)

    assert done.code == 0, done.output
    assert (sites.reporting / "data_report" / "meadow_mri.html").is_file()


def test_training_side_by_side_is_refused_before_anything_runs(workplace) -> None:
    refused = workplace.run("federated_training", options=PARALLEL)

    assert refused.code == 1
    assert "--runner: ParallelRunner cannot run " in refused.words
    assert "Traceback" not in refused.output
    assert workplace.contents() == {}
