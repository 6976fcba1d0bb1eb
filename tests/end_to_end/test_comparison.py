"""``kedro run --pipeline=comparison`` as a user types it: what it leaves, what a second call does, what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image

SMOKE = "comparison_smoke"
TRAINED = ("harbour_ct", "meadow_mri", "summit_ultrasound")
METHODS = ("fedsca", "local", "fedavg")
CELLS = "07_model_output/comparison/cells"
SCRATCH = "07_model_output/comparison_checkpoints"
FIGURES = {"dice_against_bytes", "site_boxes", "learning_curves", "critical_difference", "similarity"}
# Two methods, one seed, one rate: two cells.
SMALL: Mapping[str, Any] = {
    "federation": {"rounds": 2},
    "training": {"steps_per_round": 2},
    "comparison": {"only": ["fedsca", "local"], "seeds": [0], "learning_rates": [0.03], "shots": [1]},
}


def compare(place, params: str = "", **options: Any):
    return place.run("comparison", params, **{"env": SMOKE, **options})


def cells(place) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((place.data / CELLS).glob("*.json"))}


def written(place) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (place.data / CELLS).glob("*.json")}


def page(place) -> str:
    return (place.reporting / "comparison" / "results.md").read_text()


def table(place) -> pd.DataFrame:
    return pd.read_csv(place.reporting / "comparison" / "table.csv").set_index("method")


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that must be the same bit for bit; a message tells the seconds it took, and may be longer by some."""
    rounds = [{key: value for key, value in record.items() if key != "bytes"} for record in result["rounds"]]
    rest = {key: value for key, value in result.items() if key not in ("seconds", "peak_memory", "traffic")}
    return {**rest, "rounds": rounds}


def children(place, parent) -> list[Any]:
    client = place.client
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: merged(old[k], new[k]) for k in old.keys() & new.keys() if isinstance(new[k], Mapping)}
    return {**old, **new, **both}


@pytest.fixture(scope="module")
def compared(new_workplace):
    """A finished comparison of the smoke preset, not to be written to, and its output."""
    place = new_workplace()
    done = compare(place)
    assert done.code == 0, done.output
    return place, done


@pytest.fixture
def used(compared, tmp_path: Path):
    """A copy of the finished comparison's workplace."""
    return compared[0].moved(tmp_path / "used")


@pytest.fixture
def prepared(used):
    """A workplace with arrays and a foundation, and no cell."""
    for folder in (CELLS, SCRATCH, "08_reporting"):
        shutil.rmtree(used.data / folder, ignore_errors=True)
    return used


@pytest.fixture
def configured(project: Path, tmp_path: Path) -> Callable[..., Any]:
    """Returns a workplace with a configuration of its own, in which the smoke preset has these changes."""

    def change(place, *changes: Mapping[str, Any]):
        conf = Path(shutil.copytree(project / "conf", tmp_path / f"conf_{len(list(tmp_path.iterdir()))}"))
        path = conf / SMOKE / "parameters.yml"
        values = yaml.safe_load(path.read_text())
        for new in changes:
            values = merged(values, new)
        path.write_text(yaml.safe_dump(values))
        return replace(place, conf=conf)

    return change


def test_the_page_tables_and_figures_are_there(compared) -> None:
    place, done = compared
    folder = place.reporting / "comparison"

    assert "Methods compared" in done.stdout
    assert str(folder / "results.md") in done.stdout
    assert "Traceback" not in done.output
    assert sorted(table(place).index) == sorted(METHODS)
    assert (table(place)[["sites", "seeds", "train_images"]] == [3, 2, 4]).all(axis=None)
    assert not table(place)["dice"].isna().any()
    text = page(place)
    assert text.startswith("# Methods compared")
    assert "## 4 training images a site" in text
    assert "### valley_endoscopy" in text
    assert "| Method | as it is | ensemble | 1 image | 2 images |" in text
    assert "## Missing" not in text
    assert "<table>" in (folder / "table.html").read_text()
    figures = {path.stem: path for path in (folder / "results_figures" / "4_images").glob("*.png")}
    assert figures.keys() == FIGURES
    for name, path in figures.items():
        assert f"](results_figures/4_images/{name}.png)" in text
        with Image.open(path) as image:
            image.verify()
    assert set(pd.read_csv(folder / "tests.csv")["method"]) == {"local", "fedavg"}
    assert set(pd.read_csv(folder / "unseen.csv")["received"]) == {"as it is", "ensemble", "1 image", "2 images"}


def test_every_cell_has_one_result_and_nothing_else_is_left(compared) -> None:
    place, done = compared
    found = cells(place)

    # Two rates on the first seed, the better one on the other.
    assert len(found) == 9
    index = json.loads((place.reporting / "comparison" / "cells.json").read_text())
    assert index.keys() == found.keys()
    assert all(name.startswith(found[key]["method"]) for key, name in index.items())
    assert {tuple(result["sites"]) for result in found.values()} == {TRAINED}
    assert {tuple(result["unseen"]) for result in found.values()} == {("valley_endoscopy",)}
    assert list((place.data / SCRATCH).rglob("*")) == []
    assert place.partial_files() == []
    assert not (place.data / "06_models").exists()
    assert done.stdout.count("validation Dice") == 9


def test_mlflow_has_a_run_of_the_comparison_one_a_cell_and_one_a_site(compared) -> None:
    place, _ = compared
    (parent,) = place.parents()
    found = cells(place)

    assert parent.info.status == "FINISHED"
    assert parent.data.params["comparison.only"] == "['fedsca', 'local', 'fedavg']"
    assert parent.data.params["base.federation.rounds"] == "4"
    artifacts = {item.path for item in place.client.list_artifacts(parent.info.run_id, "comparison")}
    assert {"comparison/table.csv", "comparison/results.md", "comparison/results_figures"} <= artifacts
    by_cell = {run.data.tags["fedsca.cell"]: run for run in children(place, parent)}
    assert by_cell.keys() == found.keys()
    for name, run in by_cell.items():
        result = found[name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["fedsca.method"] == result["method"]
        assert run.data.tags["fedsca.seed"] == str(result["description"]["seed"])
        assert run.data.tags["fedsca.train_images"] == "4"
        assert run.data.metrics["bytes_up"] == result["traffic"]["bytes_up"]
        assert {"test dice mean", "test dice worst", "seconds", "peak_memory", "loss_mean"} <= run.data.metrics.keys()
        assert place.steps(run, "dice_before_round_mean") == [1, 2, 3, 4, 5]
        sites = {run.data.tags["fedsca.site"]: run for run in children(place, run)}
        assert sorted(sites) == list(TRAINED)
        for site, below in sites.items():
            scores = result["sites"][site]
            assert below.info.status == "FINISHED"
            assert below.data.metrics["test dice"] == pytest.approx(sum(scores["dice"]) / len(scores["dice"]))
            assert below.data.metrics["best_round"] == scores["round"]


def test_the_same_command_computes_nothing_and_writes_the_same_page(used, compared) -> None:
    before, text = written(used), page(used)

    again = compare(used)

    assert again.code == 0, again.output
    assert "9 of 9 cells have a result" in again.words
    assert "validation Dice" not in again.stdout
    assert written(used) == before
    assert page(used) == text
    (parent,) = used.parents()
    assert len(children(used, parent)) == 9


@pytest.mark.slow
def test_another_seed_and_another_method_compute_the_new_cells_only(used, configured) -> None:
    before = written(used)
    changed = configured(
        used,
        {"comparison": {"only": [*METHODS, "swift"], "seeds": [0, 1, 2], "methods": {
            "swift": {"strategy": "fedprox", "options": {"mu": 0.5}, "seeds": [1], "learning_rates": [0.02]}}}},
    )  # fmt: skip

    again = compare(changed)

    assert again.code == 0, again.output
    assert before.items() <= written(used).items()
    new = [cells(used)[name.removesuffix(".json")] for name in written(used).keys() - before.keys()]
    assert sorted((result["method"], result["description"]["seed"]) for result in new) == [
        ("fedavg", 2), ("fedsca", 2), ("local", 2), ("swift", 1),
    ]  # fmt: skip
    assert table(used)["seeds"].to_dict() == {"fedsca": 3, "local": 3, "fedavg": 3, "swift": 1}
    assert max(len(children(used, parent)) for parent in used.parents()) == 13


@pytest.mark.slow
def test_a_damaged_result_is_computed_anew_and_so_is_one_of_another_code(used) -> None:
    before = cells(used)
    torn, old = sorted(before)[:2]
    (used.data / CELLS / f"{torn}.json").write_text(json.dumps(before[torn])[:-100])
    (used.data / CELLS / f"{old}.json").write_text(json.dumps({**before[old], "code": "0" * 16}))

    taken = compare(used, "comparison.same_code=false")

    assert taken.code == 0, taken.output
    assert f"{torn}.json: the result of" in taken.words
    assert "damaged" in taken.words
    assert taken.stdout.count("validation Dice") == 1
    # Unless it only helped to choose a learning rate.
    index = json.loads((used.reporting / "comparison" / "cells.json").read_text())
    assert f"{'0' * 16} (1 result)" in page(used)
    assert (f"| {before[old]['method']} † |" in page(used)) == ("rate 0.01" not in index[old])
    assert cells(used)[old]["code"] == "0" * 16

    again = compare(used)

    assert again.code == 0, again.output
    assert "another version of the code made 1 result; the cells run again" in again.words
    assert "†" not in page(used)
    assert {name: numbers(result) for name, result in cells(used).items()} == {
        name: numbers(result) for name, result in before.items()
    }


@pytest.mark.slow
def test_a_cell_that_fails_is_reported_and_the_others_go_on(prepared, configured) -> None:
    absent = dict.fromkeys((*TRAINED, "valley_endoscopy"), (1,))
    place = configured(
        prepared,
        SMALL,
        {"comparison": {"only": ["fedsca", "local", "deaf"], "unseen_sites": [], "methods": {
            "deaf": {"strategy": "fedavg", "set": {"federation.inject_failures": absent}},
        }}},
    )  # fmt: skip

    done = compare(place)

    assert done.code == 0, done.output
    assert "deaf, seed 0, 4 images, rate 0.03: failed and is left out: round 1: 0 valid replies" in done.words
    assert "injected by federation.inject_failures" in done.words
    assert "1 cell failed; the same command tries again" in done.words
    assert "Traceback" not in done.output
    assert sorted(table(place).index) == ["fedsca", "local"]
    assert (table(place)["sites"] == 4).all()
    assert "- deaf: no learning rate chosen" in page(place)
    assert {run.info.status for run in place.parents()} == {"FINISHED"}


@pytest.mark.slow
def test_where_every_cell_fails_the_command_does_too(prepared, configured) -> None:
    absent = dict.fromkeys(TRAINED, (2,))
    place = configured(prepared, SMALL, {"federation": {"inject_failures": absent}})

    done = compare(place)

    assert done.code == 1
    for method in ("fedsca", "local"):
        assert f"{method}, seed 0, 4 images, rate 0.03: failed and is left out: round 2: 0 valid" in done.words
    assert "no cell of the comparison has a result; see the errors above" in done.words
    assert "Traceback" not in done.output
    assert not (place.reporting / "comparison" / "results.md").exists()
    assert sorted(run.info.status for run in place.parents()) == ["FAILED", "FINISHED"]


@pytest.mark.slow
def test_with_leave_one_out_each_site_is_tested_by_those_that_trained_without_it(prepared, configured) -> None:
    every = sorted((*TRAINED, "valley_endoscopy"))
    place = configured(prepared, SMALL, {"comparison": {"only": ["fedsca"], "unseen_sites": [], "leave_one_out": True}})

    done = compare(place)

    assert done.code == 0, done.output
    found = cells(place).values()
    assert sorted((result["left_out"] or "", *result["sites"]) for result in found) == [
        ("", *every),
        *((left_out, *(site for site in every if site != left_out)) for left_out in every),
    ]
    assert all(list(result["unseen"]) == [result["left_out"]] for result in found if result["left_out"])
    for site in every:
        assert f"### {site}" in page(place)
    unseen = pd.read_csv(place.reporting / "comparison" / "unseen.csv")
    assert set(unseen["site"]) == set(every)
    assert not unseen["dice"].isna().any()


def test_a_site_without_test_images_is_named_before_a_cell_is_trained(prepared, configured) -> None:
    place = configured(
        prepared, SMALL, {"preprocessing": {"split": {"overrides": {"meadow_mri": {"test": 0, "validation": 2}}}}}
    )

    done = compare(place)

    assert done.code == 1
    assert "site meadow_mri: no test image; set preprocessing.split.test" in done.words
    assert "Traceback" not in done.output
    assert cells(place) == {}


def test_ctrl_c_keeps_finished_cells_and_the_same_command_goes_on_from_the_checkpoints(
    prepared, compared, empty_database: Path
) -> None:
    shutil.copy(empty_database, prepared.root / "mlflow.db")

    def busy() -> bool:
        at_work = list((prepared.data / SCRATCH).glob("*/*/server/round_00002.safetensors"))
        finished = {path.stem for path in (prepared.data / CELLS).glob("*.json")}
        return bool(finished) and any(path.parents[2].name not in finished for path in at_work)

    # Two of the three methods: six of the nine cells.
    two = "comparison.only=[fedsca,local]"
    process = prepared.start("comparison", two, env=SMOKE)
    stopped = prepared.signalled(process, busy, signal.SIGINT)

    assert stopped.code == 130, stopped.output
    assert "The same command (without force) resumes" in stopped.words
    assert "Traceback" not in stopped.output
    assert gone(process.pid)
    kept = written(prepared)
    assert 0 < len(kept) < 6
    begun = [path.parents[2].name for path in (prepared.data / SCRATCH).glob("*/*/server/round_00002.safetensors")]
    assert set(begun) - {name.removesuffix(".json") for name in kept}
    assert sorted(run.info.status for run in prepared.parents()) == ["KILLED"]

    resumed = compare(prepared, two)

    assert resumed.code == 0, resumed.output
    assert kept.items() <= written(prepared).items()
    whole = cells(compared[0]).items()
    expected = {name: numbers(result) for name, result in whole if result["method"] != "fedavg"}
    assert {name: numbers(result) for name, result in cells(prepared).items()} == expected
    assert list((prepared.data / SCRATCH).rglob("*")) == []
    (parent,) = prepared.parents()
    assert parent.info.status == "FINISHED"
    assert len(children(prepared, parent)) == len(expected) == 6


def gone(group: int, within: float = 10.0) -> bool:
    """Whether no process of a group is left, after a moment at most."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("comparison", "said"),
    [
        ({"seeds": []}, "comparison.seeds: List should have at least 1 item"),
        ({"only": ["fedsca", "lokal"]}, "only: 'lokal' is no method; did you mean 'local'?"),
        (
            {"only": None, "methods": {"odd": {"strategy": "fedprx"}}},
            "comparison.methods.odd.strategy: 'fedprx' is no strategy; did you mean 'fedprox'?",
        ),
        (
            {"only": ["fedsca", "fedsa_lora"], "methods": {"fedsa_lora": {"set": {"adapters.method": "fel"}}}},
            "comparison.methods.fedsa_lora: federation.strategy fedsa_lora needs adapters.method lora",
        ),
        (
            {"methods": {"local": {"set": {"adapters.widht": 3}}}},
            "comparison.methods.local.set: adapters.widht: Extra inputs",
        ),
        ({"methods": {"fedsca": {"options": {"rhoo": 0.4}}}}, "strategies.fedsca.rhoo is no option; did you mean"),
        ({"unseen_sites": ["nowhere"]}, "comparison.unseen_sites: no such site: nowhere; there are harbour_ct"),
        (
            {"unseen_sites": [*TRAINED, "valley_endoscopy"]},
            "comparison.unseen_sites: no site is left to train",
        ),
    ],
)
def test_a_wrong_comparison_is_refused_by_its_key_before_anything_is_written(
    workplace, configured, comparison: Mapping[str, Any], said: str
) -> None:
    refused = compare(configured(workplace, {"comparison": comparison}, {"strategies": ALLOWED}))

    assert refused.code == 1
    assert said in refused.words
    assert "Traceback" not in refused.output
    assert workplace.contents() == {}
    assert workplace.parents() == []


ALLOWED = {"centralised": {"allow_pooling": True}}
