"""The link through the SuperLink, with a relay that the test plays."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator import superlink
from fedsca_pipeline.flower.coordinator.link import LinkLost
from fedsca_pipeline.flower.coordinator.superlink import RelayLink
from fedsca_pipeline.flower.messages import frames


@pytest.fixture
def link(tmp_path_factory, monkeypatch) -> Iterator[RelayLink]:
    home = tmp_path_factory.mktemp("h")
    (home / "flwr").touch()
    config = FlowerConfig(sites=["a"], authority=home / "ca.crt", engine=home, home=home, connect=20.0)
    monkeypatch.setattr(RelayLink, "_start_run", lambda self: "7")
    link = RelayLink(config)
    yield link
    link.close()


def play_relay(home: Path, run: str) -> None:
    with frames.connect(home / "relay.sock", 20.0) as line:
        frames.send(line, {"run": run})
        header, _ = frames.receive(line, 10)
        frames.send(line, {"nodes": [["a", "1", "then"], ["", "2", "then"]]} if header["ask"] == "nodes" else {})


def test_relays_of_earlier_runs_and_broken_connections_do_not_block_the_relay_of_this_run(link) -> None:
    def connect() -> None:
        frames.connect(link._home / "relay.sock").close()
        with frames.connect(link._home / "relay.sock") as line:
            frames.send(line, {"run": "6"})
            with pytest.raises(EOFError):
                frames.receive(line, 10)
        play_relay(link._home, "7")

    thread = threading.Thread(target=connect)
    thread.start()
    link.reconnect()

    assert list(link.nodes()) == ["a"]
    thread.join()


def test_answers_of_many_sites_are_fetched_in_batches_even_with_the_longest_reasons(link) -> None:
    sites = [f"site_{number:02d}" for number in range(70)]
    link._config = link._config.model_copy(update={"sites": sites})
    # In JSON this character takes twelve bytes.
    reason, asked = "\N{GRINNING FACE}" * frames.MAX_REASON, []

    def relay() -> None:
        with frames.connect(link._home / "relay.sock", 20.0) as line:
            frames.send(line, {"run": "7"})
            while sum(map(len, asked)) < len(sites):
                header, _ = frames.receive(line, 10)
                asked.append(header["ids"])
                replies = [{"id": id_, "node": "1", "bytes": 2, "answer": {"failed": reason}} for id_ in asked[-1]]
                frames.send(line, {"replies": replies}, "".join(id_[-2:] for id_ in asked[-1]).encode())

    thread = threading.Thread(target=relay)
    thread.start()
    link.reconnect()

    replies = link.pull(sites)

    thread.join()
    assert [(reply.id, reply.payload.decode()) for reply in replies] == [(site, site[-2:]) for site in sites]
    assert len(asked) == 3


def test_a_run_without_a_relay_is_a_lost_link(link) -> None:
    link._config = link._config.model_copy(update={"connect": 0.1})

    with pytest.raises(LinkLost, match="run 7 did not start its relay"):
        link.reconnect()


def test_a_run_that_ends_without_its_relay_is_reported_at_once_with_the_reason(link, monkeypatch) -> None:
    monkeypatch.setattr(superlink, "_CHECK_SECONDS", 0.1)
    flwr = link._home / "flwr"
    answer = {"success": True, "runs": [{"status": "finished:failed", "status-details": "no temporary folder"}]}
    flwr.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    flwr.chmod(0o700)

    with pytest.raises(LinkLost, match=r"run 7 ended without its relay .no temporary folder"):
        link.reconnect()


def test_a_relay_that_disconnects_is_a_lost_link(link) -> None:
    thread = threading.Thread(target=play_relay, args=(link._home, "7"))
    thread.start()
    link.reconnect()
    link.nodes()
    thread.join()

    with pytest.raises(LinkLost, match="the relay has disconnected"):
        link.nodes()
    with pytest.raises(LinkLost, match="no relay is connected"):
        link.nodes()
