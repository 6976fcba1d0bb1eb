"""The same command a second time: nothing runs while nothing changed."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file


def times(place) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(place.root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("pipeline", ["__default__", "federated_training"])
def test_an_up_to_date_run_prints_its_table_again_and_starts_nothing(finished_run, rounds, pipeline: str) -> None:
    place, first = finished_run
    before = times(place)
    (parent,) = place.parents()

    again = place.run(pipeline, f"federation.rounds={rounds}")

    assert again.code == 0
    assert "up to date" in again.stdout
    assert first.stdout[first.stdout.index("Test results") :] == again.stdout[again.stdout.index("Test results") :]
    assert f"MLflow run: {parent.info.run_id}" in again.stdout
    assert [run.info.run_id for run in place.parents()] == [parent.info.run_id]
    assert {path: time for path, time in times(place).items() if "mlflow.db" not in path} == {
        path: time for path, time in before.items() if "mlflow.db" not in path
    }


def test_an_up_to_date_run_imports_nothing_heavy(used, rounds) -> None:
    again = used.run(params=f"federation.rounds={rounds}", environment={"PYTHONPROFILEIMPORTTIME": "1"}, cold=True)

    imported = {
        line.rpartition("|")[2].strip() for line in again.output.splitlines() if line.startswith("import time:")
    }
    assert "up to date" in again.stdout
    assert "fedsca_pipeline.hooks.tracking" in imported
    assert not imported & {"pandas", "numpy", "sqlalchemy", "mlflow", "torch", "plotly", "matplotlib"}


@pytest.mark.slow
def test_a_missing_figure_is_drawn_again(used, rounds) -> None:
    overlay = used.overlays("harbour_ct")
    overlay.unlink()

    again = used.run(params=f"federation.rounds={rounds}")

    assert "up to date" not in again.stdout
    assert overlay.is_file()


def test_a_new_time_stamp_alone_is_no_change(used, rounds) -> None:
    image = next((used.raw / "harbour_ct" / "images").iterdir())
    os.utime(image)

    again = used.run(params=f"federation.rounds={rounds}")

    assert "up to date" in again.stdout


@pytest.mark.slow
def test_force_runs_anyway_and_ends_in_the_same_models(used, finished, rounds) -> None:
    started = (used.models / "site_models.json").stat().st_mtime_ns

    again = used.run("federated_training", f"federation.rounds={rounds},force=true")

    assert again.code == 0, again.output
    assert "up to date" not in again.stdout
    assert f"round {rounds}/{rounds}" in again.stdout
    assert (used.models / "site_models.json").stat().st_mtime_ns > started
    for path in sorted(finished.models.rglob("*.safetensors")):
        old, new = load_file(path), load_file(used.models / path.relative_to(finished.models))
        assert old.keys() == new.keys()
        assert all(old[name].equal(new[name]) for name in old), path
    assert len(used.parents()) == 1


def test_a_changed_raw_image_makes_a_run_of_its_own(used) -> None:
    path = next((used.raw / "harbour_ct" / "images").iterdir())
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(path)
    manifest = used.manifest("harbour_ct")
    splits = [line.split(",")[2:5] for line in manifest.read_text().splitlines()]

    again = used.run("federated_training", "federation.rounds=1")

    assert again.code == 0, again.output
    assert "up to date" not in again.stdout
    assert len(used.parents()) == 2
    assert [line.split(",")[2:5] for line in manifest.read_text().splitlines()] == splits
