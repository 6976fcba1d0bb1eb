"""Which sites the Flower fleet waits for, for how long, and which answers it accepts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.flower.audit.log import AuditLog, read_log
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet


def test_each_site_gets_its_payload_and_its_answer_is_returned(exchange, link) -> None:
    assert exchange() == {"a": b"a1", "b": b"b1", "c": b"c1"}
    assert [(m.node, m.task["kind"], m.task["round"], m.payload) for m in link.pushed] == [
        (f"node-{site}", "round", 1, b"payload") for site in "abc"
    ]


def test_all_configured_sites_are_listed_whether_or_not_they_are_connected(fleet, link, scripted) -> None:
    link.sites["b"] = scripted(away=lambda now: True)

    assert fleet.sites() == ("a", "b", "c")


class TestAbsence:
    def test_a_round_ends_without_a_missing_site_when_the_grace_after_the_quorum_is_over(
        self, exchange, link, clock, scripted
    ) -> None:
        link.sites["c"] = scripted(away=lambda now: now >= 1)

        answers = exchange(grace=20.0)

        assert clock.now < 25
        assert answers == {"a": b"a1", "b": b"b1", "c": Failure("not connected")}

    def test_a_late_site_does_not_delay_a_round_beyond_the_deadline_and_its_answer_is_dropped_with_a_log_line(
        self, exchange, link, clock, scripted, caplog
    ) -> None:
        link.sites["c"] = scripted(seconds=150)

        first = exchange(1)
        assert 100 <= clock.now <= 102
        assert first["c"] == Failure("no answer in time")
        link.sites["a"] = link.sites["b"] = scripted(seconds=60)
        second = exchange(2)

        assert second["a"] == b"a2"
        assert second["c"] == Failure("no answer in time")
        assert "round 1: the answer of c came after the end of the round and was dropped" in caplog.text

    def test_a_late_quorum_does_not_extend_the_deadline(self, exchange, link, clock, scripted) -> None:
        link.sites["b"], link.sites["c"] = scripted(seconds=105), scripted(seconds=1000)

        answers = exchange()

        assert 105 <= clock.now <= 107
        assert answers == {"a": b"a1", "b": b"b1", "c": Failure("no answer in time")}

    def test_the_log_names_the_sites_that_are_waited_for_and_how_long(self, exchange, link, scripted, caplog) -> None:
        link.sites["c"] = scripted(away=lambda now: now >= 1)

        exchange(grace=20.0)

        waits = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
        assert waits == ["round 1: 2 answers so far, 2 needed; waiting 20 s at most for c: not connected"]

    def test_a_rejected_answer_counts_as_absent_and_not_for_the_quorum(self, exchange, link, clock, scripted) -> None:
        link.sites["a"], link.sites["b"] = scripted(seconds=10), scripted(seconds=40)

        answers = exchange(grace=20.0, fault=lambda site, answer: "rejected: no good" if site == "c" else None)

        assert 40 <= clock.now < 42
        assert answers == {"a": b"a1", "b": b"b1", "c": Failure("rejected: no good", bytes_up=2)}

    def test_a_message_holds_the_seconds_that_its_answer_may_take(self, exchange, link) -> None:
        exchange(deadline=77.0)

        assert {m.task["seconds"] for m in link.pushed} == {77.0}

    def test_a_site_that_reports_a_failure_is_absent_and_delays_no_other_site(
        self, exchange, link, clock, scripted, reply
    ) -> None:
        link.sites["b"] = scripted(answer=lambda m: reply("", m.node, header={"failed": "its worker died"}))

        answers = exchange()

        assert answers["b"] == Failure("its worker died")
        assert len(link.sent("b")) == 1
        assert clock.now < 5

    def test_below_the_quorum_the_run_waits_logs_for_which_sites_and_continues_when_they_return(
        self, exchange, link, clock, scripted, caplog
    ) -> None:
        link.sites["b"] = scripted(away=lambda now: now < 500)
        link.sites["c"] = scripted(away=lambda now: True)

        answers = exchange(grace=0.0)

        assert clock.now >= 500
        assert answers["b"] == b"b1"
        assert answers["c"] == Failure("not connected")
        waits = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
        assert waits[0] == "round 1: 0 answers so far, 2 needed; waiting for b: not connected; c: not connected"
        assert waits[1:] == ["round 1: 1 answer so far, 2 needed; waiting for c: not connected"]

    def test_below_the_quorum_a_failed_site_is_asked_again_after_a_pause(
        self, exchange, link, clock, scripted, reply
    ) -> None:
        def second_time(message):
            failed = len(link.sent("b")) < 2
            return reply("", message.node, b"recovered", {"failed": "out of memory"} if failed else {})

        link.sites["b"] = scripted(answer=second_time)
        link.sites["c"] = scripted(away=lambda now: True)

        answers = exchange(grace=0.0)

        assert answers["b"] == b"recovered"
        first, again = link.sent("b")
        assert again.at - first.at >= 10

    def test_below_the_quorum_a_site_that_still_works_is_not_asked_again(self, exchange, link, clock, scripted) -> None:
        link.sites = {site: scripted(seconds=150) for site in "abc"}

        answers = exchange(quorum=3)

        assert answers == {"a": b"a1", "b": b"b1", "c": b"c1"}
        assert len(link.pushed) == 3

    def test_below_the_quorum_a_connected_but_silent_site_is_named_after_the_deadline(
        self, exchange, link, scripted, caplog
    ) -> None:
        link.sites["c"] = scripted(seconds=500)

        answers = exchange(quorum=3)

        assert answers["c"] == b"c1"
        waits = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
        assert waits == ["round 1: 2 answers so far, 3 needed; waiting for c: no answer in time"]

    def test_below_the_quorum_a_site_that_returns_has_the_full_time_of_a_round(self, exchange, link, scripted) -> None:
        link.sites["c"] = scripted(away=lambda now: now < 199)

        exchange(quorum=3)

        assert [message.task["seconds"] for message in link.sent("c")] == [100.0]

    def test_a_site_named_in_inject_failures_is_not_asked(self, link, config, clock) -> None:
        fleet = FlowerFleet(link, config, absent={"b": [1]}, clock=clock, sleep=clock.sleep)

        answers = fleet.exchange(1, {"a": b"", "b": b""}, deadline=None, quorum=1, grace=0.0)

        assert answers == {"a": b"a1", "b": Failure("injected by federation.inject_failures")}
        assert link.sent("b") == []


class TestReturn:
    def test_a_node_that_restarts_gets_its_message_again_in_the_same_round(self, exchange, link, scripted) -> None:
        link.sites["c"] = scripted(seconds=30, restarts=lambda now: "second" if now > 20 else "first")

        answers = exchange()

        assert answers["c"] == b"c1"
        assert len(link.sent("c")) == 2

    def test_of_two_answers_of_a_restarted_node_only_the_first_counts(self, exchange, link, scripted, reply) -> None:
        link.sites["c"] = scripted(
            seconds=30,
            restarts=lambda now: "second" if now > 20 else "first",
            answer=lambda m: reply("", m.node, m.id.encode()),
        )

        answers = exchange()

        assert answers["c"] == link.sent("c")[0].id.encode()

    def test_a_lost_link_is_reconnected_and_messages_in_flight_are_sent_again(self, exchange, link, clock) -> None:
        for site in link.sites.values():
            site.seconds = 8
        link.broken = lambda now: 5 <= now < 40

        answers = exchange()

        assert answers == {"a": b"a1", "b": b"b1", "c": b"c1"}
        assert link.reconnected >= 2
        assert len(link.sent("a")) == 2

    def test_a_late_answer_to_one_round_does_not_count_for_the_next(self, exchange, link, scripted) -> None:
        link.sites["c"] = scripted(seconds=120)

        exchange(1)
        link.sites["a"] = link.sites["b"] = scripted(seconds=90)
        answers = exchange(2, deadline=500.0)

        assert answers["c"] == b"c2"


class TestFaultyAnswers:
    def test_an_answer_that_is_too_large_is_a_failure_that_names_the_parameter(
        self, exchange, link, scripted, reply
    ) -> None:
        link.sites["b"] = scripted(answer=lambda m: reply("", m.node, bytes(2**20 + 1)))

        answers = exchange()

        assert "flower.max_message" in answers["b"].reason
        assert answers["a"] == b"a1"

    def test_an_answer_from_another_node_is_a_failure(self, exchange, link, scripted, reply) -> None:
        link.sites["b"] = scripted(answer=lambda m: reply("", "node-a", b"b1"))

        assert exchange()["b"] == Failure("answered by another node (node-a)", bytes_up=2)

    def test_a_site_without_an_answer_in_flower_is_asked_again(self, exchange, link, scripted, reply) -> None:
        def lost_once(message):
            return (
                reply("", "1", error="node unavailable") if len(link.sent("b")) < 2 else reply("", message.node, b"b")
            )

        link.sites["b"] = scripted(answer=lost_once)

        assert exchange()["b"] == b"b"

    def test_a_site_that_never_has_an_answer_in_flower_is_absent_with_the_reason(
        self, exchange, link, scripted, reply, caplog
    ) -> None:
        link.sites["b"] = scripted(answer=lambda m: reply("", "1", error="install the same version at both ends"))

        answers = exchange(grace=50.0)

        assert answers["b"] == Failure("install the same version at both ends")
        assert caplog.text.count("round 1: no answer from b: install the same version at both ends") == 1

    def test_the_reason_of_an_answer_that_never_arrives_is_logged_in_a_later_round(
        self, exchange, link, scripted, reply, caplog
    ) -> None:
        link.sites["c"] = scripted(seconds=110, answer=lambda m: reply("", "1", error="arrived in part"))

        assert exchange(1)["c"] == Failure("no answer in time")
        link.sites["a"] = link.sites["b"] = scripted(seconds=60)
        second = exchange(2, grace=20.0)

        assert second == {"a": b"a2", "b": b"b2", "c": Failure("no answer in time")}
        assert caplog.text.count("round 1: no answer from c: arrived in part") == 1


class TestOpening:
    @pytest.fixture
    def opening(self, link, config, clock) -> FlowerFleet:
        return FlowerFleet(link, config, begun="b" * 16, opening=b"terms", clock=clock, sleep=clock.sleep)

    def test_a_site_is_sent_rounds_only_after_it_has_accepted_the_run(self, opening, link) -> None:
        for round_ in (1, 2):
            opening.exchange(round_, {"a": b"payload"}, deadline=None, quorum=1, grace=0.0)

        assert [(m.task["kind"], m.payload) for m in link.pushed] == [
            ("open", b"terms"), ("round", b"payload"), ("round", b"payload"),
        ]  # fmt: skip
        assert {m.task["begun"] for m in link.pushed} == {"b" * 16}

    def test_the_deadline_starts_with_the_round_and_not_with_the_opening(self, opening, link, clock, scripted) -> None:
        link.sites["a"] = scripted(seconds=80)

        answers = opening.exchange(1, {"a": b"payload"}, deadline=100.0, quorum=1, grace=0.0)

        assert answers == {"a": b"a1"}
        assert [m.task["seconds"] for m in link.sent("a")] == [100.0]

    def test_a_site_that_refuses_the_run_is_absent_with_its_reason(self, opening, link, scripted, reply) -> None:
        link.sites["b"] = scripted(answer=lambda m: reply("", m.node, header={"failed": "this site runs other code"}))

        answers = opening.exchange(1, {"a": b"", "b": b""}, deadline=None, quorum=1, grace=50.0)

        assert answers["b"] == Failure("this site runs other code")
        assert link.sent("b") == []

    def test_a_site_that_has_forgotten_the_run_is_sent_the_opening_again(self, opening, link, scripted, reply) -> None:
        def forgets_once(message):
            forgotten = message.task["kind"] == "round" and len(link.sent("a")) < 2
            return reply("", message.node, b"a1", {"failed": "unknown run 'abc'"} if forgotten else {})

        link.sites["a"] = scripted(answer=forgets_once)

        answers = opening.exchange(1, {"a": b"payload"}, deadline=None, quorum=1, grace=0.0)

        assert answers == {"a": b"a1"}
        assert [m.task["kind"] for m in link.pushed] == ["open", "round", "open", "round"]


def test_the_audit_log_has_every_message_in_both_directions(
    link, config, clock, scripted, reply, tmp_path: Path
) -> None:
    link.sites["b"] = scripted(answer=lambda message: reply("", message.node, b"", {"failed": "no"}))
    with AuditLog(tmp_path / "audit.jsonl") as log:
        fleet = FlowerFleet(link, config, opening=b"{}", log=log, clock=clock, sleep=clock.sleep)

        fleet.exchange(1, dict.fromkeys("ab", b"payload"), deadline=None, quorum=1, grace=0.0)

    entries = list(read_log(tmp_path / "audit.jsonl"))
    rows = [[entry[key] for key in ("direction", "kind", "site", "bytes", "answer_to")] for entry in entries]
    assert rows == [
        ["out", "open", "a", 2, None], ["out", "open", "b", 2, None],
        ["in", "open", "a", 2, 1], ["in", "open", "b", 2, 2],
        ["out", "round", "a", 7, None], ["in", "round", "a", 2, 5],
    ]  # fmt: skip
    assert entries[3]["refused"] == "no"


@pytest.fixture(autouse=True)
def _capture_warnings(caplog) -> None:
    caplog.set_level(logging.WARNING)
