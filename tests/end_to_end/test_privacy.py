"""Differential privacy through the command line: what is spent is told and kept, and too much is refused."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from safetensors.torch import load_file

PRIVATE = "federation.rounds=2,training.privacy.epsilon=6"
STATE = "07_model_output/checkpoints/*/sites/*/state_00001.safetensors"


def ledgers(place) -> dict[str, list[dict]]:
    return {path.parent.name: json.loads(path.read_text()) for path in place.data.glob("private/*/privacy_ledger.json")}


def tensors(place) -> dict[str, dict]:
    return {str(path.relative_to(place.models)): load_file(path) for path in place.models.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_private_run_is_killed_resumed_and_refused_a_second_time(new_workplace) -> None:
    """One story, since every command costs seconds: two workplaces that share the sites' secrets."""
    unbroken, killed = new_workplace(), new_workplace()
    done = unbroken.run(params=PRIVATE)
    assert done.code == 0, done.output

    # Told in the table, by site and round in MLflow, and kept at the site.
    table = json.loads((unbroken.reporting / "final_table.json").read_text())
    names = sorted(table.keys() - {"mean over sites"})
    # The demonstration sites name patients, most of whom have several images.
    level = table["harbour_ct"]["privacy"]
    assert level == "patient-level"
    assert f"harbour_ct {table['harbour_ct']['epsilon']:.2f}" in done.words.partition("patient-level: ")[2]
    (parent,) = unbroken.parents()
    for site, run in unbroken.nested(parent).items():
        history = unbroken.client.get_metric_history(run.info.run_id, "epsilon")
        assert [point.step for point in history] == [1, 2]
        assert history[0].value < history[1].value <= 6
        assert table[site]["epsilon"] == pytest.approx(history[1].value)
        assert run.data.tags["fedsca.privacy"] == table[site]["privacy"]
        assert not unbroken.client.get_metric_history(run.info.run_id, "loss")
    assert sorted(ledgers(unbroken)) == names
    assert {site: [entry["round"] for entry in entries] for site, entries in ledgers(unbroken).items()} == {
        site: [1, 2] for site in names
    }

    # Killed and gone on with, with the same secrets: the same bits and the same ledger.
    for site in names:
        key = killed.data / "private" / site / "privacy.key"
        key.parent.mkdir(parents=True)
        shutil.copy(unbroken.data / "private" / site / "privacy.key", key)
    trained = {"pipeline": "federated_training"}
    stopped = killed.signal_when(lambda: any(killed.data.glob(STATE)), signal.SIGKILL, PRIVATE, **trained)
    assert stopped.code == -signal.SIGKILL, stopped.output
    assert any(ledgers(killed).values())
    resumed = killed.run(params=PRIVATE, **trained)
    assert resumed.code == 0, resumed.output
    assert ledgers(killed) == ledgers(unbroken)
    one, other = tensors(unbroken), tensors(killed)
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[path][name]) for path, found in one.items() for name, tensor in found.items())

    # What the sites have given away counts in the next run, too, and their limit holds.
    before = ledgers(killed)
    refused = killed.run(params=f"{PRIVATE},training.privacy.budget=6,run.seed=1", **trained)
    assert refused.code == 1
    assert "training.privacy.budget is 6; nothing was trained" in refused.words
    assert ledgers(killed) == before
