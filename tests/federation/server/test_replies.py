"""Each reply is decoded and checked once, whenever and in whatever order replies arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.server import replies as replies_module
from fedsca_pipeline.federation.server.replies import RoundReplies, Sent

SITES = ("a", "b", "c", "d")
SHAPES = {"low": (2,), "high": (1,)}
MANIFEST = Manifest("update", "run", 1, "a", "0" * 16, samples=10, dtype="fp32", relative=False, metrics={"steps": 4})


def reply(site: str, **manifest) -> bytes:
    value = float(SITES.index(site))
    return encode(replace(MANIFEST, site=site, **manifest), {"low": torch.full((2,), value), "high": torch.ones(1)})


@pytest.fixture
def asked() -> RoundReplies:
    """A round in which all sites are asked for an update."""
    return RoundReplies(
        round=1,
        kind="update",
        run="run",
        wire_dtype="fp32",
        shapes=SHAPES,
        samples={},
        sent={site: Sent(b"to " + site.encode(), "0" * 16, 0) for site in SITES},
        updates=torch.full((len(SITES), 3), torch.nan),
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every reply that was decoded."""
    found: list[bytes] = []
    monkeypatch.setattr(replies_module, "decode", lambda data, **limits: found.append(data) or decode(data, **limits))
    return found


def rows(asked: RoundReplies) -> list[list[float]]:
    return asked.stack(torch.zeros(len(SITES), 3)).updates.tolist()


@pytest.mark.parametrize("checks_on_arrival", [False, True])
def test_a_reply_is_decoded_once(asked: RoundReplies, decoded: list[bytes], checks_on_arrival: bool) -> None:
    answers = {site: reply(site) for site in SITES}
    if checks_on_arrival:
        assert [asked.fault(site, answer) for site, answer in answers.items()] == [None] * len(SITES)

    asked.collect(dict(answers))

    assert sorted(decoded) == sorted(answers.values())


@pytest.mark.parametrize("arrival", ["abcd", "dcba", "cadb", "", "d"])
@pytest.mark.parametrize("absent", ["", "a", "c", "ad", "abc", "abcd"])
def test_updates_are_in_the_order_of_sites_whatever_the_order_of_arrival(
    asked: RoundReplies, arrival: str, absent: str
) -> None:
    present = [site for site in SITES if site not in absent]
    for site in arrival:
        if site in present:
            asked.fault(site, reply(site))

    records = asked.collect({site: reply(site) for site in reversed(present)})

    assert tuple(asked.accepted) == tuple(present)
    assert rows(asked) == [[SITES.index(site)] * 2 + [1.0] for site in present]
    assert {site for site, record in records.items() if record.absent == "no answer"} == set(absent)


def test_a_reply_that_the_fleet_does_not_return_counts_as_absent(asked: RoundReplies) -> None:
    for site in SITES:
        asked.fault(site, reply(site))

    records = asked.collect({"a": Failure("too late", bytes_up=7), "d": reply("d")})

    assert (records["a"].absent, records["a"].bytes_up) == ("too late", 7)
    assert records["b"].absent == records["c"].absent == "no answer"
    assert rows(asked) == [[3.0, 3.0, 1.0]]


def test_a_site_can_replace_a_reply_that_was_rejected(asked: RoundReplies) -> None:
    assert "round is 2" in (asked.fault("a", reply("a", round=2)) or "")
    assert asked.fault("a", reply("a")) is None

    records = asked.collect({"a": reply("a"), "b": reply("b", run="other")})

    assert records["a"].absent is None
    assert records["a"].samples == 10
    assert "rejected: " in (records["b"].absent or "")
    assert records["b"].bytes_up == len(reply("b", run="other"))
    assert tuple(asked.accepted) == ("a",)


def test_a_report_leaves_the_updates_as_they_are(asked: RoundReplies) -> None:
    final = replace(asked, kind="report", shapes={})

    final.collect({site: encode(replace(MANIFEST, kind="report", site=site), {}) for site in SITES})

    assert tuple(final.accepted) == SITES
    assert final.updates.isnan().all()


def test_the_number_of_steps_of_a_site_that_does_not_state_it_is_unknown(asked: RoundReplies) -> None:
    asked.collect({"a": reply("a"), "b": reply("b", metrics={})})

    stacked = asked.stack(torch.zeros(len(SITES), 3))

    assert stacked.samples.tolist() == [10.0, 10.0]
    assert stacked.steps[0] == 4.0
    assert stacked.steps[1].isnan()
