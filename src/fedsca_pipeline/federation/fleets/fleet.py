"""The fleet protocol: how the round loop reaches the sites."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a site has no usable answer, and how many bytes arrived from it."""

    reason: str
    bytes_up: int = 0


Fault = Callable[[str, bytes], str | None]
"""Checks a site's answer when it arrives: returns why it is rejected, or None if it is accepted."""


def no_fault(_: str, __: bytes) -> None:
    """Return None: every answer is accepted."""


class Fleet(Protocol):
    """Delivers messages to sites and returns their answers, without reading either."""

    def sites(self) -> Sequence[str]:
        """Return the names of the run's sites, sorted, whether or not they can be reached now."""
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
        """Deliver one payload per site and return one entry per site: its answer, or why there is none.

        Args:
            round_: number of the round, from 1.
            payloads: site to message.
            deadline: seconds until a silent site counts as failed, if the quorum has answered; None: no limit.
            quorum: number of answers after which the fleet waits only ``grace`` longer for the others. Below it, a
                fleet whose sites can come back continues to wait.
            grace: seconds after the quorum has answered; infinity waits until the deadline.
            fault: a fleet that waits for a quorum calls it once per answer, on arrival, and counts a rejected answer as
                a failure. Other fleets need not call it: the server checks answers that have not been checked.
        """
        ...
