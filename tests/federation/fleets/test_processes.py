from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsca_pipeline.compute import deterministic, resolve_device
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, RunConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.fleets.data import SiteData
from fedsca_pipeline.federation.fleets.fleet import Failure, Fleet
from fedsca_pipeline.federation.fleets.in_process import LocalSites
from fedsca_pipeline.federation.fleets.registry import FLEETS, open_fleet
from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.steps import ignore_step
from fedsca_pipeline.model.layout import hash_tensors

SITES = ("a", "b", "c")
PROCESSES = {"fleet": "processes", "workers": 2}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with deterministic(RunConfig(device="cpu"), 1):
        yield


@pytest.fixture
def sources(write_site) -> dict[str, Any]:
    """Three sites, the last in the alphabet with most training images."""
    return {name: write_site(name, seed, training=4 + seed) for seed, name in enumerate(SITES)}


@pytest.fixture
def here(make_worker, sources, tmp_path: Path) -> Callable[..., LocalSites]:
    """Return a function that makes local sites with a fresh model and their states in a folder."""

    def make(folder: str = "states", device: str = "cpu", **options: Any) -> LocalSites:
        worker = make_worker(**options)
        return LocalSites(
            worker.model,
            worker.strategy,
            worker.settings,
            SiteData(sources),
            tmp_path / folder,
            torch.device(device),
            threads=1,
        )

    return make


@pytest.fixture
def opened() -> Iterator[Callable[..., Fleet]]:
    """Return a function that opens a fleet, which is closed after the test."""
    with ExitStack() as stack:

        def open_(sites: LocalSites, on_step=ignore_step, **config: Any) -> Fleet:
            return stack.enter_context(open_fleet(FederationConfig(**{**PROCESSES, **config}), sites, on_step))

        yield open_


def start_values(sites: LocalSites) -> dict[str, torch.Tensor]:
    named = dict(sites.model.named_parameters())
    return {name: named[name].detach().clone() for name in sites.strategy.layout.shapes}


def payloads(sites: LocalSites, names=SITES, *, value: float | None = None, addressed: str = "") -> dict[str, bytes]:
    """Return first-round messages of start values, or of ``value`` everywhere; ``addressed`` names another site."""
    start = start_values(sites)
    shared = {name: start[name] for name in sites.strategy.shared()}
    if value is not None:
        shared = {name: torch.full_like(tensor, value) for name, tensor in shared.items()}
    made = {}
    for site in names:
        manifest = Manifest(
            kind="aggregate", run="run", round=1, site=addressed or site, base_hash=hash_tensors(shared), samples=0,
            dtype="fp32", relative=False, metrics={},
        )  # fmt: skip
        made[site] = encode(manifest, shared)
    return made


def exchange(fleet: Fleet, sent: dict[str, bytes], round_: int = 1) -> dict[str, bytes | Failure]:
    return dict(fleet.exchange(round_, sent, deadline=None, quorum=1, grace=0.0))


def workers() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


def tensors(answer: bytes | Failure) -> dict[str, torch.Tensor]:
    assert isinstance(answer, bytes), answer
    return dict(decode(answer).tensors)


@pytest.mark.parametrize(
    "adapters",
    [
        AdaptersConfig(width=4),
        AdaptersConfig(method="lora", options={"r": 2, "lora_dropout": 0.5}),
        AdaptersConfig(method="vera", options={"r": 2}),
    ],
    ids=lambda adapters: adapters.method,
)
def test_a_run_gives_the_same_bits_in_one_process_and_in_several(here, opened, tmp_path: Path, adapters) -> None:
    results = []
    for name in sorted(FLEETS.keys() - {"flower"}):
        sites = here(name, adapters=adapters)
        start = start_values(sites)
        server = Server(
            opened(sites, fleet=name),
            sites.strategy,
            start,
            FederationConfig(rounds=2, wire_dtype="fp32"),
            run="run",
            seed=0,
            folder=CheckpointFolder(tmp_path / f"server_{name}", "run"),
        )
        list(server.rounds())
        files = {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        results.append((CheckpointFolder(tmp_path / f"server_{name}", "run").latest().aggregates, files))

    (aggregates, files), (others, other_files) = results
    assert torch.equal(aggregates, others)
    assert len(files) > len(SITES)
    assert files == other_files


def test_the_foundation_is_in_memory_once_and_does_not_change(here, opened) -> None:
    sites = here()
    fleet = opened(sites)
    before = {name: tensor.clone() for name, tensor in sites.model.named_parameters()}

    exchange(fleet, payloads(sites))

    assert len({tensor.untyped_storage().data_ptr() for tensor in sites.model.parameters()}) == 1
    assert all(tensor.is_shared() for tensor in sites.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sites.model.named_parameters())


def test_the_site_with_most_training_images_goes_first(here, opened) -> None:
    order: list[str] = []
    sites = here()

    exchange(opened(sites, lambda site, *_: order.append(site), workers=1), payloads(sites))

    assert list(dict.fromkeys(order)) == ["c", "b", "a"]


def test_the_steps_of_every_site_are_reported_up_to_its_last(here, opened) -> None:
    steps: dict[str, list[tuple[int, int]]] = {"a": [], "b": [], "c": []}
    sites = here()

    exchange(opened(sites, lambda site, step, of, loss: steps[site].append((step, of))), payloads(sites))

    counts = {"a": 2, "b": 3, "c": 3}
    assert {site: reported[-1] for site, reported in steps.items()} == {s: (n, n) for s, n in counts.items()}
    assert all(reported == sorted(set(reported)) for reported in steps.values())


def kill_on_step(victim: str, times: int) -> tuple[list[int], Callable[..., None]]:
    """Return the workers killed so far, and a callback that kills the only worker on the victim's first steps."""
    killed: list[int] = []

    def on_step(site: str, step: int, steps: int, loss: float) -> None:
        (worker,) = workers()
        if site == victim and step == 1 and worker not in killed and len(killed) < times:
            killed.append(worker)
            os.kill(worker, signal.SIGKILL)

    return killed, on_step


def test_a_worker_that_dies_is_replaced_and_its_site_tried_again(here, opened, caplog) -> None:
    undisturbed = here("undisturbed")
    expected = exchange(opened(undisturbed, fleet="in_process"), payloads(undisturbed))
    killed, on_step = kill_on_step("b", times=1)
    sites = here()

    answers = exchange(opened(sites, on_step, workers=1), payloads(sites))

    assert len(killed) == 1
    assert workers().isdisjoint(killed)
    assert "b, round 1: its worker died (exit code -9)" in caplog.text
    for site in SITES:
        theirs = tensors(expected[site])
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(answers[site]).items())


def test_a_site_whose_worker_dies_twice_is_absent_and_the_others_are_not(here, opened, tmp_path: Path) -> None:
    killed, on_step = kill_on_step("b", times=2)
    sites = here()

    answers = exchange(opened(sites, on_step, workers=1), payloads(sites))

    assert len(killed) == 2
    assert answers["b"] == Failure("its worker died twice (exit code -9)")
    assert all(tensors(answers[site]) for site in ("a", "c"))
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_worker_that_died_between_two_rounds_is_replaced(here, opened) -> None:
    sites = here()
    fleet = opened(sites, workers=1)
    exchange(fleet, payloads(sites, ("a",)))
    (worker,) = workers()
    os.kill(worker, signal.SIGKILL)

    assert tensors(exchange(fleet, payloads(sites, ("a",)))["a"])


def test_a_site_s_own_errors_are_failures_and_are_logged_here(here, opened, caplog) -> None:
    sites = here()

    answers = exchange(opened(sites), {**payloads(sites, ("a",), value=1e38), **payloads(sites, ("b",), addressed="c")})

    assert "not finite in round 1" in answers["a"].reason
    assert "site" in answers["b"].reason
    assert {record.levelno for record in caplog.records if "not finite" in record.message} == {logging.WARNING}


def test_an_injected_failure_is_a_failure(here, opened) -> None:
    sites = here()

    answers = exchange(opened(sites, inject_failures={"a": [1]}), payloads(sites, ("a", "b")))

    assert isinstance(answers["a"], Failure)
    assert tensors(answers["b"])


def test_any_other_error_is_raised_here_and_names_the_site(here, opened, tmp_path: Path) -> None:
    sites = here()
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "b").write_text("no folder")

    with pytest.raises(OSError, match="b") as raised:
        exchange(opened(sites), payloads(sites))

    assert "In b, round 1:" in raised.value.__notes__[0]


def test_leaving_the_fleet_ends_its_workers_at_once_even_at_work(here) -> None:
    sites = here(local_epochs=100)

    class Interrupted(BaseException):
        """Stands for Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    with pytest.raises(Interrupted), open_fleet(FederationConfig(**PROCESSES), sites, interrupt) as fleet:
        assert len(workers()) == 2
        exchange(fleet, payloads(sites))

    assert workers() == set()


def test_only_data_in_use_is_open(here, sources) -> None:
    data = SiteData(sources)

    def mapped() -> str:
        return Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").is_file():
        pytest.skip("this system does not list what is mapped")
    path = str(sources["a"][0])
    assert path not in mapped()
    arrays = data["a"]
    assert path in mapped()
    del arrays
    assert path not in mapped()


def test_a_device_that_does_not_exist_is_named(here, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="numbers CUDA devices, but this run is on cpu"):
        open_fleet(FederationConfig(**PROCESSES, devices=[1]), here(), ignore_step)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="no CUDA device 2 here, only 0 to 1"):
        open_fleet(FederationConfig(**PROCESSES, devices=[0, 2]), here(device="cuda"), ignore_step)


def test_too_little_shared_memory_is_an_error_with_a_cure(here, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)

    with pytest.raises(ConfigError, match="enlarge /dev/shm"):
        open_fleet(FederationConfig(**PROCESSES), here(), ignore_step)


@pytest.mark.parametrize("per_device", [1, 2])
def test_workers_compute_on_cuda(here, opened, per_device: int) -> None:
    try:
        device = resolve_device("cuda")
    except ConfigError as error:
        pytest.skip(str(error))  # says that there is none here
    sites = here(device=device.type)
    count = per_device * torch.cuda.device_count()

    answers = exchange(opened(sites, workers="auto" if per_device == 1 else count), payloads(sites))

    assert len(workers()) == min(count, len(SITES))
    assert all(tensors(answers[site]) for site in SITES)
    assert not torch.cuda.is_initialized()
