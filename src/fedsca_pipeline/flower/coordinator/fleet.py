"""The Flower fleet: sites on other machines, reached through a link that may break and recover.

It decides how long a round waits for which sites, when a site is asked again, and which answers count.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsca_pipeline.errors import MessageError, counted
from fedsca_pipeline.federation.fleets.fleet import Failure, Fault, no_fault
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator.link import Link, LinkLost, Node, Reply
from fedsca_pipeline.flower.messages.contents import answer_content, request_content
from fedsca_pipeline.flower.messages.documents import UNKNOWN_RUN

logger = logging.getLogger(__name__)

# Flower's default for how long a message and its answer are stored.
_MAX_SECONDS = 43_200.0
# An answer that arrives up to this long after the deadline of its round is reported as late.
_LATE_SECONDS = 120.0


@dataclass(frozen=True)
class _InFlight:
    """A message without an answer so far; ``line`` is the number of its line in the audit log."""

    site: str
    kind: str
    round: int
    node: Node
    until: float
    line: int | None


@dataclass
class _Exchange:
    """One request to several sites, and the answers so far. ``started`` is when the first site was asked."""

    kind: str
    round: int
    payloads: Mapping[str, bytes]
    deadline: float
    quorum: int
    grace: float
    fault: Fault
    started: float = math.inf
    answers: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    overdue: set[str] = field(default_factory=set)
    retry_at: dict[str, float] = field(default_factory=dict)
    quorum_at: float = math.inf

    @property
    def enough(self) -> bool:
        return len(self.answers) >= min(self.quorum, len(self.payloads))

    @property
    def waiting(self) -> list[str]:
        return [site for site in sorted(self.payloads) if site not in self.answers]

    @property
    def undecided(self) -> list[str]:
        """Sites whose answer can still come; below the quorum, all that have not answered."""
        return [site for site in self.waiting if not self.enough or site not in self.failures]

    @property
    def end(self) -> float:
        """Time at which the exchange ends, once the quorum has answered."""
        return min(self.quorum_at + self.grace, self.started + self.deadline)

    def over(self, now: float) -> bool:
        """Return whether the exchange is over: the quorum has answered, and no further answer is waited for."""
        if not self.enough:
            return False
        self.quorum_at = min(self.quorum_at, now)
        return not self.undecided or now >= self.end

    def may_send(self, site: str, now: float) -> bool:
        """Return whether a site may be asked now. A failed site is asked again only below the quorum, after a pause."""
        return (site not in self.failures or not self.enough) and now >= self.retry_at.get(site, -math.inf)

    def results(self, reason: Callable[[str], str]) -> dict[str, bytes | Failure]:
        """Return one entry per site; ``reason`` returns why a site is silent."""
        absent = {
            site: Failure(self.reasons.get(site) or reason(site), self.unusable.get(site, 0)) for site in self.waiting
        }
        return {**self.answers, **absent}


class FlowerFleet:
    """Sites that are reached through a link.

    Below the quorum the fleet waits, logs for which sites, and continues when they return. A site that reports a
    failure is absent for the round. A site that disconnects gets its message again if it returns before the round ends.
    An answer to a round that is over is dropped with a log line.

    Args:
        link: link to the sites.
        config: names of the sites, limits and intervals.
        begun: start of a run that the tasks belong to (``documents.Task``); empty before a run starts.
        opening: document that a site must accept before it is sent rounds; None if no run is opened.
        log: audit log of the coordinator; None: no log is written.
        absent: per site, rounds in which it is not asked (``federation.inject_failures``).
        clock: returns the time in seconds.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        link: Link,
        config: FlowerConfig,
        *,
        begun: str = "",
        opening: bytes | None = None,
        log: AuditLog | None = None,
        absent: Mapping[str, Sequence[int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._link, self._config, self._log = link, config, log
        self._begun, self._opening = begun, opening
        self._absent = absent or {}
        self._clock, self._sleep = clock, sleep
        self._opened: set[str] = set()
        self._in_flight: dict[str, _InFlight] = {}
        self._late: dict[str, _InFlight] = {}
        self._nodes: Mapping[str, Node] = {}
        self._last_warning = ""

    def sites(self) -> Sequence[str]:
        """Return all configured sites, sorted, whether or not they are connected."""
        return tuple(self._config.sites)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **terms: Any) -> Mapping[str, bytes | Failure]:
        """Send each site its payload; return one answer or failure per site. ``terms`` are those of ``ask``."""
        left_out = {site for site in payloads if round_ in self._absent.get(site, ())}
        asked = {site: payload for site, payload in payloads.items() if site not in left_out}
        found = self.ask("round", round_, asked, **terms) if asked else {}
        return {**found, **{site: Failure("injected by federation.inject_failures") for site in left_out}}

    def ask(
        self,
        kind: str,
        round_: int,
        payloads: Mapping[str, bytes],
        *,
        deadline: float | None = None,
        quorum: int,
        grace: float = math.inf,
        fault: Fault = no_fault,
    ) -> Mapping[str, bytes | Failure]:
        """Send a request of any kind to sites, as ``exchange`` does for a round."""
        exchange = _Exchange(kind, round_, payloads, deadline or math.inf, quorum, grace, fault)
        while not exchange.over(self._clock()):
            try:
                self._send(exchange)
                self._receive(exchange)
            except LinkLost as lost:
                self._reconnect(lost)
            self._wait(exchange)
        self._late |= self._in_flight
        self._in_flight.clear()
        self._last_warning = ""
        return exchange.results(self._silence_reason)

    def _send(self, exchange: _Exchange) -> None:
        self._nodes = self._link.nodes()
        self._mark_lost()
        now = self._clock()
        busy = {flight.site for flight in self._in_flight.values()} | self._still_answering(exchange, now)
        for site in exchange.waiting:
            if site in self._nodes and site not in busy and exchange.may_send(site, now):
                exchange.failures.pop(site, None)
                self._send_to(exchange, site, self._nodes[site], now)

    def _still_answering(self, exchange: _Exchange, now: float) -> set[str]:
        """Return the sites that may still answer an earlier message of this request. A node has one queue."""
        return {
            flight.site
            for flight in self._late.values()
            if (flight.kind, flight.round) in (("open", 0), (exchange.kind, exchange.round))
            and self._nodes.get(flight.site) == flight.node
            and now < flight.until
        }

    def _send_to(self, exchange: _Exchange, site: str, node: Node, now: float) -> None:
        if self._opening is not None and site not in self._opened:
            kind, round_, payload = "open", 0, self._opening
        else:
            kind, round_, payload = exchange.kind, exchange.round, exchange.payloads[site]
            exchange.started = min(exchange.started, now)
        # Below the quorum the round has no end.
        end = exchange.end if exchange.enough else now + exchange.deadline
        left = min(max(1.0, end - now), _MAX_SECONDS)
        task = {"kind": kind, "round": round_, "site": site, "seconds": left, "begun": self._begun}
        exchange.retry_at[site] = now + self._config.retry
        line = self._log_request(site, kind, round_, payload)
        message = self._link.push(node.id, task, payload, left + _LATE_SECONDS)
        if message is None:
            logger.warning("round %d: the SuperLink did not accept the message for %s", exchange.round, site)
            return
        self._in_flight[message] = _InFlight(site, kind, round_, node, now + left + _LATE_SECONDS, line)

    def _mark_lost(self) -> None:
        """Mark messages as late if their node is gone or has restarted. An answer may still arrive."""
        for message, flight in list(self._in_flight.items()):
            if self._nodes.get(flight.site) != flight.node:
                self._late[message] = self._in_flight.pop(message)

    def _receive(self, exchange: _Exchange) -> None:
        for reply in self._link.pull([*self._in_flight, *self._late]):
            flight = self._in_flight.pop(reply.id, None) or self._late.pop(reply.id, None)
            if flight is not None:
                self._handle(exchange, flight, reply)

    def _handle(self, exchange: _Exchange, flight: _InFlight, reply: Reply) -> None:
        site = flight.site
        if reply.error is not None:
            self._record_error(exchange, flight, reply.error)
            return
        failed = self._reply_fault(flight, reply)
        self._log_answer(flight, reply, failed)
        if flight.kind == "open" and failed is None:
            self._opened.add(site)
            exchange.retry_at.pop(site, None)
        elif flight.kind != "open" and (flight.kind, flight.round) != (exchange.kind, exchange.round):
            logger.warning(
                "round %d: the answer of %s came after the end of the round and was dropped", flight.round, site
            )
        elif site not in exchange.answers:
            failed = failed or exchange.fault(site, reply.payload)
            if failed is None:
                exchange.answers[site] = reply.payload
            else:
                self._record_failure(exchange, site, failed)
                exchange.unusable[site] = len(reply.payload)

    def _record_error(self, exchange: _Exchange, flight: _InFlight, error: str) -> None:
        """Store why Flower has no answer. The site is asked again; without an answer this is why it is absent."""
        late = flight.kind != "open" and (flight.kind, flight.round) != (exchange.kind, exchange.round)
        if late or exchange.reasons.get(flight.site) != error:
            logger.warning("%s %d: no answer from %s: %s", flight.kind, flight.round, flight.site, error)
        if not late:
            exchange.reasons[flight.site] = error

    def _log_request(self, site: str, kind: str, round_: int, payload: bytes) -> int | None:
        if self._log is None:
            return None
        content = request_content(kind, payload, self._config.max_message_bytes)
        return self._log.add("out", site=site, kind=kind, round_=round_, sent=payload, content=content)

    def _log_answer(self, flight: _InFlight, reply: Reply, failed: str | None) -> None:
        if self._log is None:
            return
        sent = reply.payload
        content: dict[str, Any] = {"run": None, "refused": failed}
        if "failed" in reply.header:
            sent = str(reply.header["failed"]).encode()
        elif failed is None:
            try:
                content = answer_content(flight.kind, reply.payload, self._config.max_message_bytes)
            except MessageError as error:
                content = {"run": None, "unreadable": str(error)}
        self._log.add(
            "in", site=flight.site, kind=flight.kind, round_=flight.round, sent=sent, content=content,
            answer_to=flight.line,
        )  # fmt: skip

    def _reply_fault(self, flight: _InFlight, reply: Reply) -> str | None:
        if reply.node != flight.node.id:
            return f"answered by another node ({reply.node})"
        if len(reply.payload) > self._config.max_message_bytes:
            most = self._config.max_message_bytes
            return f"its answer has {len(reply.payload)} bytes, flower.max_message allows {most}"
        return str(reply.header["failed"]) if "failed" in reply.header else None

    def _record_failure(self, exchange: _Exchange, site: str, reason: str) -> None:
        logger.warning("round %d: %s: %s", exchange.round, site, reason)
        if reason.startswith(UNKNOWN_RUN) and site in self._opened:
            self._opened.discard(site)
            exchange.retry_at.pop(site, None)
            return
        exchange.failures[site] = exchange.reasons[site] = reason

    def _reconnect(self, lost: LinkLost) -> None:
        logger.warning("the link to the sites is lost (%s); reconnecting", lost)
        self._in_flight.clear()
        self._late.clear()
        try:
            self._link.reconnect()
        except LinkLost as still:
            logger.warning("%s; next attempt in %.0f s", still, self._config.retry)
            self._sleep(self._config.retry)

    def _wait(self, exchange: _Exchange) -> None:
        now = self._clock()
        if exchange.over(now):
            return
        self._mark_overdue(exchange, now)
        self._warn_missing(exchange, now)
        self._sleep(self._config.poll)

    def _mark_overdue(self, exchange: _Exchange, now: float) -> None:
        """Mark messages whose time is up as overdue. Their sites are asked again once they can no longer answer."""
        for message, flight in list(self._in_flight.items()):
            if now >= flight.until - _LATE_SECONDS:
                exchange.overdue.add(flight.site)
                self._late[message] = self._in_flight.pop(message)

    def _warn_missing(self, exchange: _Exchange, now: float) -> None:
        """Log once for which sites the run waits, of those that are not connected, have failed or are late."""
        missing = {
            site: exchange.reasons.get(site) or self._silence_reason(site)
            for site in exchange.undecided
            if site in exchange.reasons or site in exchange.overdue or site not in self._nodes
        }
        text = "; ".join(f"{site}: {reason}" for site, reason in missing.items())
        if missing and text != self._last_warning:
            left = f" {exchange.end - now:.0f} s at most" if exchange.enough and exchange.end < math.inf else ""
            logger.warning(
                "%s %d: %s so far, %d needed; waiting%s for %s",
                exchange.kind, exchange.round, counted(len(exchange.answers), "answer"), exchange.quorum, left, text,
            )  # fmt: skip
        self._last_warning = text

    def _silence_reason(self, site: str) -> str:
        return "no answer in time" if site in self._nodes else "not connected"
