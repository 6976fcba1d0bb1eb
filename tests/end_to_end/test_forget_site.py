"""A hospital withdraws."""

from __future__ import annotations

import shutil

import pytest

SITE = "meadow_mri"


@pytest.mark.slow
def test_a_site_that_is_gone_is_named_by_the_next_run_and_forgotten_by_the_command_it_names(workplace) -> None:
    trained = workplace.run("federated_training", "federation.rounds=1")
    assert trained.code == 0, trained.output
    assert "sites that are gone" not in trained.words
    (parent,) = workplace.parents()
    artifacts = workplace.client.get_run(workplace.nested(parent)[SITE].info.run_id).info.artifact_uri
    shutil.rmtree(workplace.raw / SITE)

    prepared = workplace.run("preprocessing", "federation.rounds=1")
    mistyped = workplace.run("forget_site", f"site={SITE}x")
    forgotten = workplace.run("forget_site", f"site={SITE}")

    assert prepared.code == 0, prepared.output
    assert prepared.words.count("sites that are gone are still there: meadow_mri;") == 1
    assert "kedro run --pipeline=forget_site --params=site=meadow_mri" in prepared.words
    assert mistyped.code == 1
    assert "did you mean 'meadow_mri'?" in mistyped.words
    assert forgotten.code == 0, forgotten.output
    assert f"{SITE}: deleted " in forgotten.stdout
    assert "1 MLflow run" in forgotten.stdout
    assert str(workplace.models / SITE) in forgotten.stdout
    kept = {path: path for path in workplace.data.rglob("*") if path.is_file() and path.name != ".lock"}
    assert not [path for path in kept if SITE in str(path) or SITE.encode() in path.read_bytes()]
    assert (workplace.models / "harbour_ct" / "site_model.json").is_file()
    assert sorted(workplace.nested(parent)) == ["harbour_ct", "summit_ultrasound", "valley_endoscopy"]
    assert not list(workplace.client.list_artifacts(parent.info.run_id))
    assert not (workplace.root / "mlartifacts" / artifacts.rpartition("/mlartifacts/")[2]).exists()
