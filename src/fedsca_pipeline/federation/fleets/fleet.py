"""The fleet: whatever reaches the sites. The round loop knows this protocol and nothing else of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why there is no answer of a site that can be used, and how many bytes came all the same."""

    reason: str
    bytes_up: int = 0


Fault = Callable[[str, bytes], str | None]
"""Says what is wrong with a site's answer; None: nothing."""


def no_fault(_: str, __: bytes) -> None:
    """Take every answer."""


class Fleet(Protocol):
    """Reaches sites; says nothing about what is sent."""

    def sites(self) -> Sequence[str]:
        """Names of the run's sites, sorted, whether or not they can be reached now."""
        ...

    def exchange(
        self,
        round_: int,
        payloads: Mapping[str, bytes],
        *,
        deadline: float | None,
        quorum: int,
        grace: float,
        fault: Fault = no_fault,
    ) -> Mapping[str, bytes | Failure]:
        """Deliver one payload a site and return what came back, one entry a site.

        Args:
            round_: number of the round, from 1.
            payloads: site to message.
            deadline: seconds until a silent site counts as failed, if the quorum has answered; None waits for ever.
            quorum: enough replies to stop waiting for the rest after ``grace``; with fewer a fleet whose sites may come
                back goes on waiting.
            grace: seconds, from the moment the quorum is there; infinity waits until the deadline.
            fault: a fleet that waits for a quorum counts an answer that has one as a failure; any other may hand it on.
        """
        ...
