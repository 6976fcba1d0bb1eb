"""A full disk, simulated by a limit on the size of every file the command writes."""

from __future__ import annotations

from dataclasses import replace

# Bytes: the smoke preset's arrays are about 41 kB a site, its site states 151 kB.
ROOM = (30_000, 100_000)
PARAMS = "federation.rounds=1"


def test_a_full_disk_is_named_and_with_room_again_the_same_command_goes_on(sites, no_mlflow) -> None:
    # MLflow's database would be what outgrows the limit.
    place = replace(sites, conf=no_mlflow)
    raw = place.contents("01_raw")

    for room in ROOM:
        stopped = place.run("federated_training", PARAMS, largest_file=room)

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
    place = replace(used, conf=no_mlflow)
    before = place.contents("06_models", "08_reporting")

    stopped = place.run("federated_training", f"federation.rounds={rounds},run.seed=1", largest_file=44_000)

    after = place.contents("06_models", "08_reporting")
    # What tells a finished run goes first, so that another run's figures are never taken for it.
    marks = {"06_models/run_description.json", "08_reporting/last_run.json"}
    assert stopped.code == 1
    assert "File too large" in stopped.words
    assert {path for path in before if before[path] != after.get(path)} <= marks
    assert place.partial_files() == []


def test_a_full_disk_while_demonstration_sites_are_written_leaves_none(workplace) -> None:
    stopped = workplace.run("demo_sites", largest_file=1_000)

    assert stopped.code == 1
    assert "File too large" in stopped.words
    assert "Traceback" not in stopped.output
    assert workplace.contents() == {}

    assert workplace.run("demo_sites").code == 0
    assert len(list(workplace.raw.iterdir())) == 4


def test_a_full_disk_at_mlflow_s_place_is_told_from_one_at_the_data(sites) -> None:
    stopped = sites.run("federated_training", PARAMS, largest_file=200_000)

    assert stopped.code == 1
    assert f"MLflow at sqlite:///{sites.root}" in stopped.words.replace("MLflow at sqlite: ///", "MLflow at sqlite:///")
    assert "enabled: false in mlflow.yml" in stopped.words
    assert "Traceback" not in stopped.output
    assert sites.partial_files() == []
