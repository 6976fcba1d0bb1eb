"""A tiny federation: random foundation, tiny sites on disk, one worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, TrainingConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import manifest_digest
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.messages.codec import Message, decode
from fedsca_pipeline.federation.server.checkpoint import Checkpoint, CheckpointFolder
from fedsca_pipeline.federation.server.records import RoundRecord
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.steps import LocalSettings
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.layout import TensorLayout

SIDE = 32
ADAPTERS = AdaptersConfig(width=4)


def _write_site(
    folder: Path, name: str, seed: int = 0, training: int = 5, labels: Sequence[int] = (1,)
) -> tuple[Path, pd.DataFrame]:
    draw = np.random.default_rng(seed)
    count = training + 3
    images = draw.integers(0, 100, (count, 3, SIDE, SIDE), dtype=np.uint8)
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for index in range(count):
        top, left = draw.integers(0, SIDE // 2, 2)
        masks[index, top : top + 10, left : left + 10] = labels[index % len(labels)]
        images[index, :, masks[index] > 0] += 120
    sizes = np.full((count, 2), SIDE, np.int32)
    path = folder / f"{name}.safetensors"
    splits = ["train"] * training + ["validation"] * 2 + ["test"]
    stems = [f"{index:03d}" for index in range(count)]
    manifest = pd.DataFrame(
        {
            "site": name,
            "subject": stems,
            "image": [f"images/{stem}.png" for stem in stems],
            "split": splits,
            "classes": [f"[{labels[index % len(labels)] or ''}]" for index in range(count)],
            "height": SIDE,
            "width": SIDE,
            "row": range(count),
        }
    )
    arrays = {"images": images, "masks": masks, "sizes": sizes, "manifest": manifest_digest(manifest)}
    save_file(arrays, path)
    return path, manifest


@pytest.fixture
def write_site(tmp_path: Path) -> Callable[..., tuple[Path, pd.DataFrame]]:
    """Write one site of bright squares on noise, with 2 validation images and 1 for test; return file and manifest.

    The squares are of the classes ``labels``, in turn.
    """
    return partial(_write_site, tmp_path)


@pytest.fixture
def make_site(write_site: Callable[..., tuple[Path, pd.DataFrame]]) -> Callable[..., SiteArrays]:
    """Write one site (see ``write_site``) and open it."""
    return lambda name, seed=0, **options: SiteArrays(*write_site(name, seed, **options))


@pytest.fixture(scope="session")
def make_worker() -> Callable[..., LocalWorker]:
    """Build a worker on a fresh random foundation; keyword arguments go to the training parameters."""

    def make(
        strategy: str = "fedsca",
        wire_dtype: str = "fp32",
        adapters: AdaptersConfig | None = None,
        cache_bytes: int = 0,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        classes: int = 1,
        head: str = "sigmoid",
        run: str = "run",
        **training: Any,
    ) -> LocalWorker:
        model = _model(adapters, classes, head)
        alike = LocalSettings(
            run=run,
            seed=0,
            classes=classes,
            wire_dtype=wire_dtype,
            evaluation_batch=4,
            threshold=0.5,
            training=TrainingConfig(**training),
            cache_bytes=cache_bytes,
            **settings or {},
        )
        layout = tensor_layout(model)
        return LocalWorker(model, build_strategy(strategy, options or {}, layout), alike)

    return make


def _model(adapters: AdaptersConfig | None, classes: int = 1, head: str = "sigmoid") -> SegmentationModel:
    foundation = FoundationConfig(name="random", head=head)
    model = load_foundation(foundation, Path("unused"), image_size=SIDE, classes=classes)
    return attach_adapters(model, adapters or ADAPTERS)


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., TensorLayout]:
    """Return the layout of a fresh model; a worker's own model may have frozen tensors."""

    @cache
    def layout(adapters: str) -> TensorLayout:
        return tensor_layout(_model(AdaptersConfig.model_validate_json(adapters)))

    return lambda adapters=None: layout((adapters or ADAPTERS).model_dump_json())


@dataclass
class Federation:
    """One run in this process: its messages, and what it stored."""

    worker: LocalWorker
    layout: TensorLayout
    fleet: InProcessFleet
    folder: Path
    lost: Mapping[str, Sequence[int]] = field(default_factory=dict)
    records: list[RoundRecord] = field(default_factory=list)
    sent: dict[tuple[int, str], Message] = field(default_factory=dict)
    replies: dict[tuple[int, str], Message] = field(default_factory=dict)

    def sites(self) -> Sequence[str]:
        return self.fleet.sites()

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **rest: Any) -> Mapping[str, bytes | Failure]:
        answers = self.fleet.exchange(round_, payloads, **rest) | {
            site: Failure("no answer in time") for site, rounds in self.lost.items() if round_ in rounds
        }
        self.sent |= {(round_, site): decode(payload) for site, payload in payloads.items()}
        self.replies |= {(round_, s): decode(a) for s, a in answers.items() if not isinstance(a, Failure)}
        return answers

    def store(self, site: str) -> SiteStore:
        return self.fleet.store(site)

    def checkpoint(self) -> Checkpoint:
        return CheckpointFolder(self.folder / "server", self.worker.settings.run).latest()

    def last(self, site: str) -> dict[str, torch.Tensor]:
        """Return the tensors of the site's last validated model."""
        return self.store(site).snapshot("last").tensors

    def bits(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the run: messages, last models and the checkpoint."""
        said = {
            f"{kind}/{place}/{name}": tensor
            for kind, messages in (("sent", self.sent), ("replies", self.replies))
            for place, message in messages.items()
            for name, tensor in message.tensors.items()
        }
        kept = {f"last/{site}/{name}": tensor for site in self.sites() for name, tensor in self.last(site).items()}
        checkpoint = self.checkpoint()
        return {**said, **kept, "aggregates": checkpoint.aggregates, "local_models": checkpoint.state.local_models}


def _federation(
    make_worker: Callable[..., LocalWorker], make_layout: Callable[..., TensorLayout], root: Path
) -> Callable[..., Federation]:
    """Return ``federate``; its sites and runs are in ``root`` unless a call says otherwise."""

    def federated(
        strategy: str,
        options: Mapping[str, Any] | None = None,
        *,
        rounds: int = 2,
        wire_dtype: str = "fp32",
        data: Mapping[str, Any] | None = None,
        absent: Mapping[str, Sequence[int]] | None = None,
        lost: Mapping[str, Sequence[int]] | None = None,
        folder: Path | None = None,
        adapters: AdaptersConfig | None = None,
        change: Callable[[LocalWorker], None] = lambda worker: None,
        run: str = "run",
        **worker_options: Any,
    ) -> Federation:
        worker = make_worker(strategy, wire_dtype, adapters=adapters, options=options, run=run, **worker_options)
        change(worker)
        data = data or {name: SiteArrays(*_write_site(root, name, seed)) for seed, name in enumerate(("a", "b"))}
        folder = folder or root / f"run_{len(list(root.glob('run_*')))}"
        folder.mkdir(exist_ok=True)
        fleet = InProcessFleet(worker, data, folder / "sites", absent or {})
        found = Federation(worker, make_layout(adapters), fleet, folder, lost or {})
        config = FederationConfig(rounds=rounds, wire_dtype=wire_dtype)
        checkpoints = CheckpointFolder(folder / "server", run, folder / "sites")
        server = Server(found, worker.strategy, worker.initial, config, run=run, seed=0, folder=checkpoints)
        found.records += server.rounds()
        return found

    return federated


@pytest.fixture
def federate(make_worker, make_layout, tmp_path: Path) -> Callable[..., Federation]:
    """Return a function that runs a federation of tiny sites in this process, or resumes that of ``folder``.

    Sites do no work in the rounds in which they are ``absent``; in those in which they are ``lost`` they work, and
    their answer does not arrive.
    Other keywords are ``make_worker``'s.
    """
    return _federation(make_worker, make_layout, tmp_path)


@pytest.fixture(scope="module")
def federate_once(make_worker, make_layout, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Federation]:
    """Return ``federate`` for runs that several tests of a file only read."""
    return _federation(make_worker, make_layout, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def three_sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteArrays]:
    """Sites a, b and c, which several tests of a file only read."""
    root = tmp_path_factory.mktemp("sites")
    return {name: SiteArrays(*_write_site(root, name, seed)) for seed, name in enumerate("abc")}
