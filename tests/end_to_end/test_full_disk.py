"""A full disk, simulated by a limit on the size of every file the command writes."""

from __future__ import annotations

import json

import pytest

# Bytes: the smoke preset's arrays are about 41 kB a site, its checkpoints 47 kB, its site states 151 kB.
ROOM = {"arrays": 30_000, "server checkpoint": 44_000, "site state": 100_000}
PARAMS = "federation.rounds=1"


@pytest.fixture
def place(new_workplace, no_mlflow):
    """A workplace with raw sites, without MLflow, whose database would be what outgrows the limit."""
    empty = new_workplace()
    empty = type(empty)(empty.root, empty.project, no_mlflow)
    assert empty.run("demo_sites").code == 0
    return empty


@pytest.mark.parametrize("full_at", [*ROOM])
def test_a_full_disk_is_named_and_with_room_again_the_same_command_goes_on(place, full_at: str) -> None:
    raw = place.contents("01_raw")

    stopped = place.run("federated_training", PARAMS, largest_file=ROOM[full_at])

    assert stopped.code == 1
    assert "File too large" in stopped.words
    assert str(place.data) in stopped.words.replace(" ", "")
    assert "Traceback" not in stopped.output
    assert place.partial_files() == []
    assert not list(place.models.rglob("site_model.json"))
    assert place.contents("01_raw") == raw

    resumed = place.run("federated_training", PARAMS)

    assert resumed.code == 0, resumed.output
    assert "mean over sites" in resumed.stdout


def test_a_full_disk_while_models_are_written_leaves_earlier_models_whole(used, no_mlflow, rounds) -> None:
    place = type(used)(used.root, used.project, no_mlflow)
    before = place.contents("06_models", "08_reporting")

    stopped = place.run("federated_training", f"federation.rounds={rounds},run.seed=1", largest_file=44_000)

    after = place.contents("06_models", "08_reporting")
    described = {"06_models/run_description.json"}
    assert stopped.code == 1
    assert "File too large" in stopped.words
    assert {path for path in before if before[path] != after.get(path)} <= described
    assert place.partial_files() == []


def test_a_full_disk_while_demonstration_sites_are_written_leaves_none(workplace) -> None:
    stopped = workplace.run("demo_sites", largest_file=1_000)

    assert stopped.code == 1
    assert "File too large" in stopped.words
    assert "Traceback" not in stopped.output
    assert workplace.contents() == {}

    assert workplace.run("demo_sites").code == 0
    assert len(list(workplace.raw.iterdir())) == 4


def test_a_full_disk_at_mlflow_s_place_is_told_from_one_at_the_data(workplace) -> None:
    assert workplace.run("demo_sites").code == 0

    stopped = workplace.run("federated_training", PARAMS, largest_file=200_000)

    assert stopped.code == 1
    assert "MLflow" in stopped.words
    assert "Traceback" not in stopped.output
    assert workplace.partial_files() == []
    current = json.loads((workplace.checkpoints / "current.json").read_text()) if workplace.checkpoints.exists() else {}
    assert not current.get("finished", False)
