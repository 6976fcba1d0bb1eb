"""Differential privacy with real processes: what stays at a hospital, what it refuses, and what a crash costs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest
from deployed import SITES, Deployed, in_process, same, until
from mlflow import MlflowClient

from fedsca_pipeline.federation.site.privacy.ledger import KEY, PrivacyLedger
from fedsca_pipeline.files import read_json, read_tensors
from fedsca_pipeline.flower.audit.log import read_log

# Rounds take seconds, so that the test can interrupt them. Messages are uncompressed, so that it can search them.
PRIVATE = {
    "training.privacy.epsilon": 6,
    "training.steps_per_round": 20,
    "federation.rounds": 2,
    "federation.quorum": 3,
    "federation.compression": "none",
}


def ledger(deployed: Deployed, site: str) -> PrivacyLedger:
    return PrivacyLedger(deployed.folder / site / "private" / site)


def is_in_round(deployed: Deployed, site: str, round_: int) -> bool:
    """Return whether a site has recorded a round in its ledger but has not finished it."""
    states = deployed.folder / site / "07_model_output" / "checkpoints"
    recorded = any(entry.round == round_ for entry in ledger(deployed, site).entries())
    return recorded and not any(states.rglob(f"state_{round_:05d}.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_private_run_survives_refusals_and_kills_and_spends_each_round_once(new_deployed, tmp_path: Path) -> None:
    """One long test, because a federation takes long to start."""
    deployed = new_deployed(recorded=True, own={"hospital_c": {"privacy": {"epsilon": 4}}})
    coordinator = deployed.start(**PRIVATE)

    # A hospital with a stricter bound than the run reports it, and starts nothing.
    until(lambda: "waiting for hospital_c" in deployed.output())
    assert (
        "waiting for hospital_c: training.privacy: the run has epsilon 6 at delta 1e-05, and this site's privacy "
        "allows epsilon 4 at delta 1e-05; lower it to that"
    ) in deployed.output()
    assert not ledger(deployed, "hospital_c").folder.exists()

    # The hospital raises its bound, while the coordinator is killed during the round and restarted.
    until(lambda: all(ledger(deployed, site).entries() for site in ("hospital_a", "hospital_b")))
    os.killpg(coordinator.pid, signal.SIGKILL)
    coordinator.wait()
    assert deployed.federation.stop("hospital_c") == 0
    deployed.change_file("hospital_c", privacy={"epsilon": 6})
    deployed.federation.start_site("hospital_c")
    again = deployed.start("again", **PRIVATE)

    # A hospital is stopped and restarted during a round.
    until(lambda: is_in_round(deployed, "hospital_b", 2))
    worker = deployed.process("hospital_b", "flower.site.worker")
    worker.suspend()
    assert is_in_round(deployed, "hospital_b", 2)
    assert deployed.federation.stop("hospital_b") == 0
    deployed.federation.start_site("hospital_b")
    assert again.wait(600) == 0, deployed.output("again")

    for site in SITES:
        assert [entry.round for entry in ledger(deployed, site).entries()] == [1, 2]
    check_epsilon_is_reported(deployed)
    check_secrets_stay(deployed)

    # With the same secrets, an uninterrupted run in process has the same bits and ledgers.
    for site in SITES:
        key = tmp_path / "data" / "private" / site / KEY
        key.parent.mkdir(parents=True)
        shutil.copy(ledger(deployed, site).folder / KEY, key)
    run = in_process(deployed, tmp_path / "data", **PRIVATE)
    assert same(deployed.server(3), read_tensors(run / "server" / "round_00003.safetensors"))
    for site in SITES:
        assert same(deployed.model(site), read_tensors(run / "sites" / site / "last.safetensors"))
        assert ledger(deployed, site).entries() == PrivacyLedger(tmp_path / "data" / "private" / site).entries()
    assert privacy_columns(deployed.folder / "data") == privacy_columns(tmp_path / "data")


def privacy_columns(data: Path) -> dict[str, tuple[float, str]]:
    table = read_json(data / "08_reporting" / "final_table.json")
    return {site: (table[site]["epsilon"], table[site]["privacy"]) for site in SITES}


def check_epsilon_is_reported(deployed: Deployed) -> None:
    reported = privacy_columns(deployed.folder / "data")
    client = MlflowClient(tracking_uri=f"sqlite:///{deployed.database}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    nested = {run.data.tags["fedsca.site"]: run for run in runs if "fedsca.site" in run.data.tags}
    for site, (epsilon, level) in reported.items():
        assert level == "patient-level"
        assert f"{site} {epsilon:.2f}" in deployed.output("again").partition("Epsilon spent, patient-level: ")[2]
        history = client.get_metric_history(nested[site].info.run_id, "epsilon")
        assert [point.step for point in history] == [1, 2]
        assert history[0].value < history[1].value == pytest.approx(epsilon)
        assert 5 < epsilon <= 6
        assert nested[site].data.tags["fedsca.privacy"] == level
        assert not client.get_metric_history(nested[site].info.run_id, "loss")


def check_secrets_stay(deployed: Deployed) -> None:
    """Check that neither the wire nor the coordinator holds a secret, a ledger entry or a training loss of a site."""
    at_sites = {"raw", *SITES, *(f"{site}.yml" for site in SITES), *(f"{site}.log" for site in SITES)}
    coordinator = [
        path
        for path in deployed.folder.rglob("*")
        if path.is_file() and not at_sites & set(path.relative_to(deployed.folder).parts)
    ]
    assert {"mlflow.db", "state.db", "audit.jsonl", "kedro.log"} <= {path.name for path in coordinator}
    run = ledger(deployed, SITES[0]).entries()[0].run
    noise = ledger(deployed, SITES[0]).entries()[0].noise
    # The search works: it finds values that are sent.
    assert holding(deployed.recorded_requests(), [run, str(noise), "dice_validation"]) == 3
    assert holding(coordinator, [run]) == 1
    for site in SITES:
        secret = (ledger(deployed, site).folder / KEY).read_text().strip()
        starts = [entry.start for entry in ledger(deployed, site).entries()]
        secrets = [
            *(text for hidden in (secret, *starts) for text in (hidden, bytes.fromhex(hidden))),
            "privacy_ledger",
        ]
        assert holding(deployed.recorded_requests(), secrets) == 0
        assert holding(coordinator, secrets) == 0
    for record in read_log(deployed.federation.home / "audit.jsonl"):
        if (record["kind"], record["direction"]) == ("round", "in") and "manifest" in record:
            assert "loss" not in record["manifest"]["metrics"]


def holding(files: Iterable[Path], wanted: Collection[str | bytes]) -> int:
    """Return how many of the wanted texts occur in any of the files."""
    needles = [text.encode() if isinstance(text, str) else text for text in wanted]
    contents = [path.read_bytes() for path in files]
    return sum(any(needle in content for content in contents) for needle in needles)
