"""A deployed federation through real processes: SuperLink, nginx, three hospitals and ``kedro run``, on loopback.

The tests need Flower's environment (``make engine``) and nginx; they are skipped if either is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from deployed import SITES, Deployed, in_process, same, until

from demo import PROJECT
from fedsca_pipeline.files import read_tensors
from fedsca_pipeline.flower.audit.log import read_log
from fedsca_pipeline.flower.processes.engine import environment


@pytest.mark.timeout(1800)
def test_a_deployed_run_ends_with_the_table_and_the_bits_of_a_run_in_process(new_deployed, tmp_path: Path) -> None:
    deployed = new_deployed(volumes=True)

    output = deployed.run()

    assert "Test results per site" in output
    assert "Chosen models by volume, on the volumes' own grids" in output
    assert all(site in output for site in SITES)
    run = in_process(deployed, tmp_path / "data")
    for round_ in (2, 3):
        assert same(deployed.server(round_), read_tensors(run / "server" / f"round_{round_:05d}.safetensors"))
    for site in SITES:
        for name in ("best", "last"):
            assert same(deployed.model(site, name), read_tensors(run / "sites" / site / f"{name}.safetensors"))
    check_tables_equal_a_run_in_process(deployed, tmp_path / "data")
    check_coordinator_has_no_private_files(deployed)
    check_both_audit_logs_agree(deployed)
    for site in SITES:
        assert deployed.federation.stop(site) == 0


def check_tables_equal_a_run_in_process(deployed: Deployed, data: Path) -> None:
    # A message holds its duration, so the sizes of compressed messages differ.
    for name in ("site_scores", "site_volume_scores", "final_table"):
        here, there = (pd.read_csv(root / "08_reporting" / f"{name}.csv") for root in (deployed.folder / "data", data))
        sizes = [column for column in here.columns if column.startswith("bytes")]
        pd.testing.assert_frame_equal(here.drop(columns=sizes), there.drop(columns=sizes), rtol=1e-12)
    predictions = [path.name for path in (deployed.folder / SITES[-1]).rglob("predictions/*/*.nii.gz")]
    assert sorted(predictions) == sorted(path.name for path in data.rglob("predictions/*/*.nii.gz"))
    assert predictions


def check_coordinator_has_no_private_files(deployed: Deployed) -> None:
    here = {path.name for path in (deployed.folder / "data").rglob("*") if path.is_file()}
    assert not [name for name in here if name.endswith(".nii.gz")]
    assert not here & {
        "manifest.csv",
        "arrays.safetensors",
        "test_scores.csv",
        "volume_scores.csv",
        "overlays.png",
        "report.json",
    }
    assert not [name for name in here if name.startswith(("state_", "best", "last."))]
    at_site = {path.name for path in (deployed.folder / SITES[0]).rglob("*") if path.is_file()}
    assert {"manifest.csv", "arrays.safetensors", "test_scores.csv", "overlays.png", "site_model.json"} <= at_site


def check_both_audit_logs_agree(deployed: Deployed) -> None:
    """Check that both ends logged the same messages, byte for byte, with allowed content only."""
    ends = [record for site in SITES for record in read_log(deployed.folder / site / "audit.jsonl")]
    server = list(read_log(deployed.federation.home / "audit.jsonl"))
    other = {"in": "out", "out": "in"}
    assert sorted(message_of(record, record["direction"]) for record in ends) == sorted(
        message_of(record, other[record["direction"]]) for record in server
    )
    low = {name for name in deployed.model(SITES[0]) if ".blocks." in name}
    for record in server:
        if record["kind"] == "round":
            assert set(record["tensors"]) <= low
            assert all(dtype == "F16" for dtype, _ in record["tensors"].values())
            metrics = {"dice_validation", "dice_local", "loss", "steps", "seconds"}
            assert set(record["manifest"]["metrics"]) <= metrics
        else:
            assert set(record.get("document", record.get("keys"))) <= {
                "code", "configuration", "data", "fingerprint", "foundation", "threads", "site", "version", "train",
                "validation", "test", "samples", "begun", "run", "means", "volumes", "rounds", "dice_validation",
            }  # fmt: skip


def message_of(record: Mapping[str, Any], direction: str) -> tuple:
    """Return the fields of a message that both ends must log alike; ``direction`` is seen from the site."""
    return (record["site"], record["kind"], record["round"], direction, record["bytes"], record["sha256"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_supernode_misses_rounds_and_rejoins_the_same_run(new_deployed, tmp_path: Path) -> None:
    deployed = new_deployed()
    # Two minutes of rounds: for one minute the SuperLink assumes that a killed node is alive and refuses a new one.
    coordinator = deployed.start(federation__rounds=14, federation__grace=5)
    until(lambda: 1 in deployed.rounds_received("hospital_c"))
    worker = deployed.process("hospital_c", "flower.site.worker")
    worker.suspend()
    until(lambda: 2 in deployed.rounds_received("hospital_a"))
    deployed.process("hospital_c", "flower-supernode").kill()
    worker.resume()

    assert coordinator.wait(900) == 0, deployed.output()

    assert "hospital_c: absent" in deployed.output()
    assert max(deployed.rounds_received("hospital_c")) == 15
    # Training in a round without an answer has no effect.
    missed = {"hospital_c": deployed.rounds_missed("hospital_c")}
    check_models_equal_a_run_with_absent_sites(deployed, tmp_path / "data", missed, {"federation.rounds": 14})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sites_whose_answers_arrive_only_in_part_are_absent_and_delay_no_other_site(new_deployed) -> None:
    deployed = new_deployed()
    deployed.block_large_answers(refused="hospital_b", stalled="hospital_c")
    coordinator = deployed.start(federation__rounds=3, federation__quorum=1, federation__grace=10, adapters__width=32)
    until(lambda: "hospital_c: absent" in deployed.output())
    # It has announced its answer, and is still sending.
    deployed.process("hospital_c", "flower-supernode").kill()

    assert coordinator.wait(900) == 0, deployed.output()

    assert "the link to the sites is lost" not in deployed.output()
    assert deployed.rounds_missed("hospital_a") == []
    assert deployed.rounds_missed("hospital_b") == [1, 2, 3]
    assert deployed.rounds_missed("hospital_c")[:3] == [1, 2, 3]
    # The last message asks for no update, so its answer is small.
    assert deployed.rounds_received("hospital_b") == [1, 2, 3, 4]
    assert "413 Request Entity Too Large" in deployed.output("hospital_b")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_whose_worker_hangs_or_dies_is_absent_and_recovers(new_deployed, tmp_path: Path) -> None:
    deployed = new_deployed()
    coordinator = deployed.start(federation__rounds=5, federation__deadline=20, federation__grace=15)
    until(lambda: 1 in deployed.rounds_received("hospital_b"))
    deployed.process("hospital_b", "flower.site.worker").suspend()
    deployed.process("hospital_c", "flower.site.worker").kill()

    assert coordinator.wait(900) == 0, deployed.output()

    log = deployed.federation.log("hospital_b")
    assert "took longer than" in log or "its worker died" in log
    assert max(deployed.rounds_received("hospital_b")) == 6
    assert max(deployed.rounds_received("hospital_c")) == 6
    missed = {site: deployed.rounds_missed(site) for site in ("hospital_b", "hospital_c")}
    check_models_equal_a_run_with_absent_sites(deployed, tmp_path / "data", missed, {"federation.rounds": 5})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_whose_worker_runs_out_of_memory_is_absent_for_a_round_and_returns_with_its_private_state(
    new_deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory of tensors this large is returned to the system when freed, so each round allocates again. Smaller
    # allocations fit into memory that the process already has, so they do not fail.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "67108864")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    deployed = new_deployed()
    coordinator = deployed.start(federation__rounds=4, federation__grace=15, preprocessing__image_size=256)
    until(lambda: deployed.rounds_received("hospital_c"))
    worker = deployed.process("hospital_c", "flower.site.worker")
    worker.suspend()
    # A site that fails before the others have answered is asked again and misses no round.
    until(
        lambda: current_round(deployed) not in deployed.rounds_answered("hospital_c") and others_have_answered(deployed)
    )
    # The worker keeps its memory but gets no more. The next worker starts without this limit.
    worker.rlimit(psutil.RLIMIT_DATA, (1, psutil.RLIM_INFINITY))
    worker.resume()

    assert coordinator.wait(900) == 0, deployed.output()

    (missed,) = re.findall(
        r"round (\d+): hospital_c: its worker ran out of memory .*?resources\.memory", deployed.output()
    )
    assert max(deployed.rounds_received("hospital_c")) == 5
    given = {"federation.rounds": 4, "preprocessing.image_size": 256}
    check_models_equal_a_run_with_absent_sites(deployed, tmp_path / "data", {"hospital_c": [int(missed)]}, given)


def check_models_equal_a_run_with_absent_sites(
    deployed: Deployed, root: Path, absent: Mapping[str, Sequence[int]], parameters: Mapping[str, Any]
) -> None:
    run = in_process(deployed, root, absent=absent, **parameters)
    for site in SITES:
        assert same(deployed.model(site), read_tensors(run / "sites" / site / "last.safetensors"))


def current_round(deployed: Deployed) -> int:
    """Return the last round that the third hospital has received."""
    return max(deployed.rounds_received("hospital_c"))


def others_have_answered(deployed: Deployed) -> bool:
    return all(current_round(deployed) in deployed.rounds_answered(site) for site in SITES[:2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_coordinator_and_a_killed_superlink_lose_no_round_and_change_no_bit(
    new_deployed, tmp_path: Path
) -> None:
    deployed = new_deployed()
    coordinator = deployed.start(federation__rounds=4)
    until(lambda: 2 in deployed.rounds_received("hospital_a"))
    os.killpg(coordinator.pid, signal.SIGKILL)
    coordinator.wait()
    again = deployed.start("again", federation__rounds=4)
    until(lambda: 3 in deployed.rounds_received("hospital_a"))
    deployed.federation.kill("superlink")
    deployed.federation.kill("superexec")
    time.sleep(3)
    deployed.federation.start_superlink()

    assert again.wait(900) == 0, deployed.output("again")

    run = in_process(deployed, tmp_path / "data", **{"federation.rounds": 4})
    assert same(deployed.server(5), read_tensors(run / "server" / "round_00005.safetensors"))
    for site in SITES:
        assert same(deployed.model(site), read_tensors(run / "sites" / site / "last.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_below_the_quorum_the_run_waits_for_a_hospital_and_continues_when_it_returns(new_deployed) -> None:
    deployed = new_deployed()
    coordinator = deployed.start(federation__rounds=3, federation__quorum=3, federation__grace=5)
    until(lambda: 1 in deployed.rounds_received("hospital_c"))
    assert deployed.federation.stop("hospital_c") == 0
    until(lambda: "waiting for hospital_c" in deployed.output())
    deployed.federation.start_site("hospital_c")

    assert coordinator.wait(900) == 0, deployed.output()
    assert max(deployed.rounds_received("hospital_c")) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_waits_for_a_hospital_continues_without_it_with_a_lower_quorum(new_deployed) -> None:
    deployed = new_deployed()
    coordinator = deployed.start(federation__rounds=3, federation__quorum=3)
    until(lambda: 1 in deployed.rounds_received("hospital_c"))
    assert deployed.federation.stop("hospital_c") == 0
    until(lambda: "waiting for hospital_c" in deployed.output())
    os.killpg(coordinator.pid, signal.SIGINT)
    assert coordinator.wait(60) == 130, deployed.output()

    deployed.run("again", federation__rounds=3, federation__quorum=2, federation__grace=5)

    assert deployed.rounds_missed("hospital_c")[-1] == 4
    assert deployed.rounds_missed("hospital_a") == []


FOREIGN = """
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
site = ClientApp()


@server.main()
def ask(grid, context):
    while not list(grid.get_node_ids()):
        time.sleep(1)
    task = RecordDict({"task": ConfigRecord({"kind": "prepare", "payload": b""})})
    messages = [Message(task, dst_node_id=node, message_type="train", ttl=30.0) for node in grid.get_node_ids()]
    errors = [str(reply.error) for reply in grid.send_and_receive(messages, timeout=60)]
    Path(context.run_config["replied"]).write_text("; ".join(errors))


@site.train()
def steal(message, context):
    Path(context.run_config["stolen"]).touch()
    return Message(RecordDict(), reply_to=message)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_code_sent_with_a_foreign_run_is_not_executed_at_a_hospital(new_deployed, tmp_path: Path) -> None:
    deployed = new_deployed()
    app = tmp_path / "foreign"
    shutil.copytree(PROJECT / "src" / "fedsca_pipeline" / "flower" / "app", app)
    (app / "fedsca_app.py").write_text(FOREIGN)
    project = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(project.replace("socket", "replied").replace("most = 0", 'stolen = ""'))
    until(lambda: all("SuperNode ID" in deployed.output(site) for site in SITES))
    replied, stolen = tmp_path / "replied", tmp_path / "stolen"

    settings = f"replied={json.dumps(str(replied))} stolen={json.dumps(str(stolen))}"
    command = [str(deployed.federation.engine / "flwr"), "run", str(app), "coordinator", "--run-config", settings]
    env = environment(deployed.federation.engine, deployed.federation.home)
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    until(replied.exists)
    until(lambda: all("ForeignBundleError" in deployed.output(site) for site in SITES))
    assert not stolen.exists()
    assert not any((deployed.folder / site / "audit.jsonl").read_text() for site in SITES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_commands_at_once_are_refused_and_two_in_succession_stay_separate(new_deployed) -> None:
    deployed = new_deployed()
    first = deployed.start()
    until(lambda: 1 in deployed.rounds_received("hospital_a"))
    second = deployed.start("second", run__seed=7, data_root=deployed.folder / "other")

    assert second.wait(400) == 1
    assert "another command of this coordinator runs a federation" in deployed.output("second")
    assert first.wait(900) == 0, deployed.output()
    deployed.run("second", run__seed=7, data_root=deployed.folder / "other")
    runs = {path.name for path in (deployed.folder / "hospital_a/07_model_output/checkpoints").glob("*/")}
    assert len(runs) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_coordinators_with_the_same_run_at_once_stay_separate(new_deployed, tmp_path: Path) -> None:
    deployed = new_deployed()
    homes = {name: deployed.folder / name for name in ("one", "two")}
    coordinators = {
        name: deployed.start(name, federation__rounds=3, flower__home=home / "home", data_root=home)
        for name, home in homes.items()
    }

    for name, coordinator in coordinators.items():
        assert coordinator.wait(900) == 0, deployed.output(name)

    alone = in_process(deployed, tmp_path / "data", **{"federation.rounds": 3})
    name = "server/round_00004.safetensors"
    for home in homes.values():
        (run,) = (home / "07_model_output" / "checkpoints").glob("*/")
        assert same(read_tensors(run / name), read_tensors(alone / name))
    for site in SITES:
        stored = sorted((deployed.folder / site / "07_model_output" / "checkpoints").glob("*/*/sites"))
        assert len(stored) == 2
        for folder in stored:
            last = read_tensors(folder / site / "last.safetensors")
            assert same(last, read_tensors(alone / "sites" / site / "last.safetensors"))
