"""A site that sends an invalid message is rejected with the reason, and the other sites end as if it were absent."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.errors import NoValidSite
from fedsca_pipeline.federation.messages.codec import Message, decode, encode
from fedsca_pipeline.federation.server import replies
from fedsca_pipeline.federation.server.checkpoint import Checkpoint, CheckpointFolder
from fedsca_pipeline.federation.server.records import RoundRecord
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
from fedsca_pipeline.model.layout import TensorLayout, hash_tensors

LAYOUT = TensorLayout(
    blocks=(("low",), ("high",)), decoder=("decoder",), shapes=dict.fromkeys(("low", "high", "decoder"), (2,))
)
DIRECTIONS = {"a": torch.tensor([1.0, 0.1]), "b": torch.tensor([0.9, 0.2]), "c": torch.tensor([0.8, 0.3])}


def honest(message: Message, site: str, round_: int) -> Message:
    final = message.manifest.kind == "final"
    manifest = replace(
        message.manifest, kind="report" if final else "update", base_hash=hash_tensors(message.tensors), samples=10,
        metrics={"dice_validation": 0.5},
    )  # fmt: skip
    return Message(manifest, {} if final else {"low": DIRECTIONS[site] * (1 + 0.1 * round_)})


def encoded(message: Message, **manifest: object) -> bytes:
    return encode(replace(message.manifest, **manifest), message.tensors)


FAULTS: Mapping[str, tuple[Callable[[Message], bytes], str]] = {
    "NaN": (lambda m: encoded(Message(m.manifest, {"low": torch.tensor([math.nan, 0.0])})), "finite"),
    "a wrong shape": (lambda m: encoded(Message(m.manifest, {"low": torch.zeros(3)})), "shape of low"),
    "a private tensor": (lambda m: encoded(Message(m.manifest, {**m.tensors, "high": torch.ones(2)})), "tensors: high"),
    "no tensor": (lambda m: encoded(Message(m.manifest, {})), "missing tensors: low"),
    "another dtype": (lambda m: encoded(m, dtype="int8"), "wire dtype is int8"),
    "a wrong base hash": (lambda m: encoded(m, base_hash="0" * 16), "base hash"),
    "a replayed round": (lambda m: encoded(m, round=1), "round is 1, expected 2"),
    "another run": (lambda m: encoded(m, run="other"), "run is 'other'"),
    "another site's id": (lambda m: encoded(m, site="a"), "site is 'a', expected 'c'"),
    "100 times the norm": (lambda m: encoded(Message(m.manifest, {"low": 100 * m.tensors["low"]})), "norm"),
    "an unknown metric": (lambda m: encoded(m, metrics={"patient_7": 1.0}), "unexpected metrics: patient_7"),
    "a metric that is no number": (lambda m: encoded(m, metrics={"loss": math.nan}), "not finite: loss"),
    "more images than a float holds": (lambda m: encoded(m, samples=10**400), "sample count is above"),
    "images for a weight of one": (lambda m: encoded(m, samples=10**18), "sample count is above"),
    "more samples than it has": (lambda m: encoded(m, samples=11), "it claims 11 training images, and 10 before"),
    "a pickle": (lambda m: pickle.dumps(m.tensors), "not safetensors"),
    "too many bytes": (lambda _: bytes(2**20 + 1), "flower.max_message"),
    "more bytes than its tensors can have": (lambda _: bytes(2**19), "larger than"),
    "nothing": (lambda _: b"", "safetensors"),
}  # fmt: skip


def run(
    link, config, clock, scripted, reply, folder: Path, fault=None, absent=None, seconds=None, claimed=10, **federation
) -> tuple[Checkpoint, list[RoundRecord]]:
    """Run three rounds of three sites. ``fault`` makes the answer of site c in round 2; ``seconds`` is per site.

    ``claimed``: images that site c claims when it joins and in every round; the others have ten.
    """
    samples = {**dict.fromkeys(DIRECTIONS, 10), "c": claimed}

    def answer(message):
        site, round_ = message.task["site"], message.task["round"]
        found = honest(decode(message.payload), site, round_)
        found = Message(replace(found.manifest, samples=samples[site]), found.tensors)
        faulty = fault is not None and (site, round_) == ("c", 2)
        return reply("", message.node, fault(found) if faulty else encoded(found))

    for site in link.sites:
        link.sites[site] = scripted(answer=answer, seconds=(seconds or {}).get(site, 1.0))
    server = Server(
        FlowerFleet(link, config, absent=absent, clock=clock, sleep=clock.sleep),
        build_strategy("fedsca", {}, LAYOUT),
        {name: torch.zeros(2) for name in LAYOUT.shapes},
        FederationConfig(rounds=3, wire_dtype="fp32", compression="none", **federation),
        run="run",
        seed=0,
        folder=CheckpointFolder(folder, "run"),
        samples=samples,
    )
    records = list(server.rounds())
    return CheckpointFolder(folder, "run").latest(), records


def test_a_reply_is_decoded_once(link, config, clock, scripted, reply, tmp_path: Path, monkeypatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(replies, "decode", lambda data, **limits: decoded.append(data) or decode(data, **limits))

    _, records = run(link, config, clock, scripted, reply, tmp_path)

    assert len(records) == 4
    assert len(decoded) == len(records) * len(DIRECTIONS)


@pytest.mark.parametrize("name", FAULTS)
def test_an_invalid_message_is_rejected_with_the_reason_and_the_other_sites_end_as_if_it_were_absent(
    name, link, config, clock, scripted, reply, tmp_path: Path
) -> None:
    fault, reason = FAULTS[name]

    hostile, hostile_records = run(link, config, clock, scripted, reply, tmp_path / "hostile", fault=fault)
    absent, absent_records = run(link, config, clock, scripted, reply, tmp_path / "absent", absent={"c": [2]})

    assert reason in hostile_records[1].sites["c"].absent
    assert hostile_records[1].accepted == ("a", "b")
    assert torch.equal(hostile.aggregates, absent.aggregates)
    states = (found.state.as_tensors() for found in (hostile, absent))
    assert all(torch.equal(one, other) for one, other in zip(*(s.values() for s in states), strict=True))
    assert [record.accepted for record in hostile_records] == [record.accepted for record in absent_records]


@pytest.mark.parametrize("absent", [{}, {"b": [2, 3]}], ids=["all answer", "one is absent"])
def test_a_site_that_claims_all_images_has_no_more_of_a_mix_than_one_with_half_of_them(
    absent, link, config, clock, scripted, reply, tmp_path: Path
) -> None:
    half, all_ = (
        run(link, config, clock, scripted, reply, tmp_path / str(claimed), absent=absent, claimed=claimed)[0]
        for claimed in (20, 2**31 - 1)
    )

    torch.testing.assert_close(all_.aggregates, half.aggregates)
    assert all_.state.samples.tolist() == [10, 10, 2**31 - 1]


def test_below_the_quorum_the_command_ends_and_the_next_command_repeats_the_round(
    link, config, clock, scripted, reply, tmp_path: Path
) -> None:
    """A fixed site takes part in the repeated round. With a lower quorum an unfixed site counts as absent."""
    fault, _ = FAULTS["100 times the norm"]
    ended, fixed, lowered, honest_, absent = (tmp_path / name for name in ("e", "f", "l", "h", "a"))

    def go(folder: Path, **given) -> Checkpoint:
        return run(link, config, clock, scripted, reply, folder, **given)[0]

    with pytest.raises(
        NoValidSite, match=r"round 2: 2 valid replies, federation\.quorum asks for 3 \(c: rejected: .*norm"
    ):
        go(ended, fault=fault, quorum=3)
    assert CheckpointFolder(ended, "run").latest().round == 1
    for folder in (fixed, lowered):
        shutil.copytree(ended, folder)

    assert same(go(fixed, quorum=3), go(honest_, quorum=3))
    assert same(go(lowered, fault=fault, quorum=2), go(absent, absent={"c": [2]}, quorum=2))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two runs ended in the same server state and the same next messages."""
    state, others = one.state.as_tensors(), other.state.as_tensors()
    alike = state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)
    return alike and all(torch.equal(getattr(one, of), getattr(other, of)) for of in ("aggregates", "answered"))


def test_a_rejected_answer_does_not_shorten_the_time_of_other_sites(
    link, config, clock, scripted, reply, tmp_path: Path
) -> None:
    """If the answer of site c counted, quorum and grace would be over before site b answers."""
    fault, reason = FAULTS["a wrong base hash"]
    given = {"seconds": {"a": 10.0, "b": 40.0}, "quorum": 2, "grace": 20.0, "deadline": 100.0}

    hostile, hostile_records = run(link, config, clock, scripted, reply, tmp_path / "hostile", fault=fault, **given)
    absent, absent_records = run(link, config, clock, scripted, reply, tmp_path / "absent", absent={"c": [2]}, **given)

    assert reason in hostile_records[1].sites["c"].absent
    assert hostile_records[1].sites["c"].bytes_up > 0
    assert [record.accepted for record in hostile_records] == [record.accepted for record in absent_records]
    assert torch.equal(hostile.aggregates, absent.aggregates)
