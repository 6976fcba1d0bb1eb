"""Sites on this machine, several at once: each in a worker process, all with one foundation in shared memory.

A worker is an in-process fleet, so that a site's work gives the same bits in both.
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
    """A worker's task: one site's payload of one round."""

    round: int
    site: str
    payload: bytes

    def __str__(self) -> str:
        return f"{self.site}, round {self.round}"


@dataclass(frozen=True)
class _Equipment:
    """What every worker starts with.

    ``pickled`` holds the ``LocalSites``, with a model without values (0.1 MB), and ``inject_failures``; ``values`` are
    the model's values, uint8 [bytes] in shared memory.
    """

    pickled: bytes
    values: Tensor


def open_processes(config: FederationConfig, sites: LocalSites, on_step: StepCallback) -> ProcessFleet:
    """Return the fleet ``processes``; its workers start when its context is entered.

    Raises:
        ConfigError: a configured device does not exist, or there is too little shared memory.
    """
    devices = worker_devices(
        sites.device, config, threads=sites.threads, cores=available_cores(), sites=len(sites.data)
    )
    return ProcessFleet(sites, devices, config.inject_failures, on_step)


class ProcessFleet:
    """All sites on this machine, one per worker at a time, those with most training images first.

    A worker that dies is replaced and its site tried once more; if the second worker dies too, the site counts as
    absent. An error other than SiteError and MessageError is raised in this process, with a note that names the site.
    ``deadline`` and ``grace`` are ignored: a worker answers or dies. Workers end when the context is left or this
    process is killed; they write files atomically.

    Args:
        sites: with picklable data (``SiteData``); the model moves into shared memory.
        devices: one per worker; on the CPU each is ``cpu``.
        inject_failures: for tests; site to the rounds in which it fails.
        on_step: called after local steps of all sites.
    """

    def __init__(
        self,
        sites: LocalSites,
        devices: Sequence[torch.device],
        inject_failures: Mapping[str, Sequence[int]],
        on_step: StepCallback,
    ) -> None:
        # All sites train for the same number of epochs, so the number of images decides how long each takes.
        self._images = {site: len(sites.data[site].rows("train")) for site in sorted(sites.data)}
        folder = sites.folder
        values = share(sites.model)
        pickled = ForkingPickler.dumps((replace(sites, model=without_values(sites.model)), dict(inject_failures)))
        self._pool: WorkerPool[_Visit, bytes | Failure] = WorkerPool(
            _start,
            _Equipment(bytes(pickled), values),
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
        """Return the sites that have data, sorted."""
        return tuple(self._images)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **_: object) -> Mapping[str, bytes | Failure]:
        """Return each site's answer; a free worker takes the waiting site with most training images."""
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
    """Yield the function that answers a task, by an in-process fleet; reports are the arguments of ``on_step``."""
    # PEFT can only unpickle methods that are registered.
    fel.register()
    sites, inject_failures = ForkingPickler.loads(equipment.pickled)
    # Before the model moves: cuBLAS reads its settings when CUDA starts.
    with deterministic(RunConfig.model_validate({"device": device.type}), sites.threads, device.index):
        model = with_values(sites.model, equipment.values, device, own=frozenset(sites.strategy.trained()))
        sites = replace(sites, model=model)
        fleet = InProcessFleet(sites.worker(device), sites.data, sites.folder, inject_failures, private=sites.private)

        def answer(visit: _Visit, report: Report) -> bytes | Failure:
            reporting = replace(fleet, on_step=lambda *step: report(step))
            payloads = {visit.site: visit.payload}
            return reporting.exchange(visit.round, payloads)[visit.site]

        yield answer


def worker_devices(
    device: torch.device, config: FederationConfig, *, threads: int, cores: int, sites: int
) -> tuple[torch.device, ...]:
    """Return the device of each worker process: at least one worker, at most one for each of a round's sites.

    Args:
        device: kind of device that the run computes on.
        config: its ``workers`` and ``devices``. ``auto`` means on CUDA all devices and one worker on each, on the CPU
            as many workers as there are cores for, elsewhere one worker.
        threads: of one site.
        cores: that this process may use.
        sites: number of sites in the run.

    Raises:
        ConfigError: a device in ``devices`` does not exist.
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
