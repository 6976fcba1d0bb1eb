"""The Flower fleet: sites on other machines, reached through a link that may break and come back.

Which waits for whom, for how long, and what counts as an answer is decided here, whatever the link is made of.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.fleets.fleet import Failure, Fault, no_fault
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.messages.contents import answer_content, question_content

logger = logging.getLogger(__name__)

# Flower's own default for how long a message and its answer are kept.
_LONGEST_SECONDS = 43_200.0
# An answer that comes so much later than its round's deadline can still be told of.
_LATE_SECONDS = 120.0
UNKNOWN_RUN = "unknown run"
"""How a site's failure begins whose cure is to open the run there (``worker.SiteWork``)."""


class LinkLost(Exception):  # noqa: N818 - what happened; the fleet mends it
    """The link to the SuperLink is broken; what was under way on it may never be answered."""


@dataclass(frozen=True)
class Node:
    """A site's SuperNode that is there now; ``since`` changes when it has been started anew."""

    id: str
    since: str = ""


@dataclass(frozen=True)
class Reply:
    """What came back for one message: an answer, or ``error``, why Flower has none.

    ``said`` is the answer's header, in which ``failed`` is the site's reason for having no payload.
    """

    id: str
    node: str
    payload: bytes = b""
    said: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class Link(Protocol):
    """Carries messages to nodes. Every method raises ``LinkLost`` when it is broken."""

    def nodes(self) -> Mapping[str, Node]:
        """Return the sites that are connected now, by the names their keys are registered under."""
        ...

    def push(self, node: str, task: Mapping[str, Any], payload: bytes, ttl: float) -> str | None:
        """Send one message that is kept for ``ttl`` seconds; return its id, or None where it was not taken."""
        ...

    def pull(self, ids: Sequence[str]) -> Sequence[Reply]:
        """Return what has come back for these messages since the last time."""
        ...

    def restore(self) -> None:
        """Make a broken link anew, once; messages that were under way are forgotten."""
        ...


@dataclass(frozen=True)
class _Flight:
    """A message under way; ``line`` is its number in the audit log."""

    site: str
    kind: str
    round: int
    node: Node
    until: float
    line: int | None


@dataclass
class _Gathering:
    """One question to several sites, and what has come back so far; it is ``started`` when the first has been asked."""

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
        """Those of whom something is still to be expected: below the quorum all that have not answered."""
        return [site for site in self.waiting if not self.enough or site not in self.failures]

    @property
    def end(self) -> float:
        """When the rest is waited for no longer, once the quorum is there."""
        return min(self.quorum_at + self.grace, self.started + self.deadline)

    def over(self, now: float) -> bool:
        """Tell whether the rest is waited for no longer."""
        if not self.enough:
            return False
        self.quorum_at = min(self.quorum_at, now)
        return not self.undecided or now >= self.end

    def may_send(self, site: str, now: float) -> bool:
        """A site that failed is asked once more only where too few have answered, and not at once."""
        return (site not in self.failures or not self.enough) and now >= self.retry_at.get(site, -math.inf)

    def results(self, reason: Callable[[str], str]) -> dict[str, bytes | Failure]:
        """Return one entry a site; ``reason`` says why a silent one is."""
        absent = {
            site: Failure(self.reasons.get(site) or reason(site), self.unusable.get(site, 0)) for site in self.waiting
        }
        return {**self.answers, **absent}


class FlowerFleet:
    """Sites behind a link.

    Below the quorum it waits, says for whom, and goes on when they return. A site that reports a failure counts as
    absent for the round. A site that vanished gets its message again when it is back, as long as the round is open;
    what it answers to a round that is over is dropped, and said so.

    Args:
        link: to the sites.
        config: names the sites, and limits and intervals.
        begun: which beginning of a run its tasks belong to (``documents.Task``); empty before there is one.
        opening: what a site must have accepted before it is sent rounds; None where nothing is to be opened.
        log: the coordinator's audit log; None keeps none.
        absent: for tests; site to the rounds in which it is not asked (``federation.inject_failures``).
        clock, sleep: seconds.
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
        self._flights: dict[str, _Flight] = {}
        self._late: dict[str, _Flight] = {}
        self._nodes: Mapping[str, Node] = {}
        self._said = ""

    def sites(self) -> Sequence[str]:
        """Every configured site, sorted, whether or not it is connected."""
        return tuple(self._config.sites)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **terms: Any) -> Mapping[str, bytes | Failure]:
        """Send every site its payload and return what came back, one entry a site; ``terms`` are those of ``ask``."""
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
        """Put a question of any kind to sites, as ``exchange`` does with a round's."""
        gathering = _Gathering(kind, round_, payloads, deadline or math.inf, quorum, grace, fault)
        while not gathering.over(self._clock()):
            try:
                self._send(gathering)
                self._hear(gathering)
            except LinkLost as lost:
                self._mend(lost)
            self._wait_on(gathering)
        self._late |= self._flights
        self._flights.clear()
        self._said = ""
        return gathering.results(self._why_silent)

    def _send(self, gathering: _Gathering) -> None:
        self._nodes = self._link.nodes()
        self._recall()
        now = self._clock()
        under_way = {flight.site for flight in self._flights.values()} | self._still_asked(gathering, now)
        for site in gathering.waiting:
            if site in self._nodes and site not in under_way and gathering.may_send(site, now):
                gathering.failures.pop(site, None)
                self._push(gathering, site, self._nodes[site], now)

    def _still_asked(self, gathering: _Gathering, now: float) -> set[str]:
        """Return the sites that may still answer an earlier message of the same question: a node has one queue."""
        return {
            flight.site
            for flight in self._late.values()
            if (flight.kind, flight.round) in (("open", 0), (gathering.kind, gathering.round))
            and self._nodes.get(flight.site) == flight.node
            and now < flight.until
        }

    def _push(self, gathering: _Gathering, site: str, node: Node, now: float) -> None:
        first = self._opening is not None and site not in self._opened
        kind, round_ = ("open", 0) if first else (gathering.kind, gathering.round)
        payload = self._opening if first else gathering.payloads[site]
        if not first:
            gathering.started = min(gathering.started, now)
        # Below the quorum the round goes on for as long as it takes.
        end = gathering.end if gathering.enough else now + gathering.deadline
        left = min(max(1.0, end - now), _LONGEST_SECONDS)
        task = {"kind": kind, "round": round_, "site": site, "seconds": left, "begun": self._begun}
        gathering.retry_at[site] = now + self._config.retry
        line = self._note_question(site, kind, round_, payload)
        message = self._link.push(node.id, task, payload, left + _LATE_SECONDS)
        if message is None:
            logger.warning("round %d: the SuperLink did not take the message for %s", gathering.round, site)
            return
        self._flights[message] = _Flight(site, kind, round_, node, now + left + _LATE_SECONDS, line)

    def _recall(self) -> None:
        """Count messages as lost whose node is gone or was started anew; an answer may come all the same."""
        for message, flight in list(self._flights.items()):
            if self._nodes.get(flight.site) != flight.node:
                self._late[message] = self._flights.pop(message)

    def _hear(self, gathering: _Gathering) -> None:
        for reply in self._link.pull([*self._flights, *self._late]):
            flight = self._flights.pop(reply.id, None) or self._late.pop(reply.id, None)
            if flight is not None:
                self._take(gathering, flight, reply)

    def _take(self, gathering: _Gathering, flight: _Flight, reply: Reply) -> None:
        site = flight.site
        if reply.error is not None:
            self._note_error(gathering, flight, reply.error)
            return
        failed = self._fault(flight, reply)
        self._note_answer(flight, reply, failed)
        if flight.kind == "open" and failed is None:
            self._opened.add(site)
            gathering.retry_at.pop(site, None)
        elif flight.kind != "open" and (flight.kind, flight.round) != (gathering.kind, gathering.round):
            logger.warning("round %d: the answer of %s came after the round's end and was dropped", flight.round, site)
        elif site not in gathering.answers:
            failed = failed or gathering.fault(site, reply.payload)
            if failed is None:
                gathering.answers[site] = reply.payload
            else:
                self._fail(gathering, site, failed)
                gathering.unusable[site] = len(reply.payload)

    def _note_error(self, gathering: _Gathering, flight: _Flight, error: str) -> None:
        """Keep why Flower has no answer: if nobody mends it, that is why the site is absent; it is asked again."""
        if flight.kind != "open" and (flight.kind, flight.round) != (gathering.kind, gathering.round):
            return
        if gathering.reasons.get(flight.site) != error:
            logger.warning("%s %d: no answer of %s: %s", flight.kind, flight.round, flight.site, error)
        gathering.reasons[flight.site] = error

    def _note_question(self, site: str, kind: str, round_: int, payload: bytes) -> int | None:
        if self._log is None:
            return None
        content = question_content(kind, payload, self._config.most_bytes)
        return self._log.add("out", site=site, kind=kind, round_=round_, sent=payload, content=content)

    def _note_answer(self, flight: _Flight, reply: Reply, failed: str | None) -> None:
        if self._log is None:
            return
        sent, content = reply.payload, {"run": None, "refused": failed}
        if "failed" in reply.said:
            sent = str(reply.said["failed"]).encode()
        elif failed is None:
            try:
                content = answer_content(flight.kind, reply.payload, self._config.most_bytes)
            except MessageError as error:
                content = {"run": None, "unreadable": str(error)}
        self._log.add(
            "in", site=flight.site, kind=flight.kind, round_=flight.round, sent=sent, content=content,
            answer_to=flight.line,
        )  # fmt: skip

    def _fault(self, flight: _Flight, reply: Reply) -> str | None:
        if reply.node != flight.node.id:
            return f"answered by another node ({reply.node})"
        if len(reply.payload) > self._config.most_bytes:
            return f"an answer of {len(reply.payload)} bytes, flower.max_message allows {self._config.most_bytes}"
        return str(reply.said["failed"]) if "failed" in reply.said else None

    def _fail(self, gathering: _Gathering, site: str, reason: str) -> None:
        logger.warning("round %d: %s: %s", gathering.round, site, reason)
        if reason.startswith(UNKNOWN_RUN) and site in self._opened:
            self._opened.discard(site)
            gathering.retry_at.pop(site, None)
            return
        gathering.failures[site] = gathering.reasons[site] = reason

    def _mend(self, lost: LinkLost) -> None:
        logger.warning("the link to the sites is lost (%s); it is made anew", lost)
        self._flights.clear()
        self._late.clear()
        try:
            self._link.restore()
        except LinkLost as still:
            logger.warning("%s; next try in %.0f s", still, self._config.retry)
            self._sleep(self._config.retry)

    def _wait_on(self, gathering: _Gathering) -> None:
        now = self._clock()
        if gathering.over(now):
            return
        self._expire(gathering, now)
        self._say(gathering, now)
        self._sleep(self._config.poll)

    def _expire(self, gathering: _Gathering, now: float) -> None:
        """Let sites whose time is up be asked again once they cannot answer the first message any more."""
        for message, flight in list(self._flights.items()):
            if now >= flight.until - _LATE_SECONDS:
                gathering.overdue.add(flight.site)
                self._late[message] = self._flights.pop(message)

    def _say(self, gathering: _Gathering, now: float) -> None:
        """Say once for whom the run waits, of those that are known to be missing, to have failed or to be late."""
        missing = {
            site: gathering.reasons.get(site) or self._why_silent(site)
            for site in gathering.undecided
            if site in gathering.reasons or site in gathering.overdue or site not in self._nodes
        }
        text = "; ".join(f"{site}: {reason}" for site, reason in missing.items())
        if missing and text != self._said:
            left = f" {gathering.end - now:.0f} s at most" if gathering.enough and gathering.end < math.inf else ""
            logger.warning(
                "%s %d: %d sites have answered, %d must; waiting%s for %s",
                gathering.kind, gathering.round, len(gathering.answers), gathering.quorum, left, text,
            )  # fmt: skip
        self._said = text

    def _why_silent(self, site: str) -> str:
        return "no answer in time" if site in self._nodes else "not connected"
