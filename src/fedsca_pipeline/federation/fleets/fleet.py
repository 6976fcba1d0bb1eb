"""The fleet: whatever reaches the sites. The round loop knows this protocol and nothing else of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.data.arrays import Arrays, PooledArrays, SiteArrays
from fedsca_pipeline.errors import MessageError, SiteError
from fedsca_pipeline.federation.messages.codec import TensorLayout
from fedsca_pipeline.federation.site.privacy.ledger import Vault
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalSettings, LocalWorker, StepCallback, ignore_step
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.model.foundation.model import SegmentationModel

if TYPE_CHECKING:
    import pandas as pd

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


class SiteData(Mapping[str, SiteArrays]):
    """Sites' cached arrays, opened anew at each look-up: only those at work are mapped into memory, however many sites.

    Args:
        sources: site to file and manifest.

    Raises:
        DataError: on making it, and on a look-up: a file is missing, damaged, or not the one its manifest describes.
    """

    def __init__(self, sources: Mapping[str, tuple[Path, pd.DataFrame]]) -> None:
        self._sources = sources
        for site in sources:
            self[site]

    def __getitem__(self, site: str) -> SiteArrays:
        return SiteArrays(*self._sources[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


POOLED = "_pooled"
"""The one site that a strategy with ``pools`` trains at; a folder of that name is no site."""


class PooledData(Mapping[str, PooledArrays]):
    """All sites' arrays as those of one site, ``POOLED``."""

    def __init__(self, sites: Mapping[str, SiteArrays]) -> None:
        self._sites = sites

    def __getitem__(self, site: str) -> PooledArrays:
        if site != POOLED:
            raise KeyError(site)
        arrays = [self._sites[name] for name in sorted(self._sites)]
        return PooledArrays(arrays, [len(part) for part in arrays])

    def __iter__(self) -> Iterator[str]:
        return iter((POOLED,))

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class LocalSites:
    """The sites on this machine, and what it takes to do their work: what every fleet here is made of.

    ``model`` is on the CPU, its trainable tensors at their start values; ``folder`` keeps the sites' states; ``device``
    is the kind of device to compute on; ``threads`` are torch's, for one site; ``private`` is a folder of what sites
    keep for themselves over all runs, and only differential privacy needs it.
    """

    model: SegmentationModel
    layout: TensorLayout
    strategy: Strategy
    settings: LocalSettings
    data: Mapping[str, Arrays]
    folder: Path
    device: torch.device
    threads: int
    private: Path | None = None

    def worker(self, device: torch.device) -> LocalWorker:
        """Return a worker on ``device``, which takes the model over."""
        return LocalWorker(self.model.to(device), self.layout, self.strategy, self.settings)


def open_in_process(
    config: FederationConfig, here: LocalSites, on_step: StepCallback
) -> AbstractContextManager[InProcessFleet]:
    """Return the fleet ``in_process``; leaving it does nothing."""
    worker = here.worker(here.device)
    return nullcontext(InProcessFleet(worker, here.data, here.folder, config.inject_failures, on_step, here.private))


@dataclass
class InProcessFleet:
    """All sites on this machine, one after the other, on one model in memory.

    ``deadline`` and ``grace`` mean nothing here, where no site can be silent.
    """

    worker: LocalWorker
    data: Mapping[str, Arrays]
    folder: Path
    inject_failures: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: StepCallback = ignore_step
    private: Path | None = None

    def sites(self) -> Sequence[str]:
        """Every site there is data of, sorted."""
        return tuple(sorted(self.data))

    def store(self, site: str) -> SiteStore:
        """Return what ``site`` keeps between rounds."""
        return SiteStore(self.folder / site, Vault(self.private / site) if self.private else None)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **_: object) -> Mapping[str, bytes | Failure]:
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
