"""The relay in Flower's environment with a fake grid: a bad or slow answer of one site does not affect the others."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator import superlink
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
from fedsca_pipeline.flower.coordinator.superlink import RelayLink

GRID = '''
import json, sys, threading
from types import SimpleNamespace as Fake
from flwr.app import ConfigRecord, RecordDict
from fedsca_pipeline.flower.coordinator import relay

def reply(id_, payload=b"", error=None, node=1):
    content = RecordDict({"answer": ConfigRecord({"payload": payload})})
    metadata = Fake(reply_to_message_id=id_, src_node_id=node)
    error = error and Fake(reason=error, code=3)
    return Fake(metadata=metadata, content=content, error=error, has_error=lambda: error is not None)

class Grid:
    """Announced replies, and events that say when the content of one has arrived.

    As Flower's grid: a call takes the announced replies and waits for the content of each. Their messages are then
    unknown.
    """

    def __init__(self):
        self.known, self.announced, self.arrived = set(), {}, {}

    def pull_messages(self, ids):
        found = [reply(id_, error="Message Unavailable") for id_ in ids if id_ not in self.known]
        taken = [self.announced.pop(id_) for id_ in ids if id_ in self.announced]
        self.known -= {one.metadata.reply_to_message_id for one in taken}
        for one in taken:
            if one.metadata.reply_to_message_id in self.arrived:
                # The limit is for scripts that fail: Python waits for all threads at the end.
                self.arrived[one.metadata.reply_to_message_id].wait(60)
        return found + taken

    def announce(self, *replies, slow=()):
        self.arrived |= {id_: threading.Event() for id_ in slow}
        self.announced |= {one.metadata.reply_to_message_id: one for one in replies}
        self.known |= set(self.announced)

grid = Grid()
'''
PULL = """
relay._PATIENCE = 2.0
replies = relay.Replies(grid)

def pull(*ids):
    header, payload = relay._pull(replies, {"ids": ids, "most": 10}, b"")
    return [header["replies"], payload.decode()]
"""
BAD_ANSWERS = """
grid.announce(reply("1", b"ok"), reply("2", bytes(11)), reply("3", error="x" * 2**21), reply("4", b"fine"))
print(json.dumps(pull("1", "2", "3", "4")))
"""
SLOW_ANSWERS = """
grid.known.add("5")
grid.announce(reply("1", b"one"), reply("2", b"two"), reply("3", b"three"), slow=["1", "3"])
found = [pull("1", "2", "3", "5"), pull("1", "3", "5")]
grid.announce(reply("4", b"four"))
found.append(pull("1", "3", "4", "5"))
grid.arrived["3"].set()
relay.wait([replies._pulls["3"]])
found.append(pull("1", "3", "5"))
grid.announce(reply("5", b"five"))
found.append(pull("1", "5"))
grid.arrived["1"].set()
relay.wait([replies._pulls["1"]])
found.append(pull("1"))
print(json.dumps(found))
"""
INCOMPLETE = """
reason = "Reply message objects are unavailable. The sender may not have completed the upload before the object-push"
grid.announce(reply("1", error=reason))
print(json.dumps(pull("1")))
"""
BROKEN = """
def pull_messages(ids):
    raise ConnectionError("the SuperLink has ended")

grid.pull_messages = pull_messages
try:
    pull("1")
except ConnectionError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def engine(project: Path) -> Path:
    folder = Path(os.environ.get("FEDSCA_ENGINE", project / ".flower-venv" / "bin"))
    if not (folder / "python").is_file():
        pytest.skip("needs 'make engine' (or FEDSCA_ENGINE, the folder of flwr)")
    return folder


@pytest.fixture
def relayed(project: Path, engine: Path) -> Callable[[str], Any]:
    """Runs lines in Flower's environment with a fake grid, and returns what they print as JSON."""

    def run(lines: str) -> Any:
        environment = {**os.environ, "PYTHONPATH": str(project / "src")}
        command = [engine / "python", "-c", GRID + PULL + lines]
        return json.loads(
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        )

    return run


def test_an_answer_too_large_or_an_error_too_long_affects_only_its_site(relayed) -> None:
    (first, large, failed, last), payload = relayed(BAD_ANSWERS)

    assert payload == "okfine"
    assert (first["bytes"], last["bytes"]) == (2, 4)
    assert large["bytes"] == 0
    assert "11 bytes, more than the 10 of flower.max_message" in large["answer"]["failed"]
    assert failed["error"] == "x" * 2_000


def test_answers_that_arrive_slowly_hold_up_no_other_and_are_delivered_once(relayed) -> None:
    found = relayed(SLOW_ANSWERS)

    assert [payload for _, payload in found] == ["two", "", "four", "three", "five", "one"]
    assert [[entry["id"] for entry in replies] for replies, _ in found] == [["2"], [], ["4"], ["3"], ["5"], ["1"]]
    assert not [entry for replies, _ in found for entry in replies if "error" in entry]


def test_the_reason_of_an_answer_that_has_not_arrived_completely_has_the_cure(relayed) -> None:
    (incomplete,), _ = relayed(INCOMPLETE)

    assert "raise client_max_body_size in nginx.conf" in incomplete["error"]


def test_a_superlink_that_ends_while_it_is_asked_for_answers_ends_the_relay(relayed) -> None:
    assert relayed(BROKEN) == "the SuperLink has ended"


# Each site announces its answer at once. The content of c's arrives in round 4 only, that of round 1 during round 3.
RUN = """
class Sites(Grid):
    def get_nodes(self):
        return [Fake(name=name, node_id=ord(name), last_activated_at="") for name in "abc"]

    def push_messages(self, messages):
        (message,) = messages
        node, round_ = message.dst_node_id, message.content["task"]["round"]
        id_ = f"{chr(node)}{round_}"
        self.announce(reply(id_, id_.encode(), node=node), slow={"c1", "c2", "c3"} & {id_})
        if id_ == "c3":
            self.arrived["c1"].set()
        return [id_]

# Outside a Flower run no message can be made.
relay.Message = lambda content, **fields: Fake(content=content, **fields)
sites = Sites()
relay.relay(sites, Fake(run_id=7, run_config={"socket": sys.argv[1], "most": 2**20}))
for event in sites.arrived.values():
    event.set()
"""


@pytest.fixture
def fleet(project: Path, engine: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlowerFleet]:
    """Sites behind a relay with a fake grid. A lost link fails the test."""
    home = tmp_path_factory.mktemp("h")
    (home / "flwr").touch()
    monkeypatch.setattr(superlink, "_HELLO_SECONDS", 20.0)
    started: list[subprocess.Popen] = []

    def start_run(link: RelayLink) -> str:
        assert not started, "the link is lost"
        command = [engine / "python", "-c", GRID + RUN, str(link._home / "relay.sock")]
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(project / "src")}))
        return "7"

    monkeypatch.setattr(RelayLink, "_start_run", start_run)
    config = FlowerConfig(sites=list("abc"), authority=home / "ca.crt", engine=home, home=home, poll=0.1)
    link = RelayLink(config)
    link.reconnect()
    yield FlowerFleet(link, config)
    link.close()
    try:
        assert started[0].wait(30) == 0
    finally:
        started[0].kill()


def test_a_site_whose_answer_does_not_arrive_is_absent_and_the_link_survives(fleet, caplog) -> None:
    rounds = {
        round_: fleet.exchange(round_, dict.fromkeys("abc", b"payload"), deadline=60.0, quorum=2, grace=grace)
        for round_, grace in ((1, 1.0), (2, 1.0), (3, 2.0), (4, 30.0))
    }

    for round_, answers in rounds.items():
        assert [answers[site] for site in "ab"] == [b"a%d" % round_, b"b%d" % round_]
    assert [rounds[round_]["c"] for round_ in (1, 2, 3)] == [Failure("no answer in time")] * 3
    assert rounds[4]["c"] == b"c4"
    assert "round 1: the answer of c came after the end of the round and was dropped" in caplog.text
