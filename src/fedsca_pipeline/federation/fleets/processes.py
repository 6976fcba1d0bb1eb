"""Sites on this machine, several at once: one worker process each, one frozen foundation for all.

A worker is an in-process fleet, so that a site's work is the same bits in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing.reduction import ForkingPickler
from types import TracebackType

import torch
from torch import Tensor

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import FederationConfig, RunConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet, LocalSites
from fedsca_pipeline.federation.fleets.registry import available_cores
from fedsca_pipeline.federation.fleets.shared_model import share, with_values, without_values
from fedsca_pipeline.federation.fleets.worker_pool import Died, Raised, Report, Work, WorkerPool
from fedsca_pipeline.federation.site.steps import StepCallback
from fedsca_pipeline.files import remove_partial_files
from fedsca_pipeline.model.adapters import fel


@dataclass(frozen=True)
class _Visit:
    """To a worker: one site's payload of one round."""

    round: int
    site: str
    payload: bytes

    def __str__(self) -> str:
        return f"{self.site}, round {self.round}"


@dataclass(frozen=True)
class _Equipment:
    """What every worker starts with.

    ``sites`` is the pickled ``LocalSites``, its model without values (0.1 MB), with ``inject_failures``; ``values`` are
    the model's, uint8 [bytes] in shared memory.
    """

    sites: bytes
    values: Tensor


def open_processes(config: FederationConfig, here: LocalSites, on_step: StepCallback) -> ProcessFleet:
    """Return the fleet ``processes``, whose workers start when it is entered.

    Raises:
        ConfigError: a device it asks for is not there, or there is not enough shared memory.
    """
    devices = worker_devices(here.device, config, threads=here.threads, cores=available_cores(), sites=len(here.data))
    return ProcessFleet(here, devices, config.inject_failures, on_step)


class ProcessFleet:
    """All sites on this machine, as many at once as there are workers, those with most training images first.

    A worker that dies is replaced and its site tried once more; where that worker dies, too, the site counts as absent.
    An error that is not the site's own is raised here, with a note that names the site. ``deadline`` and ``grace`` mean
    nothing: a worker answers or dies. Workers end when the context is left, and when this process is killed; whatever
    they write, they write atomically.

    Args:
        here: picklable data (``SiteData``); its model moves into shared memory, where all hold it together.
        devices: of each worker; on the CPU one ``cpu`` a worker.
        inject_failures: for tests; site to the rounds in which it fails.
        on_step: is told of every local step, of whichever site.
    """

    def __init__(
        self,
        here: LocalSites,
        devices: Sequence[torch.device],
        inject_failures: Mapping[str, Sequence[int]],
        on_step: StepCallback,
    ) -> None:
        # Every site does as many local epochs, so the images are what makes one longer than another.
        self._images = {site: len(here.data[site].rows("train")) for site in sorted(here.data)}
        folder = here.folder
        values = share(here.model)
        sites = ForkingPickler.dumps((replace(here, model=without_values(here.model)), dict(inject_failures)))
        self._pool: WorkerPool[_Visit, bytes | Failure] = WorkerPool(
            _start,
            _Equipment(bytes(sites), values),
            devices,
            on_report=lambda step: on_step(*step),
            on_death=lambda visit: remove_partial_files(folder / visit.site),
        )

    def __enter__(self) -> ProcessFleet:
        self._pool.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, at)

    def sites(self) -> Sequence[str]:
        """Every site there is data of, sorted."""
        return tuple(self._images)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **_: object) -> Mapping[str, bytes | Failure]:
        """Give every free worker the longest site that still waits, until all have answered."""
        longest_first = sorted(payloads, key=lambda site: (-self._images[site], site))
        answers: dict[str, bytes | Failure] = {}
        for visit, answer in self._pool.run(_Visit(round_, site, payloads[site]) for site in longest_first):
            match answer:
                case Raised():
                    raise answer.error
                case Died():
                    answers[visit.site] = Failure(answer.reason)
                case _:
                    answers[visit.site] = answer
        return answers


@contextmanager
def _start(equipment: _Equipment, device: torch.device) -> Iterator[Work[_Visit, bytes | Failure]]:
    """Be an in-process fleet on the shared model; steps are reported as the arguments of a ``StepCallback``."""
    here, inject_failures = _unpacked(equipment, device)
    with deterministic(RunConfig(device=device.type), here.threads):
        fleet = InProcessFleet(here.worker(device), here.data, here.folder, inject_failures, private=here.private)

        def answer(visit: _Visit, report: Report) -> bytes | Failure:
            reporting = replace(fleet, on_step=lambda *step: report(step))
            payloads = {visit.site: visit.payload}
            return reporting.exchange(visit.round, payloads)[visit.site]

        yield answer


def _unpacked(equipment: _Equipment, device: torch.device) -> tuple[LocalSites, Mapping[str, Sequence[int]]]:
    # PEFT must know its methods before their names can be read.
    fel.register()
    here, inject_failures = ForkingPickler.loads(equipment.sites)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = with_values(here.model, equipment.values, device, own=frozenset(here.strategy.trained()))
    return replace(here, model=model), inject_failures


def worker_devices(
    device: torch.device, config: FederationConfig, *, threads: int, cores: int, sites: int
) -> tuple[torch.device, ...]:
    """Return the device of each worker process, at least one and at most one for each of a round's sites.

    Args:
        device: kind of device that the run computes on.
        config: ``workers`` and ``devices``: ``auto`` takes, on CUDA, every device and one worker on each; on the CPU as
            many workers as there are cores for; elsewhere one.
        threads: of one site.
        cores: that this process may use.
        sites: of the whole run.

    Raises:
        ConfigError: ``devices`` names one that is not there.
    """
    on_cuda = device.type == "cuda"
    if config.devices and not on_cuda:
        raise ConfigError(f"federation.devices numbers CUDA devices, but this run is on {device.type}; set it to auto")
    devices = _numbered(device, config) if on_cuda else [device]
    workers = config.workers or (cores // threads if device.type == "cpu" else len(devices))
    return tuple(islice(cycle(devices), max(1, min(workers, config.drawn(sites)))))


def _numbered(device: torch.device, config: FederationConfig) -> list[torch.device]:
    count = torch.cuda.device_count()
    numbers = config.devices or range(count)
    if missing := sorted(set(numbers).difference(range(count))):
        raise ConfigError(f"federation.devices: there is no CUDA device {missing[0]} here, only 0 to {count - 1}")
    return [torch.device(device.type, number) for number in numbers]
