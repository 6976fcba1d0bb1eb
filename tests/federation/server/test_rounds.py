from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.errors import NoValidSite, ResumeError
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.messages.codec import Message, decode, encode
from fedsca_pipeline.federation.server import checkpoint
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.records import RoundRecord
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.files import read_sealed, write_sealed
from fedsca_pipeline.model.layout import TensorLayout, hash_tensors

LAYOUT = TensorLayout(blocks=(("low",), ("high",)), decoder=("head",), shapes={"low": (3,), "high": (2,), "head": (1,)})
INITIAL = {"low": torch.zeros(3), "high": torch.zeros(2), "head": torch.zeros(1)}
SITES = ("a", "b", "c")
DIRECTIONS = {
    "a": torch.tensor([1.0, 0.1, 0.0]),
    "b": torch.tensor([1.0, 0.0, 0.1]),
    "c": torch.tensor([0.9, 0.1, 0.1]),
}


class FakeFleet:
    """Sites without a model whose updates have a fixed direction; faults can be scripted."""

    def __init__(self, faults: Mapping[tuple[str, int], Callable[[Message], bytes | Failure]] | None = None) -> None:
        self.faults = faults or {}
        self.held: dict[str, dict[str, torch.Tensor]] = {}
        self.received: list[tuple[int, str, Message]] = []

    def sites(self) -> Sequence[str]:
        return SITES

    def exchange(self, round_, payloads, **_):
        return {site: self.answer(round_, site, payload) for site, payload in payloads.items()}

    def answer(self, round_: int, site: str, payload: bytes) -> bytes | Failure:
        message = decode(payload)
        self.received.append((round_, site, message))
        reply = self.reply(round_, site, message)
        fault = self.faults.get((site, round_))
        return fault(reply) if fault else encode(reply.manifest, reply.tensors)

    def reply(self, round_: int, site: str, message: Message) -> Message:
        held = message.tensors
        if message.manifest.relative:
            held = {name: self.held[site][name] + t for name, t in held.items()}
        self.held[site] = held
        final = message.manifest.kind == "final"
        manifest = replace(
            message.manifest,
            kind="report" if final else "update",
            base_hash=hash_tensors(held),
            samples=10,
            relative=False,
            metrics={"dice_validation": 0.5},
        )
        update = {} if final else {"low": DIRECTIONS[site] * (1 + 0.1 * round_)}
        return Message(manifest, update)


def server(fleet, folder: Path, **config) -> Server:
    strategy = config.pop("strategy", "fedsca")
    options = {"share_decoder": False, "shared_blocks": "low"} if strategy == "fedavg" else {}
    return Server(
        fleet,
        build_strategy(strategy, options, LAYOUT),
        INITIAL,
        FederationConfig(**{"rounds": 3, "wire_dtype": "fp32", **config}),
        run="run",
        seed=0,
        folder=CheckpointFolder(folder, "run"),
    )


def test_only_the_low_blocks_adapters_cross_the_wire(tmp_path: Path) -> None:
    fleet = FakeFleet()

    records = list(server(fleet, tmp_path).rounds())

    assert [record.round for record in records] == [1, 2, 3, 4]
    assert all(set(message.tensors) == {"low"} for _, _, message in fleet.received)


def test_bytes_are_those_of_the_serialised_messages(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Counting(FakeFleet):
        def answer(self, round_, site, payload):
            sizes.append(len(payload))
            return super().answer(round_, site, payload)

    records = list(server(Counting(), tmp_path).rounds())

    assert sum(sizes) == sum(entry.bytes_down for record in records for entry in record.sites.values())
    assert all(entry.bytes_up > 0 for entry in records[0].sites.values())


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_a_run_stopped_after_any_round_and_resumed_ends_in_the_same_state(
    wire_dtype: str, participation: float, tmp_path: Path
) -> None:
    config = {"wire_dtype": wire_dtype, "participation": participation, "rounds": 5}
    whole = list(server(FakeFleet(), tmp_path / "whole", **config).rounds())
    expected = CheckpointFolder(tmp_path / "whole", "run").latest()

    for stop in range(1, 5):
        folder, fleet = tmp_path / f"stop{stop}", FakeFleet()
        for record in server(fleet, folder, **config).rounds():
            if record.round == stop:
                break
        resumed = list(server(fleet, folder, **config).rounds())
        found = CheckpointFolder(folder, "run").latest()

        assert torch.equal(found.aggregates, expected.aggregates)
        assert torch.equal(found.state.memory.nan_to_num(7), expected.state.memory.nan_to_num(7))
        assert [r.as_json() for r in resumed] == [r.as_json() for r in whole]


@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_arrays_on_disk_give_the_same_bits_as_arrays_in_memory(wire_dtype: str, tmp_path: Path) -> None:
    for name, gib in (("memory", 4.0), ("disk", 0.0)):
        config = {"wire_dtype": wire_dtype, "participation": 0.6, "server_memory": gib, "rounds": 4}
        list(server(FakeFleet(), tmp_path / name, **config).rounds())

    one, other = (next((tmp_path / name).glob("*_00005.*")).read_bytes() for name in ("memory", "disk"))

    assert one == other


def test_sites_hold_exactly_what_the_server_believes_they_hold(tmp_path: Path) -> None:
    fleet = FakeFleet()

    list(server(fleet, tmp_path, wire_dtype="int8", rounds=4).rounds())

    latest = CheckpointFolder(tmp_path, "run").latest()
    assert latest.round == 5
    assert all(message.manifest.relative == (round_ > 1) for round_, _, message in fleet.received)
    # The checkpoint holds the bases of the last training round; the final round sent one more difference.
    final = {site: message.tensors["low"] for round_, site, message in fleet.received if round_ == 5}
    for index, site in enumerate(SITES):
        assert torch.equal(latest.bases[index] + final[site], fleet.held[site]["low"])


def test_int8_differences_stay_close_to_full_precision(tmp_path: Path) -> None:
    for dtype in ("fp32", "int8"):
        list(server(FakeFleet(), tmp_path / dtype, wire_dtype=dtype, rounds=6).rounds())

    exact, rounded = (CheckpointFolder(tmp_path / dtype, "run").latest().aggregates for dtype in ("fp32", "int8"))

    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_a_failed_site_counts_as_absent(tmp_path: Path) -> None:
    faults = {("c", 2): lambda reply: Failure("power cut")}

    records = list(server(FakeFleet(faults), tmp_path).rounds())

    assert records[1].sites["c"].absent == "power cut"
    assert records[1].sites["c"].samples is None
    assert records[1].accepted == ("a", "b")
    assert records[2].sites["c"].absent is None


BROKEN = {
    "nan": lambda r: encode(r.manifest, {"low": torch.full((3,), torch.nan)}),
    "shape": lambda r: encode(r.manifest, {"low": torch.ones(4)}),
    "name": lambda r: encode(r.manifest, {"high": torch.ones(2)}),
    "base hash": lambda r: encode(replace(r.manifest, base_hash="f" * 16), r.tensors),
    "replayed round": lambda r: encode(replace(r.manifest, round=1), r.tensors),
    "another site": lambda r: encode(replace(r.manifest, site="a"), r.tensors),
    "another run": lambda r: encode(replace(r.manifest, run="other"), r.tensors),
    "more samples than before": lambda r: encode(replace(r.manifest, samples=11), r.tensors),
    "no samples": lambda r: encode(replace(r.manifest, samples=0), r.tensors),
    "huge norm": lambda r: encode(r.manifest, {"low": 1000 * r.tensors["low"]}),
    "not a message": lambda r: b"\x80\x04pickle",
    "a bomb": lambda r: zstandard.compress(bytes(2**26)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_reply_is_rejected_and_changes_nothing_for_the_others(fault: str, tmp_path: Path) -> None:
    broken = list(server(FakeFleet({("c", 2): BROKEN[fault]}), tmp_path / "broken", rounds=2).rounds())
    absent = list(server(FakeFleet({("c", 2): lambda r: Failure("absent")}), tmp_path / "absent", rounds=2).rounds())

    assert "rejected" in broken[1].sites["c"].absent
    assert broken[1].accepted == absent[1].accepted == ("a", "b")
    assert broken[1].weights == absent[1].weights
    aggregates = [CheckpointFolder(tmp_path / name, "run").latest().aggregates for name in ("broken", "absent")]
    assert torch.equal(*aggregates)


@pytest.mark.parametrize("samples", [9, 11, 2**31 - 1])
def test_a_count_that_jumps_is_refused_also_in_a_resumed_run(samples: int, tmp_path: Path) -> None:
    fleet = FakeFleet({("c", 3): lambda r: encode(replace(r.manifest, samples=samples), r.tensors)})
    for record in server(fleet, tmp_path).rounds():
        if record.round == 2:
            break

    records = list(server(fleet, tmp_path).rounds())

    assert f"c, round 3, update: it claims {samples} training images, and 10 before" in records[2].sites["c"].absent
    assert "--params=force=true" in records[2].sites["c"].absent
    assert records[2].accepted == ("a", "b")


class Claiming(FakeFleet):
    """Site c claims so many training images, the others ten each."""

    def __init__(self, samples: int, faults: Mapping[tuple[str, int], Callable[[Message], Failure]]) -> None:
        super().__init__(faults)
        self.samples = samples

    def reply(self, round_: int, site: str, message: Message) -> Message:
        honest = super().reply(round_, site, message)
        return replace(honest, manifest=replace(honest.manifest, samples=self.samples)) if site == "c" else honest


@pytest.mark.parametrize("absent", [(), ("b",)], ids=["all answer", "one is absent"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedsca"])
def test_a_site_gains_nothing_by_claiming_more_than_the_largest_share(
    strategy: str, absent: tuple[str, ...], tmp_path: Path
) -> None:
    """Beside the ten images of each of the two others, 20 are half; with one absent 20 are more."""
    faults = {(site, 2): lambda r: Failure("away") for site in absent}
    for samples in (20, 2**31 - 1):
        records = list(server(Claiming(samples, faults), tmp_path / str(samples), strategy=strategy).rounds())

    honest, lied = (CheckpointFolder(tmp_path / str(claimed), "run").latest() for claimed in (20, 2**31 - 1))
    torch.testing.assert_close(lied.aggregates, honest.aggregates)
    if strategy == "fedavg":
        assert max(record.weights.array[..., -1].max() for record in records[:-1]) == pytest.approx(0.5)


def test_the_limits_on_a_site_are_those_of_the_federation(tmp_path: Path) -> None:
    limits = {"max_norm_ratio": 4.0, "max_share": 0.8, "clip_to_median": True}
    faults = {("c", 1): lambda r: encode(r.manifest, {"low": 3 * r.tensors["low"]})}

    run = server(Claiming(2**31 - 1, faults), tmp_path, strategy="fedavg", rounds=1, **limits)
    first, _ = run.rounds()

    assert asdict(run.limits) == limits
    assert first.weights.array[0, :, -1] == pytest.approx([0.8] * 3)
    norms = torch.stack([DIRECTIONS[site] * 1.1 for site in SITES]).norm(dim=1)
    median = norms[:2].min()
    expected = 0.1 * 1.1 * (DIRECTIONS["a"] + DIRECTIONS["b"]) + 0.8 * median * DIRECTIONS["c"] / norms[2] * 1.1
    torch.testing.assert_close(CheckpointFolder(tmp_path, "run").latest().aggregates[0], expected)


# What a site and the server remember changes with every step; the number of steps in a round changes nothing about it.
ONE_STEP_A_ROUND = {"steps_per_round": 1}


@pytest.mark.parametrize(
    ("strategy", "wire_dtype"), [("fedsca", "int8"), ("fedsca", "fp16"), ("scaffold", "fp32"), ("ditto", "fp16")]
)
def test_a_lost_answer_leaves_no_trace_at_the_server_or_its_site(
    strategy: str, wire_dtype: str, federate, three_sites
) -> None:
    alike = {
        **ONE_STEP_A_ROUND,
        "rounds": 4,
        "wire_dtype": wire_dtype,
        "data": three_sites,
        "keep_optimizer": strategy != "ditto",
    }

    lost = federate(strategy, lost={"c": [2, 3]}, **alike)
    absent = federate(strategy, absent={"c": [2, 3]}, **alike)

    assert lost.records[1].sites["c"].absent == "no answer in time"
    assert same(lost.bits(), absent.bits())
    for site in SITES:
        states = (run.store(site).state_at(4).tensors() for run in (lost, absent))
        for one, other in zip(*(kept.values() for kept in states), strict=True):
            assert same(one, other)


def test_a_run_resumed_from_an_older_checkpoint_ignores_later_rounds(federate, three_sites) -> None:
    alike = {**ONE_STEP_A_ROUND, "data": three_sites}
    expected = federate("fedsca", rounds=5, **alike, absent={"c": [3, 4]})
    first = federate("fedsca", rounds=2, **alike)
    (older,) = (first.folder / "server").glob("round_00002*")
    kept = older.read_bytes()
    older.unlink()
    (first.folder / "server" / "round_00003.safetensors").unlink()
    federate("fedsca", rounds=4, **alike, folder=first.folder)
    for path in (first.folder / "server").glob("*.safetensors"):
        path.unlink()
    older.write_bytes(kept)

    again = federate("fedsca", rounds=5, **alike, absent={"c": [3, 4]}, folder=first.folder)

    assert same(again.checkpoint().state.as_tensors(), expected.checkpoint().state.as_tensors())
    assert all(same(again.last(site), expected.last(site)) for site in SITES)
    assert [record.round for record in again.records] == [1, 2, 3, 4, 5, 6]
    assert [record.accepted for record in again.records] == [record.accepted for record in expected.records]


@pytest.fixture(scope="module")
def two_rounds(three_sites) -> dict[str, Any]:
    """Options of a run of two rounds."""
    return {**ONE_STEP_A_ROUND, "rounds": 2, "data": three_sites}


@pytest.fixture(scope="module")
def unbroken(federate_once, two_rounds) -> Any:
    """A run of two rounds without a stop."""
    return federate_once("fedsca", **two_rounds)


@pytest.mark.parametrize("writer", ["write_bytes", "write_sealed"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_killed_before_or_after_a_record_and_resumed_ends_in_the_same_state(
    federate, two_rounds, unbroken, tmp_path: Path, monkeypatch, writer: str, count: int
) -> None:
    again = tmp_path / "killed"
    real, calls = getattr(checkpoint, writer), []

    def killed(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, writer, killed)
        with pytest.raises(KeyboardInterrupt):
            federate("fedsca", **two_rounds, folder=again)
    resumed = federate("fedsca", **two_rounds, folder=again)

    assert same(resumed.checkpoint().state.as_tensors(), unbroken.checkpoint().state.as_tensors())
    assert all(same(resumed.last(site), unbroken.last(site)) for site in SITES)
    assert [record.accepted for record in resumed.records] == [record.accepted for record in unbroken.records]


# By round: each model of site a is better than the one before, of site b the second is the best.
DICE = {"a": (0.1, 0.2, 0.3, 0.4, 0.5), "b": (0.2, 0.3, 0.5, 0.4, 0.4)}


def scripted_dice(worker: LocalWorker) -> None:
    worker._validate = lambda this: DICE[this.site][this.round - 1]


@pytest.fixture(scope="module")
def four_rounds(three_sites) -> dict[str, Any]:
    """Options of a run of four rounds of two sites, whose validation Dice is ``DICE``."""
    two = {site: three_sites[site] for site in "ab"}
    return {**ONE_STEP_A_ROUND, "rounds": 4, "change": scripted_dice, "data": two}


@pytest.fixture(scope="module")
def whole(federate_once, four_rounds) -> Any:
    """A finished run of four rounds."""
    return federate_once("fedsca", **four_rounds)


def tamper(folder: Path, draw: random.Random) -> None:
    """Flip a bit of a file, cut, delete or empty it, edit a number, or put another file or another run's there."""
    path = draw.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    content = bytearray(path.read_bytes())
    others = sorted(file for file in folder.rglob(f"*{path.suffix}") if file.is_file() and file != path)
    how = draw.choice(["flip", "flip", "cut", "delete", "empty", "another", "another run", "edit"])
    if how == "delete":
        path.unlink()
        return
    if how == "flip":
        # The first kilobyte holds the header of a safetensors file.
        content[draw.randrange(draw.choice([len(content), min(1000, len(content))]))] ^= 1 << draw.randrange(8)
    elif how == "edit" and path.suffix == ".json":
        content = bytearray(content.replace(b"0.", b"1.", 1))
    elif how in ("another run", "edit") and path.suffix == ".safetensors":
        label, tensors = read_sealed(path)
        write_sealed(path, {name: t.clone() for name, t in tensors.items()}, {**label, "run": "other"})
        return
    else:
        cut = content[: draw.randrange(len(content))] if how == "cut" else b""
        content = bytearray(draw.choice(others).read_bytes() if how.startswith("another") else cut)
    path.write_bytes(content)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("count", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_tampered_files_of_a_run_give_the_same_bits_or_a_refusal_with_a_cure(
    federate, four_rounds, whole, monkeypatch, caplog, tmp_path: Path, count: int, finished: bool
) -> None:
    draw = random.Random(15 + finished)
    stopped = whole.folder if finished else tmp_path / "stopped"
    if not finished:
        real = checkpoint.write_sealed

        def killed(path: Path, *rest) -> None:
            if path.name == "round_00004.safetensors":
                raise KeyboardInterrupt
            real(path, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "write_sealed", killed)
            federate("fedsca", **four_rounds, folder=stopped)

    refused: list[str] = []
    for number in range(count):
        folder = tmp_path / f"tampered_{number}"
        shutil.copytree(stopped, folder)
        tamper(folder, draw)
        try:
            again = federate("fedsca", **four_rounds, folder=folder)
        except ResumeError as error:
            refused.append(str(error))
        else:
            assert same(again.checkpoint().state.as_tensors(), whole.checkpoint().state.as_tensors())
            for site in "ab":
                for name in ("best", "last"):
                    found, expected = (run.store(site).snapshot(name) for run in (again, whole))
                    assert (found.round, found.dice) == (expected.round, expected.dice)
                    assert same(found.tensors, expected.tensors)
            assert [timeless(record) for record in again.records] == [timeless(record) for record in whole.records]
        shutil.rmtree(folder)
    assert all("Restore these files from a copy" in said for said in refused)
    assert len(refused) < count / 2


@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_a_prolonged_run_ends_as_one_of_all_rounds_from_the_start(
    federate, four_rounds, tmp_path: Path, wire_dtype: str
) -> None:
    alike = {**four_rounds, "wire_dtype": wire_dtype}
    whole = federate("fedsca", **alike)
    finished = federate("fedsca", **{**alike, "rounds": 2}, run="shorter")
    folder = tmp_path / "prolonged"
    shorter = CheckpointFolder(finished.folder / "server", "shorter", finished.folder / "sites")
    CheckpointFolder(folder / "server", "run", folder / "sites").prolong(shorter, 2)

    trained = federate("fedsca", **alike, folder=folder)

    assert {round_ for round_, _ in trained.sent} == {3, 4, 5}
    assert same(trained.checkpoint().state.as_tensors(), whole.checkpoint().state.as_tensors())
    for site in "ab":
        for name in ("best", "last"):
            found, expected = (run.store(site).snapshot(name) for run in (trained, whole))
            assert (found.round, found.dice) == (expected.round, expected.dice)
            assert same(found.tensors, expected.tensors)
    assert [record.weights for record in trained.records[:4]] == [record.weights for record in whole.records[:4]]


def test_a_run_whose_files_are_damaged_is_not_prolonged(federate, make_site, tmp_path: Path, caplog) -> None:
    finished = federate("fedsca", rounds=2, run="shorter", data={"a": make_site("a")})
    shorter = CheckpointFolder(finished.folder / "server", "shorter", finished.folder / "sites")
    (finished.folder / "sites" / "a" / "state_00002.safetensors").unlink()
    longer = CheckpointFolder(tmp_path / "server", "run", tmp_path / "sites")

    longer.prolong(shorter, 2)

    assert longer.latest() is None
    assert "the run of 2 rounds cannot be prolonged" in caplog.text.lower()


def timeless(record: RoundRecord) -> str:
    sites = {site: replace(entry, seconds=None, bytes_up=0) for site, entry in record.sites.items()}
    return json.dumps(replace(record, sites=sites).as_json())


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_below_the_quorum_the_round_fails_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    faults = {(site, 2): lambda reply: Failure("network down") for site in ("a", "b")}

    with pytest.raises(NoValidSite, match=r"round 2: 1 valid replies.*quorum asks for 2.*a: network down"):
        list(server(FakeFleet(faults), tmp_path, quorum=2).rounds())
    assert CheckpointFolder(tmp_path, "run").latest().round == 1

    records = list(server(FakeFleet(), tmp_path, quorum=2).rounds())
    assert [record.round for record in records] == [1, 2, 3, 4]


def test_a_round_without_any_reply_fails(tmp_path: Path) -> None:
    faults = {(site, 1): lambda reply: Failure("network down") for site in SITES}

    with pytest.raises(NoValidSite, match="0 valid replies"):
        list(server(FakeFleet(faults), tmp_path).rounds())

    assert CheckpointFolder(tmp_path, "run").latest() is None


def test_participation_draws_the_nearest_number_of_sites_and_different_ones_over_time(tmp_path: Path) -> None:
    drawn = server(FakeFleet(), tmp_path, participation=0.6)

    rounds = [drawn.participants(round_) for round_ in range(1, 30)]

    assert all(len(sites) == 2 for sites in rounds)
    assert set().union(*rounds) == set(SITES)
    assert rounds == [drawn.participants(round_) for round_ in range(1, 30)]


def test_an_absent_site_receives_the_latest_aggregate_before_it_trains_again(tmp_path: Path) -> None:
    fleet = FakeFleet({("c", 2): lambda reply: Failure("holiday")})

    list(server(fleet, tmp_path, strategy="fedavg").rounds())

    third = {site: message.tensors["low"] for round_, site, message in fleet.received if round_ == 3}
    assert torch.equal(third["c"], third["a"])


def test_local_sends_no_tensor_at_all(tmp_path: Path) -> None:
    class Silent(FakeFleet):
        def reply(self, round_, site, message):
            return replace(super().reply(round_, site, message), tensors={})

    fleet = Silent()

    records = list(server(fleet, tmp_path, strategy="local").rounds())

    assert len(records) == 4
    assert all(message.tensors == {} for _, _, message in fleet.received)


def test_sites_on_one_model_give_the_same_bits_as_sites_on_models_of_their_own(
    make_worker, three_sites, tmp_path: Path
) -> None:
    together = make_worker(**ONE_STEP_A_ROUND)

    class OneModelEach:
        def __init__(self, folder: Path) -> None:
            self.fleets = {
                site: InProcessFleet(make_worker(**ONE_STEP_A_ROUND), {site: arrays}, folder)
                for site, arrays in three_sites.items()
            }

        def sites(self):
            return SITES

        def exchange(self, round_, payloads, **rest):
            return {s: self.fleets[s].exchange(round_, {s: p}, **rest)[s] for s, p in payloads.items()}

    results = []
    for name, fleet in (
        ("one", InProcessFleet(together, three_sites, tmp_path / "one")),
        ("each", OneModelEach(tmp_path / "each")),
    ):
        run = Server(
            fleet,
            together.strategy,
            together.initial,
            FederationConfig(rounds=2, wire_dtype="fp32"),
            run="run",
            seed=0,
            folder=CheckpointFolder(tmp_path / f"server_{name}", "run"),
        )
        list(run.rounds())
        results.append(CheckpointFolder(tmp_path / f"server_{name}", "run").latest().aggregates)

    assert torch.equal(*results)


def test_an_injected_failure_is_a_failure(make_worker, make_site, tmp_path: Path) -> None:
    fleet = InProcessFleet(make_worker(), {"a": make_site("a")}, tmp_path, inject_failures={"a": [2]})

    answer = fleet.exchange(2, {"a": b""}, deadline=None, quorum=1, grace=0.0)["a"]

    assert isinstance(answer, Failure)
