"""The fleet: whatever reaches the sites. The round loop knows this protocol and nothing else of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedsca_pipeline.errors import MessageError, SiteError
from fedsca_pipeline.federation.local import LocalWorker, StepCallback, ignore_step
from fedsca_pipeline.federation.store import SiteStore
from fedsca_pipeline.sites.arrays import SiteArrays

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a site did not answer."""

    reason: str


class Fleet(Protocol):
    """Reaches sites; says nothing about what is sent."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be reached now, sorted."""
        ...

    def exchange(
        self, round_: int, payloads: Mapping[str, bytes], *, deadline: float | None, quorum: int, grace: float
    ) -> Mapping[str, bytes | Failure]:
        """Deliver one payload a site and return what came back, one entry a site.

        Args:
            round_: number of the round, from 1.
            payloads: site to message.
            deadline: seconds until a silent site counts as failed; None waits for ever.
            quorum: enough replies to stop waiting for the rest after ``grace``.
            grace: seconds.
        """
        ...


@dataclass
class InProcessFleet:
    """All sites on this machine, one after the other, on one model in memory.

    ``deadline`` and ``grace`` mean nothing here, where no site can be silent.
    """

    worker: LocalWorker
    data: Mapping[str, SiteArrays]
    folder: Path
    inject_failures: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: StepCallback = ignore_step

    def sites(self) -> Sequence[str]:
        """Every site there is data of, sorted."""
        return tuple(sorted(self.data))

    def store(self, site: str) -> SiteStore:
        """Return what ``site`` keeps between rounds."""
        return SiteStore(self.folder / site)

    def exchange(
        self, round_: int, payloads: Mapping[str, bytes], *, deadline: float | None, quorum: int, grace: float
    ) -> Mapping[str, bytes | Failure]:
        """Visit the sites one after the other, in order of their names."""
        return {site: self._visit(round_, site, payload) for site, payload in sorted(payloads.items())}

    def _visit(self, round_: int, site: str, payload: bytes) -> bytes | Failure:
        if round_ in self.inject_failures.get(site, ()):
            return Failure("injected by federation.inject_failures")
        try:
            return self.worker.work(payload, round_, site, self.data[site], self.store(site), self.on_step)
        except (SiteError, MessageError) as error:
            logger.warning("%s", error)
            return Failure(str(error))
