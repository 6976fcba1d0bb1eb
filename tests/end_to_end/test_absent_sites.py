"""Rounds in which not every site takes part."""

from __future__ import annotations

import json

import pytest

SITES = ["harbour_ct", "meadow_mri", "summit_ultrasound", "valley_endoscopy"]


def records(place) -> list[dict]:
    return [
        json.loads(path.read_text()) for path in sorted((place.data / "07_model_output" / "rounds").glob("*/*.json"))
    ]


@pytest.mark.slow
def test_participation_draws_its_share_of_the_sites_each_round(sites) -> None:
    done = sites.run("federated_training", "federation.participation=0.6,federation.rounds=3")

    trained = records(sites)[:-1]
    assert done.code == 0, done.output
    # 0.6 of four sites is two; four rounds' worth of pairs are not all the same.
    assert [len(record["accepted"]) for record in trained] == [2, 2, 2]
    assert len({tuple(record["accepted"]) for record in trained}) > 1
    for record in trained:
        absent = {site for site, entry in record["sites"].items() if entry["absent"]}
        assert absent == set(SITES) - set(record["accepted"])
        assert {record["sites"][site]["absent"] for site in absent} == {"not drawn this round"}
        assert all(record["sites"][site]["bytes_up"] == 0 for site in absent)
    (parent,) = sites.parents()
    for site, run in sites.nested(parent).items():
        present = [record["round"] for record in trained if site in record["accepted"]]
        assert sites.steps(run, "loss") == present if present else "loss" not in run.data.metrics


def test_a_site_that_fails_is_absent_that_round_and_has_a_model_all_the_same(sites) -> None:
    done = sites.run("federated_training", "federation.inject_failures.meadow_mri=[1],federation.rounds=2")

    first, second, _ = records(sites)
    assert done.code == 0, done.output
    assert "meadow_mri: absent (injected" in done.words
    assert first["accepted"] == [site for site in SITES if site != "meadow_mri"]
    assert second["accepted"] == SITES
    assert all((sites.models / site / "site_model.json").is_file() for site in SITES)


def test_too_few_sites_end_the_run_and_mended_sites_go_on_from_the_round_before(sites) -> None:
    failing = ",".join(f"federation.inject_failures.{site}=[2]" for site in SITES)

    failed = sites.run("federated_training", failing)

    assert failed.code == 1
    assert "round 2: 0 valid replies, federation.quorum asks for 1" in failed.words
    assert "Traceback" not in failed.output
    assert [path.stem for path in sites.checkpoints.glob("*/server/*.safetensors")] == ["round_00001"]
    assert sites.parents()[0].info.status == "FAILED"


@pytest.mark.slow
def test_a_run_that_ended_below_its_quorum_goes_on_with_a_lower_one(sites) -> None:
    asked = "federation.inject_failures.meadow_mri=[2],federation.rounds=2,federation.quorum="
    failed = sites.run("federated_training", f"{asked}{len(SITES)}")
    assert failed.code == 1
    assert "or lower federation.quorum" in failed.words

    done = sites.run("federated_training", f"{asked}1")

    assert done.code == 0, done.output
    assert [record["accepted"] for record in records(sites)[:2]] == [SITES, [s for s in SITES if s != "meadow_mri"]]
