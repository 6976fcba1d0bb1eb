"""What one ``kedro run`` from nothing leaves: models, tables, figures, round records, MLflow."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

SITES = ("harbour_ct", "meadow_mri", "summit_ultrasound", "valley_endoscopy")


def finite(value: Any) -> bool:
    """Whether no number in a JSON value is NaN or infinite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict_json(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=refuse_constant)


def test_the_table_is_printed_with_every_site_and_the_next_commands(finished_run) -> None:
    _, done = finished_run

    for expected in (*SITES, "mean over sites", "Dice", "HD95", "MLflow run: ", "kedro viz", "mlflow ui"):
        assert expected in done.stdout
    assert "Traceback" not in done.output


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("below", ["", "last_round"])
def test_every_site_has_a_chosen_and_a_last_model(finished, rounds, site: str, below: str) -> None:
    folder = finished.models / site / below

    adapter, decoder = load_file(folder / "adapter_model.safetensors"), load_file(folder / "decoder.safetensors")
    card = strict_json(folder / "site_model.json")

    assert adapter
    assert all(name.startswith("decoder.") for name in decoder)
    assert all(bool(tensor.isfinite().all()) for tensor in (*adapter.values(), *decoder.values()))
    assert strict_json(folder / "adapter_config.json")["peft_type"] == "FEL"
    assert (card["site"], card["strategy"]) == (site, "fedsca")
    assert card["round"] == rounds if below else 1 <= card["round"] <= rounds


def test_private_tensors_differ_between_sites(finished) -> None:
    decoders = [(finished.models / site / "decoder.safetensors").read_bytes() for site in SITES]

    assert len(set(decoders)) == len(SITES)


def test_the_chosen_model_is_the_best_of_the_validated_rounds(finished) -> None:
    for site in SITES:
        chosen = strict_json(finished.models / site / "site_model.json")
        last = strict_json(finished.models / site / "last_round" / "site_model.json")
        assert chosen["dice_validation"] >= last["dice_validation"]
        assert chosen["round"] == strict_json(finished.reporting / "final_table.json")[site]["best round"]


def test_tables_hold_every_site_and_no_nan(finished) -> None:
    reporting = finished.reporting
    final, table = strict_json(reporting / "final_table.json"), pd.read_csv(reporting / "final_table.csv")

    assert finite(final)
    assert [*final] == [*SITES, "mean over sites"] == list(table["site"])
    assert final["mean over sites"]["Dice before"] == pytest.approx(table["Dice before"][:4].mean())
    assert not table.drop(columns="best round").isna().any(axis=None)
    for name in ("site_scores.csv", "image_scores.csv"):
        scores = pd.read_csv(reporting / name, keep_default_na=False, na_values=["nan", "NaN", "inf"])
        assert not scores.isna().any(axis=None), name
        assert set(scores["model"]) == {"before", "after", "chosen"}
        assert scores["dice"].between(0, 1).all()


def test_only_test_images_are_scored_and_each_by_every_model(finished) -> None:
    for site in SITES:
        manifest = pd.read_csv(finished.manifest(site))
        scores = pd.read_csv(finished.test_scores(site))
        tested = {Path(image).stem for image in manifest.loc[manifest["split"] == "test", "image"]}
        assert tested
        for model in ("before", "after", "chosen"):
            assert set(scores.loc[scores["model"] == model, "image"]) == tested


def test_figures_can_be_opened(finished) -> None:
    reporting = finished.reporting

    for name in ("learning_curves.json", "weight_heatmap.json"):
        assert strict_json(reporting / name)["data"], name
    for picture in (reporting / "weight_heatmap.png", *map(finished.overlays, SITES)):
        with Image.open(picture) as image:
            image.verify()


def test_every_round_has_a_record_of_every_site(finished, rounds) -> None:
    folders = list((finished.data / "07_model_output" / "rounds").iterdir())
    records = [strict_json(path) for path in sorted(folders[0].iterdir())]

    assert len(folders) == 1
    assert [record["round"] for record in records] == list(range(1, rounds + 2))
    assert [record["final"] for record in records] == [False] * rounds + [True]
    for record in records[:-1]:
        assert sorted(record["sites"]) == list(SITES) == record["accepted"]
        assert all(entry["bytes_up"] > 0 and entry["bytes_down"] > 0 for entry in record["sites"].values())
        assert all(sum(row) == pytest.approx(1.0) for row in record["weights"][0])


def test_nothing_unfinished_is_left(finished) -> None:
    assert finished.partial_files() == []


class TestMlflow:
    def test_there_is_one_parent_and_one_nested_run_a_site_all_finished(self, finished) -> None:
        (parent,) = finished.parents()
        nested = finished.nested(parent)

        assert sorted(nested) == list(SITES)
        assert {run.info.status for run in (parent, *nested.values())} == {"FINISHED"}

    @pytest.mark.parametrize(
        "metric", ["loss", "dice_local", "bytes_up", "bytes_down", "self_weight", "update_norm", "seconds", "samples"]
    )
    def test_metrics_of_a_site_are_stepped_by_round(self, finished, rounds, metric: str) -> None:
        (parent,) = finished.parents()

        for run in finished.nested(parent).values():
            assert finished.steps(run, metric) == list(range(1, rounds + 1))

    def test_validation_dice_starts_at_the_foundation_and_ends_with_the_last_round(self, finished, rounds) -> None:
        (parent,) = finished.parents()

        for run in finished.nested(parent).values():
            assert finished.steps(run, "dice_validation") == list(range(rounds + 1))
        assert finished.steps(parent, "dice_validation_mean") == list(range(rounds + 1))
        assert finished.steps(parent, "loss_mean") == list(range(1, rounds + 1))

    def test_logged_bytes_are_those_of_the_table(self, finished) -> None:
        (parent,) = finished.parents()
        table = strict_json(finished.reporting / "final_table.json")

        for site, run in finished.nested(parent).items():
            for direction in ("up", "down"):
                history = finished.client.get_metric_history(run.info.run_id, f"bytes_{direction}")
                # The table counts the last validation's messages too.
                assert 0 < sum(point.value for point in history) < table[site][f"bytes {direction}"]
        assert parent.data.metrics["bytes_up_total"] == sum(
            run.data.metrics["bytes_up"] for run in finished.nested(parent).values()
        )

    def test_test_scores_are_logged_to_site_and_parent(self, finished) -> None:
        (parent,) = finished.parents()
        table = strict_json(finished.reporting / "final_table.json")

        for site, run in finished.nested(parent).items():
            assert run.data.metrics["test Dice chosen"] == pytest.approx(table[site]["Dice chosen"])
        mean = parent.data.metrics["test Dice chosen mean over sites"]
        assert mean == pytest.approx(table["mean over sites"]["Dice chosen"])

    def test_parameters_are_flat(self, finished, rounds) -> None:
        (parent,) = finished.parents()

        assert parent.data.params["federation.rounds"] == str(rounds)
        assert parent.data.params["strategies.fedsca.weighting"] == "gate"
        assert parent.data.params["training.augment.flip"] == "0.5"
        assert not any(value.startswith("{'") for value in parent.data.params.values())

    def test_tags_say_what_made_the_run(self, finished, project) -> None:
        (parent,) = finished.parents()
        tags = parent.data.tags
        described = strict_json(finished.description)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=False)

        assert tags["fedsca.fingerprint"] == described["fingerprint"]
        assert tags["fedsca.code"] == described["code"]
        assert json.loads(tags["fedsca.data_fingerprint"]) == described["data"]
        foundation = strict_json(finished.data / "02_intermediate" / "foundation.json")
        assert tags["fedsca.foundation_sha256"] == foundation["sha256"]
        assert tags["mlflow.source.git.commit"] == (head.stdout.strip() or "unknown")
        assert "--env=smoke" in tags["fedsca.command"]

    def test_figures_tables_and_models_are_artifacts(self, finished) -> None:
        (parent,) = finished.parents()
        client = finished.client

        def names(run, folder: str) -> set[str]:
            return {Path(found.path).name for found in client.list_artifacts(run.info.run_id, folder)}

        assert names(parent, "figures") == {"learning_curves.json", "weight_heatmap.json", "weight_heatmap.png"}
        assert {"final_table.csv", "final_table.json", "site_scores.csv", "image_scores.csv"} <= names(parent, "tables")
        for site, run in finished.nested(parent).items():
            assert {"adapter_model.safetensors", "decoder.safetensors", "site_model.json"} <= names(run, "model")
            assert names(run, "figures") == {f"{site}.png"}
            assert names(run, "tables") == {f"{site}.csv"}
