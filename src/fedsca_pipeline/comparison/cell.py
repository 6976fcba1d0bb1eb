"""Run one cell of the grid: train, test at every site and at unseen ones, and return a small result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsca_pipeline.comparison.peak_memory import PeakMemory
from fedsca_pipeline.comparison.plan import THREADS, Cell
from fedsca_pipeline.compute import deterministic, device_of_worker, stream_seed
from fedsca_pipeline.config import RunConfig, Settings
from fedsca_pipeline.data.arrays import Arrays, PooledArrays, SiteArrays, known_classes, scored_classes
from fedsca_pipeline.errors import DataError, counted
from fedsca_pipeline.evaluation.scoring import score_batches
from fedsca_pipeline.federation.fleets.data import POOLED
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.records import RoundRecord
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.setup import set_up
from fedsca_pipeline.federation.site.batches import plain_batches
from fedsca_pipeline.federation.site.store import SiteStore, Snapshot
from fedsca_pipeline.files import remove_partial_files
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.heads import known_logits
from fedsca_pipeline.model.inference import Forward, image_forward, predict_logits
from fedsca_pipeline.model.layout import unflatten

Result = dict[str, Any]
OnRound = Callable[[int, int], None]
"""Callback after each round: number of finished rounds, number of all rounds."""

# Largest share of an unseen site's images that tuning may use (docs/comparison.md).
_LARGEST_SHOT = 0.4
# Decimals of the numbers in a result.
_DIGITS = 5


@dataclass(frozen=True)
class CellInputs:
    """Inputs of every cell: the sites' arrays, the folders of foundations and of checkpoints, and the code version.

    ``worker`` is the number of the process among those that run cells; it decides on which GPU they run.
    """

    arrays: Mapping[str, SiteArrays]
    foundations: Path
    scratch: Path
    code: str
    worker: int = 0


def run_cell(cell: Cell, inputs: CellInputs, on_round: OnRound) -> Result:
    """Train a cell and return its result: JSON values of some kB.

    A run resumes from the checkpoint that a killed attempt with the same code left under ``inputs.scratch``. A finished
    cell leaves no file there.

    Raises:
        DataError: a site has no test image.
        FedscaError: training fails.
    """
    for site in cell.sites:
        if not len(inputs.arrays[site].rows("test")):
            raise DataError(f"{site}: no test image; raise preprocessing.split.test, or leave the site out")
    started = time.process_time()
    # A cell never resumes from another code version's checkpoint: its numbers would belong to neither version.
    folder = inputs.scratch / cell.fingerprint / inputs.code
    run = RunConfig(device=cell.description["device"])
    number = device_of_worker(run.device, inputs.worker).index
    with _tidy(folder), PeakMemory() as peak, deterministic(run, THREADS, number) as device:
        trained = _Training(cell, inputs, folder, device)
        records = trained.run(on_round)
        result: Result = {
            "fingerprint": cell.fingerprint,
            "code": inputs.code,
            "description": dict(cell.description),
            "method": cell.method,
            "left_out": cell.left_out,
            "sites": {site: trained.at_site(site) for site in cell.sites},
            "rounds": [_round(record) for record in records],
            "traffic": traffic(records, len(cell.sites)),
            "unseen": {site: trained.at_unseen(site) for site in cell.unseen},
        }
    result |= {"seconds": round(time.process_time() - started, 1), "peak_memory": peak.bytes}
    shutil.rmtree(folder.parent, ignore_errors=True)
    return result


@contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """Remove partial files in the folder, before the block and after it."""
    remove_partial_files(folder)
    try:
        yield
    finally:
        remove_partial_files(folder)


def training_rows(arrays: Arrays, site: str, seed: int, count: int | None) -> list[int]:
    """Return the rows a cell trains on: ``count`` of the site's training images, the same for all methods of a seed.

    With the same seed, a larger count contains the images of a smaller one. None, or a count above the site's number
    of training images, returns all.
    """
    rows = arrays.rows("train")
    order = np.random.default_rng(stream_seed(seed, site, "training images")).permutation(rows)
    return sorted(int(row) for row in order[:count])


def unseen_halves(arrays: SiteArrays, site: str, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows of an unseen site to test on, and those to draw labelled images from, in the order of drawing.

    The halves do not depend on the seed, and all slices of a volume are in one half. The seed decides the order of
    drawing only; k images are the first k.
    """
    files = arrays.files()
    order = np.random.default_rng(stream_seed(site, "unseen half")).permutation(len(files))
    parts = order[: len(order) // 2], order[len(order) // 2 :]
    test, rest = ([row for file in part for row in files[file]] for part in parts)
    draw = np.random.default_rng(stream_seed(seed, site, "shots")).permutation(rest)
    return sorted(map(int, test)), [int(row) for row in draw]


def traffic(records: Sequence[RoundRecord], sites: int) -> dict[str, float | None]:
    """Return the mean bytes per site and training round, up and down, and all bytes until 95 % of the best Dice.

    The Dice is the mean validation Dice. ``bytes_to_95`` includes the whole round whose models reach it; it is None
    without validation Dice.
    """
    training = [record for record in records if not record.final]
    up, down = (
        [sum(getattr(entry, key) for entry in record.sites.values()) for record in training]
        for key in ("bytes_up", "bytes_down")
    )
    # A round's record has the Dice of the models before that round's training.
    reached = {
        record.round - 1: dice for record in records if (dice := _mean_dice(record)) is not None and record.round > 1
    }
    totals = list(accumulate(a + b for a, b in zip(up, down, strict=True)))
    enough = [round_ for round_, dice in reached.items() if dice >= 0.95 * max(reached.values())]
    return {
        "bytes_up": sum(up) / len(up) / sites,
        "bytes_down": sum(down) / len(down) / sites,
        "bytes_to_95": float(totals[min(enough) - 1]) if enough else None,
    }


class _Training:
    """The federation of one cell in this process, and its models."""

    def __init__(self, cell: Cell, inputs: CellInputs, folder: Path, device: torch.device) -> None:
        settings = Settings(**cell.description["configuration"], run=RunConfig(seed=cell.seed))
        setup = set_up(settings, inputs.foundations, run=cell.fingerprint, sites=len(cell.sites))
        self.cell, self.inputs, self.folder = cell, inputs, folder
        self.preprocessing, self.evaluation = settings.preprocessing, settings.evaluation
        self.federation = setup.settings.federation
        self.strategy, self.layout = setup.strategy, setup.layout
        self.unseen = cell.description["unseen"]
        self.data: dict[str, Arrays] = {site: self._arrays(site) for site in cell.sites}
        classes = self.preprocessing.classes
        self.known = {site: known_classes(arrays, classes) for site, arrays in self.data.items()}
        self.known_anywhere = tuple(sorted(set().union(*self.known.values())))
        if self.strategy.pools:
            lengths = [len(inputs.arrays[site]) for site in cell.sites]
            self.data = {POOLED: PooledArrays(list(self.data.values()), lengths)}
        self.worker = setup.worker(device)
        self.forward = image_forward(self.worker.model)

    def run(self, on_round: OnRound) -> list[RoundRecord]:
        """Run all rounds and return their records."""
        server = Server(
            InProcessFleet(
                self.worker,
                self.data,
                self.folder / "sites",
                self.federation.inject_failures,
                private=self.folder / "private",
            ),
            self.strategy,
            self.worker.initial,
            self.federation,
            run=self.cell.fingerprint,
            seed=self.cell.seed,
            folder=CheckpointFolder(self.folder / "server", self.cell.fingerprint, self.folder / "sites"),
        )
        records = []
        for record in server.rounds():
            records.append(record)
            on_round(min(record.round, self.federation.rounds), self.federation.rounds)
        return records

    def at_site(self, site: str) -> Result:
        """Return the chosen model's scores on the site's test images, with its round and validation Dice."""
        snapshot = self._chosen(site)
        self.worker.install(snapshot.tensors)
        arrays = self.inputs.arrays[site]
        batches = plain_batches(arrays, "test", self.evaluation.batch_size)
        found = self._scores(arrays, "test", batches, self.known[site])
        return {"round": snapshot.round, "dice_validation": snapshot.dice, **found}

    def at_unseen(self, site: str) -> dict[str, Result]:
        """Return the scores at a site that did not train, by what it received (docs/comparison.md)."""
        test, drawn = unseen_halves(self.inputs.arrays[site], site, self.cell.seed)
        arrays = self.inputs.arrays[site].with_splits({"test": test})
        general = self._general()
        found: dict[str, Result] = {}
        batches = list(plain_batches(arrays, "test", self.evaluation.batch_size))
        if set(self.layout.decoder) <= set(self.strategy.shared()) or self.strategy.pools:
            self.worker.install(general)
            found["as it is"] = self._scores(arrays, "test", batches, self.known_anywhere)
        if self.unseen["release_private"]:
            found["ensemble"] = self._ensemble(arrays, batches)
        for count in self.unseen["shots"]:
            if count > min(len(drawn), _LARGEST_SHOT * len(self.inputs.arrays[site])):
                continue
            labelled = arrays.with_splits({"train": drawn[:count]})
            tuned = self.worker.tune(labelled, general, self._private(), self.unseen["steps"], site=site)
            self.worker.install(tuned)
            known = known_classes(labelled, self.preprocessing.classes)
            found[counted(count, "image")] = self._scores(arrays, "test", batches, known)
        return found

    def _arrays(self, site: str) -> Arrays:
        arrays = self.inputs.arrays[site]
        rows = training_rows(arrays, site, self.cell.seed, self.cell.train_images)
        return arrays.with_splits({"train": rows, "validation": [int(row) for row in arrays.rows("validation")]})

    def _chosen(self, site: str) -> Snapshot:
        """Return the site's chosen model; for pooled data, the only one."""
        place = self.folder / "sites" / (POOLED if self.strategy.pools else site)
        snapshot = SiteStore(place, self.cell.fingerprint).snapshot("best")
        if snapshot is None:
            raise DataError(f"{site}: no chosen model, because the site missed every round with validation")
        return snapshot

    def _general(self) -> dict[str, Tensor]:
        """Return the start values with the mean of the latest local models; for pooled data, the chosen model."""
        if self.strategy.pools:
            return dict(self._chosen(POOLED).tensors)
        shapes = self.strategy.wire_shapes()
        latest = CheckpointFolder(self.folder / "server", self.cell.fingerprint).latest()
        if not shapes or latest is None:
            return dict(self.worker.initial)
        general = self.strategy.general_model(latest.state, self.federation.max_share)
        mixed = unflatten(general, tuple(shapes), shapes)
        return {name: mixed.get(name, start) for name, start in self.worker.initial.items()}

    def _private(self) -> tuple[str, ...]:
        """Return the tensors that an unseen site tunes: the private ones, or all trained ones if none is private."""
        trained, shared = self.strategy.trained(), set(self.strategy.shared())
        return tuple(name for name in trained if name not in shared) or trained

    def _ensemble(self, arrays: Arrays, batches: Sequence[Batch]) -> Result:
        """Return the scores of averaged probabilities; each class is averaged over the models that predict it."""
        model, head = self.worker.model, self.worker.model.head
        probability = torch.sigmoid if head == "sigmoid" else (lambda logits: logits.softmax(dim=1))
        known = dict.fromkeys(self.cell.sites, self.known_anywhere) if self.strategy.pools else self.known
        total: list[Tensor] = []
        for site in self.cell.sites:
            self.worker.install(self._chosen(site).tensors)
            given = [
                probability(known_logits(logits, head, known[site])).cpu()
                for _, logits in predict_logits(
                    model, self.forward, [batch.to(self.worker.device) for batch in batches]
                )
            ]
            total = [old + new for old, new in zip(total, given, strict=True)] if total else given
        models_by_class = [
            sum(label in labels for labels in known.values()) for label in range(1, self.preprocessing.classes + 1)
        ]
        background = [len(known)] if head == "softmax" else []
        models = torch.tensor([*background, *models_by_class]).clamp(min=1).view(1, -1, 1, 1)
        means = iter([part / models for part in total])
        # The inverse of the head, so that the usual threshold applies.
        to_logits = torch.logit if head == "sigmoid" else torch.log
        return self._scores(
            arrays, "test", batches, self.known_anywhere, lambda _: to_logits(next(means)).to(self.worker.device)
        )

    def _scores(
        self, arrays: Arrays, split: str, batches: Any, known: Sequence[int], forward: Forward | None = None
    ) -> Result:
        classes = self.preprocessing.classes
        scores = score_batches(
            self.worker.model,
            forward or self.forward,
            batches,
            classes,
            self.evaluation.threshold,
            known=known,
            scored=scored_classes(arrays, classes),
        )
        return _columns(arrays.names(split), scores, several=classes > 1)


def _columns(names: Sequence[str], scores: Sequence[Mapping[str, Any]], *, several: bool) -> Result:
    """Return images, and Dice and HD95 as means over the site's classes; with ``several``, also the Dice by class."""
    classes = len(scores) // max(len(names), 1)
    by_class: dict[str, list[float]] = {}
    for score in scores if several else ():
        by_class.setdefault(str(score["class"]), []).append(round(score["dice"], _DIGITS))
    means = {
        metric: np.array([score[metric] for score in scores]).reshape(len(names), classes).mean(axis=1)
        for metric in ("dice", "hd95")
    }
    return {
        "images": list(names),
        **{metric: [round(float(value), _DIGITS) for value in values] for metric, values in means.items()},
        **({"dice_by_class": by_class} if several else {}),
    }


def _round(record: RoundRecord) -> Result:
    """Return a round's entry in the result: what each site reports, and the matrices of similarity and weights."""
    keys = ("dice_validation", "dice_local", "loss", "self_weight", "update_norm", "spread")
    sites = {
        site: {key: round(value, _DIGITS) for key in keys if (value := getattr(entry, key)) is not None}
        for site, entry in record.sites.items()
    }
    matrices = {
        name: np.round(getattr(record, name).array.mean(axis=0, dtype=np.float64), 4).tolist()
        for name in ("similarity", "weights")
        if len(getattr(record, name))
    }
    return {
        "round": record.round,
        "final": record.final,
        "bytes": sum(entry.bytes_up + entry.bytes_down for entry in record.sites.values()),
        "accepted": list(record.accepted),
        "sites": sites,
        **matrices,
    }


def _mean_dice(record: RoundRecord) -> float | None:
    known = [entry.dice_validation for entry in record.sites.values() if entry.dice_validation is not None]
    return sum(known) / len(known) if known else None
