"""Sites of volumes through the whole run: slices train, volumes are scored in mm and predicted on their own grids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from fedsca_pipeline import load_site_model
from fedsca_pipeline.metrics.volumes import score_volume

from .conftest import Finished, Workplace

# To the back, up and to the right; and one that no axis of the patient is parallel to.
TURNED = np.array([[0, 0, 0.8, 3], [-0.8, 0, 0, 3], [0, 2.5, 0, -4], [0, 0, 0, 1.0]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = nibabel.eulerangles.euler2mat(0.1, -0.2, 0.05) @ np.diag([0.8, 0.8, 2.5])
GRIDS = {"oblique": OBLIQUE, "turned": TURNED}
TEST_VOLUMES = 2
# The threshold lies among what a model of two rounds says: all, or nothing, would be no prediction to look at.
PARAMS = (
    f"preprocessing.split.validation=1,preprocessing.split.test={TEST_VOLUMES},preprocessing.volume.channels=3,"
    "preprocessing.volume.empty_slices=0.5,evaluation.surface_tolerance=3.0,evaluation.threshold=0.492"
)


@dataclass(frozen=True)
class VolumeRun:
    place: Workplace
    first: Finished
    again: Finished

    @property
    def output(self) -> Path:
        return self.place.data / "07_model_output"


@pytest.fixture(scope="module")
def run(new_workplace: Callable[[], Workplace], write_volume_site: Callable[..., None]) -> VolumeRun:
    place = new_workplace()
    for seed, (site, affine) in enumerate(GRIDS.items()):
        write_volume_site(place.raw / site, seed=seed, affine=affine)
    # What the chosen model of another run made of a volume that is no test volume now.
    stale = place.data / "07_model_output" / "predictions" / "turned" / "gone.nii.gz"
    stale.parent.mkdir(parents=True)
    stale.touch()
    first, again = (place.run("federated_training", PARAMS) for _ in range(2))
    assert first.code == 0, first.output
    return VolumeRun(place, first, again)


def test_predictions_lie_on_the_grid_of_their_image(run: VolumeRun) -> None:
    for site in GRIDS:
        manifest = pd.read_csv(run.place.manifest(site))
        stems = sorted(set(manifest[manifest["split"] == "test"]["volume"]))
        files = sorted((run.output / "predictions" / site).iterdir())
        assert [file.name for file in files] == [f"{stem}.nii.gz" for stem in stems]
        assert len(files) == TEST_VOLUMES
        model = load_site_model(run.place.models / site, run.place.foundations)
        for file in files:
            predicted, image = (nibabel.load(path) for path in (file, run.place.raw / site / "images" / file.name))
            assert predicted.shape == image.shape
            np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-6)
            labels = np.asanyarray(predicted.dataobj)
            assert labels.dtype == np.uint8
            assert 0 < labels.mean() < 1
            np.testing.assert_array_equal(labels, model.segment_volume(run.place.raw / site / "images" / file.name))


def test_the_table_scores_what_was_predicted_against_the_raw_masks_in_mm(run: VolumeRun) -> None:
    for site in GRIDS:
        table = pd.read_csv(run.output / "volume_scores" / f"{site}.csv", keep_default_na=False)
        assert set(table["model"]) == {"before", "after", "chosen"}
        chosen = table[table["model"] == "chosen"].set_index("volume")
        for file in (run.output / "predictions" / site).iterdir():
            predicted = nibabel.load(file)
            truth = np.asanyarray(nibabel.load(run.place.raw / site / "masks" / file.name).dataobj)
            spacing = tuple(float(mm) for mm in predicted.header.get_zooms())
            (expected,) = score_volume(np.asanyarray(predicted.dataobj), truth, spacing, [1], tolerance=3.0)
            row = chosen.loc[file.name.removesuffix(".nii.gz")]
            for metric in ("dice", "hd95_mm", "asd_mm", "nsd"):
                assert row[metric] == pytest.approx(expected[metric], rel=1e-4)


def test_tables_over_sites_are_written_shown_and_tracked(run: VolumeRun) -> None:
    volumes = pd.read_csv(run.place.reporting / "volume_scores.csv")
    assert len(volumes) == len(GRIDS) * TEST_VOLUMES * 3
    sites = pd.read_csv(run.place.reporting / "site_volume_scores.csv")
    assert sites[sites["model"] == "chosen"]["site"].tolist() == [*GRIDS, "mean over sites", "worst site"]
    final = json.loads((run.place.reporting / "volume_table.json").read_text())
    (parent,) = run.place.parents()
    nested = run.place.nested(parent)
    for site in GRIDS:
        assert nested[site].data.metrics["test volume Dice"] == final[site]["volume Dice"]
    assert parent.data.metrics["test volume HD95 mm mean over sites"] == final["mean over sites"]["volume HD95 mm"]
    tables = {artifact.path for artifact in run.place.client.list_artifacts(parent.info.run_id, "tables")}
    assert {"tables/volume_scores.csv", "tables/site_volume_scores.csv"} <= tables
    for output in (run.first.words, run.again.words):
        assert "Chosen models by volume, on the volumes' own grids" in output
        assert "an empty prediction for an empty mask has Dice 1" in output
    assert "Everything is up to date" in run.again.words


def test_slices_are_what_is_trained_and_scored_one_by_one(run: VolumeRun) -> None:
    for site in GRIDS:
        manifest = pd.read_csv(run.place.manifest(site), keep_default_na=False)
        test = manifest[manifest["split"] == "test"]
        names = {f"{volume}#{index:03d}" for volume, index in zip(test["volume"], test["slice"], strict=True)}
        assert set(pd.read_csv(run.place.test_scores(site))["image"]) == names
        report = json.loads(run.place.report(site).read_text())["volumes"]
        assert report["slices"]["train"] == (manifest["split"] == "train").sum()
        assert report["slices"]["left_out"] > 0


def test_volumes_that_changed_since_are_not_scored_with_the_old_models(run: VolumeRun, tmp_path: Path) -> None:
    place = run.place.moved(tmp_path / "moved")
    next((place.raw / "turned" / "images").iterdir()).unlink()
    done = place.run("evaluation", PARAMS)
    assert done.code != 0
    assert "trained under another configuration, data or code" in done.words


def test_a_run_without_volumes_leaves_no_trace_of_them(finished: Workplace) -> None:
    assert not [path for path in finished.data.rglob("*") if "volume" in path.name or path.name == "predictions"]
    manifest = pd.read_csv(finished.manifest("harbour_ct"), keep_default_na=False)
    assert set(manifest["slice"]) == {-1}
    assert set(manifest["volume"]) == {""}
