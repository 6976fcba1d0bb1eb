"""Differential privacy through real processes: what a hospital keeps to itself, what it refuses, what a crash costs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest
from deployed import SITES, Deployed, in_process, same, until
from mlflow import MlflowClient

from fedsca_pipeline.federation.site.privacy.ledger import KEY, Vault
from fedsca_pipeline.files import read_json, read_tensors
from fedsca_pipeline.flower.audit.log import read_log

# Rounds of seconds, so that they can be broken off; messages as they are, so that they can be searched.
PRIVATE = {
    "training.privacy.epsilon": 6,
    "training.steps_per_round": 20,
    "federation.rounds": 2,
    "federation.quorum": 3,
    "federation.compression": "none",
}


def vault(deployed: Deployed, site: str) -> Vault:
    return Vault(deployed.folder / site / "private" / site)


def in_the_midst_of(deployed: Deployed, site: str, round_: int) -> bool:
    """Tell whether a site has entered a round in its ledger, and not yet ended it."""
    states = deployed.folder / site / "07_model_output" / "checkpoints"
    entered = any(entry.round == round_ for entry in vault(deployed, site).entries())
    return entered and not any(states.rglob(f"state_{round_:05d}.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_private_run_is_refused_killed_and_gone_on_with_and_each_round_is_spent_once(
    new_deployed, tmp_path: Path
) -> None:
    """One story, since a federation takes long to start."""
    deployed = new_deployed(recorded=True, own={"hospital_c": {"privacy": {"epsilon": 4}}})
    coordinator = deployed.start(**PRIVATE)

    # A hospital that allows less than the run asks for says so, and nothing of it has begun.
    until(lambda: "waiting for hospital_c" in deployed.said())
    assert (
        "waiting for hospital_c: training.privacy: the run has epsilon 6 at delta 1e-05, and this site's privacy "
        "allows epsilon 4 at delta 1e-05; lower it to that"
    ) in deployed.said()
    assert not vault(deployed, "hospital_c").folder.exists()

    # Its owner allows more, while the coordinator is killed in the midst of the round, and its command typed again.
    until(lambda: all(vault(deployed, site).entries() for site in ("hospital_a", "hospital_b")))
    os.killpg(coordinator.pid, signal.SIGKILL)
    coordinator.wait()
    assert deployed.federation.stop("hospital_c") == 0
    deployed.change_file("hospital_c", privacy={"epsilon": 6})
    deployed.federation.start_site("hospital_c")
    again = deployed.start("again", **PRIVATE)

    # A hospital is stopped and started in the midst of a round.
    until(lambda: in_the_midst_of(deployed, "hospital_b", 2))
    worker = deployed.process("hospital_b", "flower.worker")
    worker.suspend()
    assert in_the_midst_of(deployed, "hospital_b", 2)
    assert deployed.federation.stop("hospital_b") == 0
    deployed.federation.start_site("hospital_b")
    assert again.wait(600) == 0, deployed.said("again")

    for site in SITES:
        assert [entry.round for entry in vault(deployed, site).entries()] == [1, 2]
    epsilon_is_told(deployed)
    secrets_stay(deployed)

    # With the same secrets, the bits and the ledgers of a run in process that nothing has broken.
    for site in SITES:
        key = tmp_path / "data" / "private" / site / KEY
        key.parent.mkdir(parents=True)
        shutil.copy(vault(deployed, site).folder / KEY, key)
    run = in_process(deployed, tmp_path / "data", **PRIVATE)
    assert same(deployed.server(3), read_tensors(run / "server" / "round_00003.safetensors"))
    for site in SITES:
        assert same(deployed.model(site), read_tensors(run / "sites" / site / "last.safetensors"))
        assert vault(deployed, site).entries() == Vault(tmp_path / "data" / "private" / site).entries()
    assert privacy_columns(deployed.folder / "data") == privacy_columns(tmp_path / "data")


def privacy_columns(data: Path) -> dict[str, tuple[float, str]]:
    table = read_json(data / "08_reporting" / "final_table.json")
    return {site: (table[site]["epsilon"], table[site]["privacy"]) for site in SITES}


def epsilon_is_told(deployed: Deployed) -> None:
    told = privacy_columns(deployed.folder / "data")
    client = MlflowClient(tracking_uri=f"sqlite:///{deployed.database}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    nested = {run.data.tags["fedsca.site"]: run for run in runs if "fedsca.site" in run.data.tags}
    for site, (epsilon, level) in told.items():
        assert level == "patient-level"
        assert f"{site} {epsilon:.2f}" in deployed.said("again").partition("Epsilon spent, patient-level: ")[2]
        history = client.get_metric_history(nested[site].info.run_id, "epsilon")
        assert [point.step for point in history] == [1, 2]
        assert history[0].value < history[1].value == pytest.approx(epsilon)
        assert 5 < epsilon <= 6
        assert nested[site].data.tags["fedsca.privacy"] == level
        assert not client.get_metric_history(nested[site].info.run_id, "loss")


def secrets_stay(deployed: Deployed) -> None:
    """Neither the wire nor the coordinator has a site's secret, or a line of its ledger, or a training loss."""
    own = {"raw", *SITES, *(f"{site}.yml" for site in SITES), *(f"{site}.log" for site in SITES)}
    coordinator = [
        path
        for path in deployed.folder.rglob("*")
        if path.is_file() and not own & set(path.relative_to(deployed.folder).parts)
    ]
    assert {"mlflow.db", "state.db", "audit.jsonl", "kedro.log"} <= {path.name for path in coordinator}
    run = vault(deployed, SITES[0]).entries()[0].run
    told = vault(deployed, SITES[0]).entries()[0].noise
    # What is looked for would be found: these are there.
    assert holding(deployed.sent(), [run, str(told), "dice_validation"]) == 3
    assert holding(coordinator, [run]) == 1
    for site in SITES:
        secret = (vault(deployed, site).folder / KEY).read_text().strip()
        starts = [entry.start for entry in vault(deployed, site).entries()]
        kept = [*(text for hidden in (secret, *starts) for text in (hidden, bytes.fromhex(hidden))), "privacy_ledger"]
        assert holding(deployed.sent(), kept) == 0
        assert holding(coordinator, kept) == 0
    for record in read_log(deployed.federation.home / "audit.jsonl"):
        if (record["kind"], record["direction"]) == ("round", "in") and "manifest" in record:
            assert "loss" not in record["manifest"]["metrics"]


def holding(files: Iterable[Path], wanted: Collection[str | bytes]) -> int:
    """Return how many of the wanted stand in any of the files."""
    needles = [text.encode() if isinstance(text, str) else text for text in wanted]
    contents = [path.read_bytes() for path in files]
    return sum(any(needle in content for content in contents) for needle in needles)
