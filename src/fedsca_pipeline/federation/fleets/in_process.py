"""The in-process fleet: every site trains in this process, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.data.arrays import Arrays
from fedsca_pipeline.errors import MessageError, SiteError
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.site.privacy.ledger import PrivacyLedger
from fedsca_pipeline.federation.site.steps import LocalSettings, StepCallback, ignore_step
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.model.foundation.model import SegmentationModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalSites:
    """The sites on this machine with everything their work needs; fleets on one machine are made of it.

    ``model`` is on the CPU, its trainable tensors at their start values. ``folder`` holds the sites' states; ``device``
    is the kind of device to compute on; ``threads`` are torch's threads for one site. ``private`` is the folder of the
    sites' privacy ledgers, which stay when runs end; only differential privacy needs it.
    """

    model: SegmentationModel
    strategy: Strategy
    settings: LocalSettings
    data: Mapping[str, Arrays]
    folder: Path
    device: torch.device
    threads: int
    private: Path | None = None

    def worker(self, device: torch.device) -> LocalWorker:
        """Return a worker on ``device``; it uses and changes the model itself."""
        return LocalWorker(self.model.to(device), self.strategy, self.settings)


def open_in_process(
    config: FederationConfig, sites: LocalSites, on_step: StepCallback
) -> AbstractContextManager[InProcessFleet]:
    """Return the fleet ``in_process``; it starts no process, so leaving its context has no effect."""
    worker = sites.worker(sites.device)
    return nullcontext(InProcessFleet(worker, sites.data, sites.folder, config.inject_failures, on_step, sites.private))


@dataclass
class InProcessFleet:
    """All sites on this machine, one after the other, on one model in memory.

    It ignores ``deadline`` and ``grace``, because no site can be silent.
    """

    worker: LocalWorker
    data: Mapping[str, Arrays]
    folder: Path
    inject_failures: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: StepCallback = ignore_step
    private: Path | None = None

    def sites(self) -> Sequence[str]:
        """Return the sites that have data, sorted."""
        return tuple(sorted(self.data))

    def store(self, site: str) -> SiteStore:
        """Return the files that ``site`` stores between rounds."""
        ledger = PrivacyLedger(self.private / site) if self.private else None
        return SiteStore(self.folder / site, self.worker.settings.run, ledger)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **_: object) -> Mapping[str, bytes | Failure]:
        """Return each site's answer; sites work one after the other, sorted by name."""
        return {site: self._visit(round_, site, payload) for site, payload in sorted(payloads.items())}

    def _visit(self, round_: int, site: str, payload: bytes) -> bytes | Failure:
        if round_ in self.inject_failures.get(site, ()):
            return Failure("injected by federation.inject_failures")
        try:
            return self.worker.work(payload, round_, site, self.data[site], self.store(site), self.on_step)
        except (SiteError, MessageError) as error:
            logger.warning("%s", error)
            return Failure(str(error))
