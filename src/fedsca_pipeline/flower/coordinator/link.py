"""The link that carries messages between the Flower fleet and the nodes of the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class LinkLost(Exception):  # noqa: N818 - an event, from which the fleet recovers
    """The link to the SuperLink is broken. Messages in flight may never be answered."""


@dataclass(frozen=True)
class Node:
    """A connected SuperNode of a site; ``since`` changes when the SuperNode restarts."""

    id: str
    since: str = ""


@dataclass(frozen=True)
class Reply:
    """The reply to one message: an answer, or in ``error`` the reason why Flower has no answer.

    ``header`` is the header of the answer. Its ``failed`` is the reason of a site that answers without a payload.
    """

    id: str
    node: str
    payload: bytes = b""
    header: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class Link(Protocol):
    """Carries messages to nodes. Every method raises ``LinkLost`` if the link is broken."""

    def nodes(self) -> Mapping[str, Node]:
        """Return the connected sites, by the names under which their keys are registered."""
        ...

    def push(self, node: str, task: Mapping[str, Any], payload: bytes, ttl: float) -> str | None:
        """Send one message, stored for ``ttl`` seconds; return its id, or None if the SuperLink did not accept it."""
        ...

    def pull(self, ids: Sequence[str]) -> Sequence[Reply]:
        """Return the replies to these messages that arrived since the last call."""
        ...

    def reconnect(self) -> None:
        """Replace a broken link, in one attempt. Messages in flight are lost."""
        ...
