"""The worker of a site over a whole run: one foundation, repeatable bits, refusals, privacy and memory limits."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsca_pipeline.config import FederationConfig, Settings
from fedsca_pipeline.errors import ConfigError, DataError, MessageError, SiteError
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.run import code_version, describe_run
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.privacy.accountant import epsilon_of
from fedsca_pipeline.federation.site.privacy.ledger import KEY, LEDGER, Entry, PrivacyLedger
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.files import read_tensors, write_bytes
from fedsca_pipeline.flower.config import read_site_config
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.messages.contents import answer_content
from fedsca_pipeline.flower.site import worker
from fedsca_pipeline.flower.site.worker import SiteWork
from fedsca_pipeline.flower.site.worker_process import WorkerProcess, worker_command
from fedsca_pipeline.model.adapters.attach import build_trainable, start_values
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.layout import hash_tensors


@pytest.fixture
def configuration() -> Callable[..., dict[str, Any]]:
    """Returns the configuration of a run with a tiny random foundation; keywords change ``preprocessing``."""

    def make(**preprocessing: Any) -> dict[str, Any]:
        given = {
            "foundation": {"name": "random"},
            "preprocessing": {"image_size": 32, **preprocessing},
            "adapters": {"width": 4},
            "run": {"threads": 1},
            "federation": {"rounds": 3, "strategy": "fedsca"},
        }
        return Settings(**given, strategies={"fedsca": {}}).model_dump(mode="json")

    return make


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[SegmentationModel]:
    """Every foundation that has been loaded so far."""
    found: list[SegmentationModel] = []
    build = SegmentationModel.__init__

    def counted(model: SegmentationModel, *given: Any, **named: Any) -> None:
        found.append(model)
        build(model, *given, **named)

    monkeypatch.setattr(SegmentationModel, "__init__", counted)
    return found


def test_the_foundation_is_loaded_once_for_training_export_and_test_of_a_run(
    site_file, configuration, config, link, scripted, reply, clock, loads, tmp_path: Path
) -> None:
    work = SiteWork(read_site_config(site_file()))
    wanted = configuration()
    terms = documents.write(documents.PrepareRequest(configuration=wanted, code=code_version()))
    prepared = documents.read(documents.Prepared, work.answer("prepare", 0, terms))
    description = describe_run(wanted, {"a": prepared.version}, prepared.foundation, 1)
    settings = documents.settings(wanted)
    model, layout = build_trainable(
        settings.foundation, settings.adapters, tmp_path / "foundations", settings.preprocessing
    )
    # The coordinator's own.
    loads.clear()

    def answer(message: Any) -> Any:
        return reply("", message.node, work.answer(message.task["kind"], message.task["round"], message.payload))

    link.sites = {"a": scripted(answer=answer)}
    opening = documents.write(documents.Description(**description))
    strategy = build_strategy("fedsca", {}, layout)
    server = Server(
        FlowerFleet(link, config.model_copy(update={"sites": ["a"]}), opening=opening, clock=clock, sleep=clock.sleep),
        strategy,
        start_values(model, strategy.shared()),
        FederationConfig(rounds=3),
        run=description["fingerprint"],
        seed=0,
        folder=CheckpointFolder(tmp_path / "server", description["fingerprint"]),
    )
    finished = documents.write(documents.FinishRequest(run=description["fingerprint"]))

    records = list(server.rounds())
    scores = work.answer("finish", 5, finished)

    assert [record.sites["a"].absent for record in records] == [None] * 4
    assert {row.model for row in documents.read(documents.Scores, scores).means} == {"before", "after", "chosen"}
    assert len(loads) == 1

    # Another worker, which trained nothing, gives the same answer and loads the foundation again.
    assert SiteWork(work.config).answer("finish", 5, finished) == scores
    assert len(loads) == 2


def test_a_round_has_the_same_answer_before_and_after_the_test_of_the_models(site_file, configuration) -> None:
    work = SiteWork(read_site_config(site_file()))
    wanted = configuration()
    wanted["adapters"] = {"method": "lora", "options": {"r": 2, "lora_dropout": 0.5}}
    wanted["federation"]["strategy"], wanted["strategies"] = "ffa_lora", {"ffa_lora": {}}
    terms = documents.write(documents.PrepareRequest(configuration=wanted, code=code_version()))
    prepared = documents.read(documents.Prepared, work.answer("prepare", 0, terms))
    description = describe_run(wanted, {"a": prepared.version}, prepared.foundation, 1)
    work.answer("open", 0, documents.write(documents.Description(**description)))
    settings = documents.settings(wanted)
    model, layout = build_trainable(
        settings.foundation, settings.adapters, work.config.foundation_root, settings.preprocessing
    )
    base = start_values(model, build_strategy("ffa_lora", {}, layout).shared())

    def asked(kind: str, round_: int) -> bytes:
        given = Manifest(kind, description["fingerprint"], round_, "a", hash_tensors(base), 0, "fp16", relative=False)
        return work.answer("round", round_, encode(given, base))

    first = decode(asked("aggregate", 1), max_bytes=2**26)
    asked("final", 2)
    work.answer("finish", 3, documents.write(documents.FinishRequest(run=description["fingerprint"])))
    again = decode(asked("aggregate", 1), max_bytes=2**26)

    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    assert any(tensor.any() for tensor in first.tensors.values())


def test_a_foundation_replaced_after_the_run_was_opened_is_not_trained(site_file, configuration) -> None:
    work = SiteWork(read_site_config(site_file()))
    wanted = configuration()
    terms = documents.write(documents.PrepareRequest(configuration=wanted, code=code_version()))
    prepared = documents.read(documents.Prepared, work.answer("prepare", 0, terms))
    description = describe_run(wanted, {"a": prepared.version}, "ab" * 32, 1)
    path = work.folder.checkpoints / description["fingerprint"] / "run.json"
    write_bytes(path, documents.write(documents.Description(**description)))

    with pytest.raises(ConfigError, match=r"this site's foundation is .* but the run needs"):
        work.answer("finish", 1, documents.write(documents.FinishRequest(run=description["fingerprint"])))


def test_a_description_with_a_wrong_fingerprint_is_refused(site_file, configuration) -> None:
    work = SiteWork(read_site_config(site_file()))
    honest = documents.Description(**describe_run(configuration(), {"a": "data"}, "ab" * 32, 1))
    other = documents.Description(**{**honest.model_dump(), "data": {"a": "other"}})

    assert honest.expected_fingerprint() == honest.fingerprint
    with pytest.raises(MessageError, match="its fingerprint is"):
        work.answer("open", 0, documents.write(other))


def test_after_a_failed_preparation_the_site_does_not_use_the_earlier_one(site_file, configuration) -> None:
    config = read_site_config(site_file())
    work = SiteWork(config)
    terms = documents.write(documents.PrepareRequest(configuration=configuration(), code=code_version()))
    prepared = documents.read(documents.Prepared, work.answer("prepare", 0, terms))
    run = documents.Description(**describe_run(configuration(), {"a": prepared.version}, prepared.foundation, 1))
    assert documents.read(documents.Opened, work.answer("open", 0, documents.write(run))).run == run.fingerprint
    (config.data / "masks" / "3.png").write_bytes(b"broken")

    with pytest.raises(DataError):
        work.answer("prepare", 0, terms)
    with pytest.raises(ConfigError, match="not prepared"):
        work.answer("open", 0, documents.write(run))


@pytest.mark.parametrize(
    ("offered", "reason"),
    [
        ({}, "the run has no differential privacy, and this site's privacy allows epsilon 4 at delta 1e-06"),
        ({"epsilon": 5.0, "delta": 1e-6}, "the run has epsilon 5 at delta 1e-06"),
        ({"epsilon": 4.0, "delta": 1e-5}, "the run has epsilon 4 at delta 1e-05"),
    ],
)
def test_a_run_with_weaker_privacy_than_the_site_requires_is_refused_before_it_is_opened(
    site_file, configuration, offered: dict[str, float], reason: str
) -> None:
    work = SiteWork(read_site_config(site_file(privacy={"epsilon": 4, "delta": 1e-6})))
    wanted = configuration()
    wanted["training"]["privacy"] |= offered

    with pytest.raises(ConfigError, match=reason):
        work.answer("open", 0, documents.write(documents.Description(**describe_run(wanted, {}, "ab" * 32, 1))))

    assert not work.folder.checkpoints.exists()


PRIVATE = {"epsilon": 4.0, "delta": 1e-6}


def first_round(work: SiteWork, wanted: dict[str, Any], begun: str = "") -> tuple[str, bytes]:
    """Let a site join a run; return the fingerprint of the run and the message of its first round."""
    terms = documents.write(documents.PrepareRequest(configuration=wanted, code=code_version()))
    prepared = documents.read(documents.Prepared, work.answer("prepare", 0, terms))
    description = describe_run(wanted, {"a": prepared.version}, prepared.foundation, 1)
    work.answer("open", 0, documents.write(documents.Description(**description)), begun)
    settings = documents.settings(wanted)
    model, layout = build_trainable(
        settings.foundation, settings.adapters, work.config.foundation_root, settings.preprocessing
    )
    base = start_values(model, build_strategy("fedsca", {}, layout).shared())
    asked = Manifest("aggregate", description["fingerprint"], 1, "a", hash_tensors(base), 0, "fp16", relative=False)
    return description["fingerprint"], encode(asked, base)


def in_round(asked: bytes, round_: int, kind: str = "aggregate") -> bytes:
    """Return the same aggregate as the message of another round, for a site whose previous update was used."""
    message = decode(asked, max_bytes=2**26)
    return encode(replace(message.manifest, round=round_, kind=kind, answered=round_ - 1), message.tensors)


def training(work: SiteWork, asked: bytes, rounds: int, begun: str = "") -> Iterator[str]:
    """Run all rounds; yield the hashes of the updates and of the two models that the site saves."""
    for round_ in range(1, rounds + 1):
        answer = work.answer("round", round_, in_round(asked, round_), begun)
        yield hash_tensors(decode(answer, max_bytes=2**26).tensors)
    work.answer("round", rounds + 1, in_round(asked, rounds + 1, "final"), begun)
    for path in sorted((work.folder.checkpoints / begun).glob("*/sites/a/[bl]*st.safetensors")):
        yield hash_tensors(read_tensors(path))


@pytest.mark.parametrize("begun", ["1" * 16, ""], ids=["restarted", "resumed from its first checkpoint"])
def test_a_run_repeated_from_its_start_ends_in_the_same_bits(site_file, configuration, begun: str) -> None:
    work = SiteWork(read_site_config(site_file()))
    wanted = configuration()
    wanted["federation"]["rounds"] = 5
    _, asked = first_round(work, wanted)
    before = list(training(work, asked, 5))

    first_round(work, wanted, begun)

    assert len(set(before)) == len(before) == 7
    assert list(training(work, asked, 5, begun)) == before


def test_two_coordinators_with_the_same_run_at_once_each_get_the_result_of_a_single_one(
    site_file, configuration
) -> None:
    work = SiteWork(read_site_config(site_file()))
    wanted = configuration()
    _, asked = first_round(work, wanted)
    message = decode(asked, max_bytes=2**26)
    # As if the other coordinator missed a site that this one has.
    moved = {name: tensor + 0.01 for name, tensor in message.tensors.items()}
    runs = [asked, encode(replace(message.manifest, base_hash=hash_tensors(moved)), moved)]
    alone = []
    for begun, payload in zip(("1" * 16, "2" * 16), runs, strict=True):
        first_round(work, wanted, begun)
        alone.append(list(training(work, payload, 3, begun)))
    for begun in ("3" * 16, "4" * 16):
        first_round(work, wanted, begun)

    at_once = zip(training(work, runs[0], 3, "3" * 16), training(work, runs[1], 3, "4" * 16), strict=True)

    assert [list(found) for found in zip(*at_once, strict=True)] == alone
    assert alone[0] != alone[1]
    assert work._learner.cache_info().misses == 1


def test_a_site_that_is_upgraded_during_a_run_leaves_the_run(site_file, configuration) -> None:
    file = site_file()
    _, asked = first_round(SiteWork(read_site_config(file)), configuration())
    updated = SiteWork(read_site_config(file))
    updated._code = "f" * 16

    with pytest.raises(ConfigError, match=f"this site runs code {'f' * 16}"):
        updated.answer("round", 1, asked)


def test_a_site_whose_data_were_prepared_for_another_run_refuses_the_first_run(site_file, configuration) -> None:
    work = SiteWork(read_site_config(site_file()))
    run, asked = first_round(work, configuration())
    first_round(work, configuration(image_size=48))

    with pytest.raises(ConfigError, match=r"this site's data have since been prepared for another run"):
        work.answer("round", 1, asked)
    with pytest.raises(ConfigError, match=r"if two coordinators run, stop one"):
        work.answer("finish", 4, documents.write(documents.FinishRequest(run=run)))


def test_a_run_within_the_privacy_bound_is_trained_and_recorded_in_the_ledger_of_the_site(
    site_file, configuration
) -> None:
    work = SiteWork(read_site_config(site_file(privacy=PRIVATE)))
    wanted = configuration()
    wanted["training"]["privacy"] |= PRIVATE
    run, asked = first_round(work, wanted)

    answer = work.answer("round", 1, asked)

    content = answer_content("round", answer, 2**26)
    assert content["manifest"]["privacy"]["level"] == "image-level"
    assert 0 < content["manifest"]["privacy"]["epsilon"] <= 4
    assert "loss" not in content["manifest"]["metrics"]
    (entry,) = PrivacyLedger(work.folder.private / "a").entries()
    assert (entry.run, entry.round) == (run, 1)
    assert 2 < epsilon_of([entry] * 3, 1e-6) <= 4


def test_a_restarted_site_answers_a_round_with_the_same_bits_and_counts_it_once(site_file, configuration) -> None:
    config = read_site_config(site_file(privacy=PRIVATE))
    wanted = configuration()
    wanted["training"]["privacy"] |= PRIVATE
    _, asked = first_round(SiteWork(config), wanted)

    first, second = (decode(SiteWork(config).answer("round", 1, asked), max_bytes=2**26) for _ in range(2))

    assert hash_tensors(first.tensors) == hash_tensors(second.tensors)
    assert first.manifest.privacy == second.manifest.privacy
    assert len(PrivacyLedger(config.work / "private" / "a").entries()) == 1


def test_the_coordinator_gets_the_reason_why_a_site_refuses_a_round_and_continues(
    site_file, configuration, link, scripted, reply, exchange, caplog
) -> None:
    config = read_site_config(site_file(privacy=PRIVATE))
    PrivacyLedger(config.work / "private" / "a").record(Entry("earlier", 1, "ab" * 32, 16, 0.5, 0.8))
    wanted = configuration()
    wanted["training"]["privacy"] |= PRIVATE
    work = SiteWork(config)
    _, asked = first_round(work, wanted)

    def answer(message: Any) -> Any:
        with pytest.raises(SiteError) as refused:
            work.answer("round", 1, asked)
        return reply("", message.node, header={"failed": worker.public_reason(refused.value)})

    link.sites["a"] = scripted(answer=answer)

    found = exchange()

    assert isinstance(found["a"], Failure)
    assert "round 1 was refused" in found["a"].reason
    assert "the site's own privacy.epsilon is 4; nothing was trained" in found["a"].reason
    assert found["b"] == b"b1"
    assert found["a"].reason in caplog.text
    assert len(PrivacyLedger(config.work / "private" / "a").entries()) == 1


@pytest.mark.parametrize("name", [KEY, LEDGER])
def test_the_error_about_a_damaged_privacy_ledger_does_not_name_folders_of_the_site(
    site_file, configuration, name: str
) -> None:
    config = read_site_config(site_file(privacy=PRIVATE))
    wanted = configuration()
    wanted["training"]["privacy"] |= PRIVATE
    work = SiteWork(config)
    _, asked = first_round(work, wanted)
    ledger = config.work / "private" / "a"
    ledger.mkdir(parents=True)
    (ledger / name).write_text("damaged")

    with pytest.raises(SiteError) as damaged:
        work.answer("round", 1, asked)

    assert name in worker.public_reason(damaged.value)
    assert str(config.work) not in worker.public_reason(damaged.value)


def test_a_worker_ends_when_its_connection_cannot_be_read(monkeypatch) -> None:
    ended = []
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, {"kind": "round"}, bytes(11))
        worker._listen(theirs, 10, queue.SimpleQueue())

    assert ended == [1]


def test_a_worker_beyond_its_memory_limit_reports_it_and_the_next_task_gets_a_new_worker(
    site_file, configuration, monkeypatch
) -> None:
    # Each thread needs memory for its stack.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = site_file(resources={"memory": 0.75})
    worker = WorkerProcess(worker_command(file), read_site_config(file).resources)

    def prepare(image_size: int) -> tuple[dict[str, Any], bytes]:
        terms = documents.PrepareRequest(configuration=configuration(image_size=image_size), code=code_version())
        return worker.ask({"kind": "prepare", "round": 0, "begun": ""}, documents.write(terms), 300)

    try:
        header, _ = prepare(4096)
        assert (
            "ran out of memory (resources.memory in the site's YAML file allows 0.75 GiB; raise it" in header["failed"]
        )
        header, answer = prepare(32)
        assert header == {}
        assert documents.read(documents.Prepared, answer).site == "a"
    finally:
        worker.end()
