"""Killed, stopped and resumed runs end as unbroken ones do."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

import pandas as pd
import pytest
from safetensors.torch import load_file


def same_models(one, other) -> bool:
    """Whether two workplaces hold the same model tensors, bit for bit."""
    paths = sorted(path.relative_to(one.models) for path in one.models.rglob("*.safetensors"))
    assert paths == sorted(path.relative_to(other.models) for path in other.models.rglob("*.safetensors"))
    for path in paths:
        old, new = load_file(one.models / path), load_file(other.models / path)
        if old.keys() != new.keys() or not all(old[name].equal(new[name]) for name in old):
            return False
    return bool(paths)


def same_scores(one, other) -> bool:
    tables = [pd.read_csv(place.reporting / "image_scores.csv") for place in (one, other)]
    return tables[0].equals(tables[1])


def steps_logged(place) -> dict[tuple[str, str], list[int]]:
    """Return the steps of every metric of the one MLflow run and its nested ones."""
    (parent,) = place.parents()
    nested = place.nested(parent)
    return {
        (site, metric): place.steps(run, metric)
        for site, run in {"": parent, **nested}.items()
        for metric in run.data.metrics
    }


def newer(place, pattern: str) -> Callable[[], bool]:
    """Return a test for files that match and were not there, or not so, when it was made."""

    def seen() -> set[tuple[str, int]]:
        found = set()
        for path in place.data.glob(pattern):
            try:
                found.add((str(path), path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return found

    before = seen()
    return lambda: bool(seen() - before)


GROWING = "05_model_input/.*.partial"
CHECKPOINT = "07_model_output/checkpoints/*/server/round_*.safetensors"
SITE_STATE = "07_model_output/checkpoints/*/sites/*/state_*.safetensors"
# In the order of a run: once it has ended there is nothing left to kill.
MOMENTS = (
    GROWING,
    "05_model_input/*.safetensors",
    "06_models/run_description.json",
    SITE_STATE,
    CHECKPOINT,
    "07_model_output/rounds/*/*.json",
    "06_models/*/adapter_model.safetensors",
    "07_model_output/test_scores/*.csv",
)


def kill_at(place, pattern: str, params: str, after: float) -> None:
    killed = place.signal_when(newer(place, pattern), signal.SIGKILL, params, after=after)
    assert killed.code == -signal.SIGKILL, killed.output


def test_a_run_killed_three_times_ends_bit_for_bit_as_an_unbroken_one(sites, finished, rounds) -> None:
    params = f"federation.rounds={rounds}"
    delays = random.Random(1)

    kill_at(sites, GROWING, params, 0.0)
    kill_at(sites, CHECKPOINT, params, delays.uniform(0.0, 0.3))
    kill_at(sites, SITE_STATE, params, delays.uniform(0.0, 0.1))
    resumed = sites.run(params=params)

    assert resumed.code == 0, resumed.output
    assert same_models(finished, sites)
    assert same_scores(finished, sites)
    assert steps_logged(sites) == steps_logged(finished)
    assert sites.parents()[0].info.status == "FINISHED"
    assert sites.partial_files() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_run_killed_again_and_again_at_random_moments_ends_as_an_unbroken_one(
    workplace, finished, rounds, seed: int
) -> None:
    params = f"federation.rounds={rounds}"
    chance = random.Random(seed)

    killed = [
        workplace.signal_when(newer(workplace, pattern), signal.SIGKILL, params, after=chance.uniform(0.0, 0.15))
        for pattern in sorted(chance.sample(MOMENTS, k=5), key=MOMENTS.index)
    ]
    resumed = workplace.run(params=params)

    for done in killed:
        # One may have ended before its moment came.
        assert done.code in (0, -signal.SIGKILL), done.output
    assert [done.code for done in killed].count(-signal.SIGKILL) >= 4
    assert resumed.code == 0, resumed.output
    assert same_models(finished, workplace)
    assert same_scores(finished, workplace)
    assert steps_logged(workplace) == steps_logged(finished)


@pytest.mark.slow
def test_a_bit_flipped_in_a_stopped_run_is_said_and_the_models_are_the_same(sites, finished, rounds) -> None:
    params = f"federation.rounds={rounds}"
    kill_at(sites, "07_model_output/checkpoints/*/server/round_00002.safetensors", params, 0.0)
    (state, *_) = sites.data.glob("07_model_output/checkpoints/*/sites/*/state_00002.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)

    resumed = sites.run(params=params)

    assert resumed.code == 0, resumed.output
    assert "it is now state_00002.safetensors.damaged" in resumed.words
    assert "The run goes on after round 1, to the same models" in resumed.words
    assert same_models(finished, sites)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_rounds_and_ends_as_an_unbroken_one(sites, finished, rounds) -> None:
    shorter = sites.run(params=f"federation.rounds={rounds - 1}")
    assert shorter.code == 0, shorter.output

    longer = sites.run(params=f"federation.rounds={rounds}")

    assert longer.code == 0, longer.output
    assert same_models(finished, sites)
    assert same_scores(finished, sites)
    assert f"goes on after round {rounds - 1} of run" in longer.words
    assert len(sites.parents()) == 2


def test_a_round_s_record_that_a_killed_command_left_half_written_is_not_read_and_counts_for_nothing(
    used, rounds
) -> None:
    table = used.reporting / "final_table.json"
    before = table.read_bytes()
    for name, text in (("round_00001.json", None), ("round_00002.json", "")):
        (record,) = used.data.glob(f"07_model_output/rounds/*/{name}")
        left = record.parent / f".{name}.ab12cd34.partial" / name
        left.parent.mkdir()
        left.write_text(record.read_text() if text is None else text)

    done = used.run("evaluation", f"federation.rounds={rounds}")

    assert done.code == 0, done.output
    assert table.read_bytes() == before
    assert used.partial_files() == []


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(sites, finished, rounds) -> None:
    params = f"federation.rounds={rounds}"

    stopped = sites.signal_when(newer(sites, CHECKPOINT), signal.SIGINT, params)

    assert stopped.code == 130
    assert "The same command (without force) resumes" in stopped.words
    assert "Traceback" not in stopped.output
    (parent,) = sites.parents()
    assert {run.info.status for run in (parent, *sites.nested(parent).values())} == {"KILLED"}

    resumed = sites.run("federated_training", params)

    assert resumed.code == 0, resumed.output
    assert same_models(finished, sites)
    assert [run.info.status for run in sites.parents()] == ["FINISHED"]


@pytest.mark.slow
def test_a_finished_run_that_is_stopped_when_begun_anew_goes_on_and_is_not_taken_for_up_to_date(
    finished, rounds, tmp_path
) -> None:
    place, params = finished.moved(tmp_path / "anew"), f"federation.rounds={rounds}"
    stopped = place.signal_when(newer(place, CHECKPOINT), signal.SIGINT, f"{params},force=true")
    assert stopped.code == 130

    resumed = place.run("federated_training", params)

    assert resumed.code == 0, resumed.output
    assert "up to date" not in resumed.words
    assert same_models(finished, place)


@pytest.fixture(scope="module")
def unfinished(new_sites):
    """A run of four rounds, killed in its second."""
    place = new_sites()
    kill_at(place, CHECKPOINT, "federation.rounds=4", 0.0)
    return place


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("federation.rounds=5", "federation.rounds: 4 -> 5"),
        ("federation.rounds=4,training.learning_rate=0.01", "training.learning_rate: 0.001 -> 0.01"),
        ("federation.rounds=4,preprocessing.image_size=48", "preprocessing.image_size: 32 -> 48"),
        ("federation.rounds=4,strategies.fedsca.rho=0.4", "strategies.fedsca.rho: 0.5 -> 0.4"),
    ],
)
def test_resuming_with_another_configuration_is_refused_before_anything_is_written(
    unfinished, change: str, named: str
) -> None:
    before, runs = unfinished.contents(), len(unfinished.parents())

    refused = unfinished.run(params=change)

    assert refused.code == 1
    assert named in refused.words
    assert "force=true" in refused.words
    assert "Traceback" not in refused.output
    assert unfinished.contents() == before
    assert len(unfinished.parents()) == runs


def test_changed_data_is_named_when_a_run_cannot_be_resumed(unfinished, tmp_path) -> None:
    place = unfinished.moved(tmp_path / "changed")
    mask = next((place.raw / "meadow_mri" / "masks").iterdir())
    mask.write_bytes(next(path for path in mask.parent.iterdir() if path != mask).read_bytes())

    refused = place.run(params="federation.rounds=4")

    assert refused.code == 1
    assert "data.meadow_mri:" in refused.words
