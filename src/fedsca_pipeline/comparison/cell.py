"""One cell of the grid: train, test at every site, test at unseen ones, and leave nothing but a small result."""

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
from fedsca_pipeline.compute import deterministic, stream_seed
from fedsca_pipeline.config import RunConfig, Settings
from fedsca_pipeline.data.arrays import Arrays, PooledArrays, SiteArrays, known_classes, scored_classes
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.evaluation.scoring import score_batches
from fedsca_pipeline.federation.fleets.data import POOLED
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder, RoundRecord
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.setup import set_up
from fedsca_pipeline.federation.site.batches import plain_batches
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.files import remove_partial_files
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.heads import known_logits
from fedsca_pipeline.model.inference import Forward, image_forward, predict_logits
from fedsca_pipeline.model.layout import unflatten

Result = dict[str, Any]
Told = Callable[[int, int], None]
"""Is told of rounds done, and of how many there are."""

_LARGEST_SHOT = 0.4  # of an unseen site's images (docs/comparison.md)
_DIGITS = 5


@dataclass(frozen=True)
class Place:
    """Where cells find what they need: sites' arrays and manifests, foundations, and room for checkpoints.

    ``code`` is the version of the code that is at work, which results tell.
    """

    arrays: Mapping[str, SiteArrays]
    foundations: Path
    scratch: Path
    code: str


def run_cell(cell: Cell, place: Place, told: Told) -> Result:
    """Train a cell, or what is left of it, and return its result: JSON values, some kB.

    What a killed attempt of the same code has left under ``place.scratch`` is gone on from; when the cell is done,
    nothing is left.

    Raises:
        DataError: a site has no test image.
        FedscaError: whatever training raises.
    """
    for site in cell.sites:
        if not len(place.arrays[site].rows("test")):
            raise DataError(f"{site}: no test image; raise preprocessing.split.test, or leave the site out")
    started = time.process_time()
    # A cell that one version of the code began and another one ended would be of neither.
    folder = place.scratch / cell.fingerprint / place.code
    run = RunConfig(device=cell.description["device"])
    with _tidy(folder), PeakMemory() as peak, deterministic(run, THREADS) as device:
        trained = _Training(cell, place, folder, device)
        records = trained.run(told)
        result = {
            "fingerprint": cell.fingerprint,
            "code": place.code,
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
    """Remove, before the block and however it ends, what sites keep for its duration only."""
    remove_partial_files(folder)
    try:
        yield
    finally:
        remove_partial_files(folder)


def training_rows(arrays: Arrays, site: str, seed: int, count: int | None) -> list[int]:
    """Return the rows a cell trains on: ``count`` of the site's training images, the same for all methods of a seed.

    More images of the same seed contain the fewer. None, or a count the site does not reach: all.
    """
    rows = arrays.rows("train")
    order = np.random.default_rng(stream_seed(seed, site, "training images")).permutation(rows)
    return sorted(int(row) for row in order[:count])


def unseen_halves(arrays: SiteArrays, site: str, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows of an unseen site to test on, and those to draw labelled images from, in the order of drawing.

    The halves are fixed, and a volume is in one of them; the seed decides the draw alone, of which k images are always
    the first k.
    """
    files = arrays.files()
    order = np.random.default_rng(stream_seed(site, "unseen half")).permutation(len(files))
    parts = order[: len(order) // 2], order[len(order) // 2 :]
    test, rest = ([row for file in part for row in files[file]] for part in parts)
    draw = np.random.default_rng(stream_seed(seed, site, "shots")).permutation(rest)
    return sorted(map(int, test)), [int(row) for row in draw]


def traffic(records: Sequence[RoundRecord], sites: int) -> dict[str, float | None]:
    """Return mean bytes a site and training round each way, and all bytes until 95 % of the best validation Dice.

    The round whose model reaches it is counted whole; None where there is no validation Dice.
    """
    training = [record for record in records if not record.final]
    up, down = (
        [sum(getattr(entry, key) for entry in record.sites.values()) for record in training]
        for key in ("bytes_up", "bytes_down")
    )
    # A record's Dice is of the models before its training.
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
    """A cell's federation on this machine, and its models."""

    def __init__(self, cell: Cell, place: Place, folder: Path, device: torch.device) -> None:
        settings = Settings(**cell.description["configuration"], run=RunConfig(seed=cell.seed))
        setup = set_up(settings, place.foundations, run=cell.fingerprint, sites=len(cell.sites))
        self.cell, self.place, self.folder = cell, place, folder
        self.preprocessing, self.evaluation = settings.preprocessing, settings.evaluation
        self.federation = setup.settings.federation
        self.strategy, self.layout = setup.strategy, setup.layout
        self.unseen = cell.description["unseen"]
        self.data: dict[str, Arrays] = {site: self._arrays(site) for site in cell.sites}
        classes = self.preprocessing.classes
        self.known = {site: known_classes(arrays, classes) for site, arrays in self.data.items()}
        self.known_anywhere = tuple(sorted(set().union(*self.known.values())))
        if self.strategy.pools:
            lengths = [len(place.arrays[site]) for site in cell.sites]
            self.data = {POOLED: PooledArrays(list(self.data.values()), lengths)}
        self.worker = setup.worker(device)
        self.forward = image_forward(self.worker.model)

    def run(self, told: Told) -> list[RoundRecord]:
        """Run the rounds; return their records."""
        server = Server(
            InProcessFleet(
                self.worker,
                self.data,
                self.folder / "sites",
                self.federation.inject_failures,
                private=self.folder / "private",
            ),
            self.strategy,
            self.layout,
            self.worker.initial,
            self.federation,
            run=self.cell.fingerprint,
            seed=self.cell.seed,
            folder=CheckpointFolder(self.folder / "server"),
        )
        records = []
        for record in server.rounds():
            records.append(record)
            told(min(record.round, self.federation.rounds), self.federation.rounds)
        return records

    def at_site(self, site: str) -> Result:
        """Return the chosen model's scores on the site's test images, with its round and validation Dice."""
        snapshot = self._store(site).snapshot("best")
        if snapshot is None:
            raise DataError(f"{site}: it missed the rounds that would have made it a model")
        self.worker.install(snapshot.tensors)
        arrays = self.place.arrays[site]
        batches = plain_batches(arrays, "test", self.evaluation.batch_size)
        found = self._scores(arrays, "test", batches, self.known[site])
        return {"round": snapshot.round, "dice_validation": snapshot.dice, **found}

    def at_unseen(self, site: str) -> dict[str, Result]:
        """Return scores at a site that did not train, by what it received (docs/comparison.md)."""
        test, drawn = unseen_halves(self.place.arrays[site], site, self.cell.seed)
        arrays = self.place.arrays[site].with_splits({"test": test})
        general = self._general()
        found: dict[str, Result] = {}
        batches = list(plain_batches(arrays, "test", self.evaluation.batch_size))
        if set(self.layout.decoder) <= set(self.strategy.shared()) or self.strategy.pools:
            self.worker.install(general)
            found["as it is"] = self._scores(arrays, "test", batches, self.known_anywhere)
        if self.unseen["release_private"]:
            found["ensemble"] = self._ensemble(arrays, batches)
        for count in self.unseen["shots"]:
            if count > min(len(drawn), _LARGEST_SHOT * len(self.place.arrays[site])):
                continue
            labelled = arrays.with_splits({"train": drawn[:count]})
            tuned = self.worker.tune(labelled, general, self._private(), self.unseen["steps"], site=site)
            self.worker.install(tuned)
            known = known_classes(labelled, self.preprocessing.classes)
            found["1 image" if count == 1 else f"{count} images"] = self._scores(arrays, "test", batches, known)
        return found

    def _arrays(self, site: str) -> Arrays:
        arrays = self.place.arrays[site]
        rows = training_rows(arrays, site, self.cell.seed, self.cell.train_images)
        return arrays.with_splits({"train": rows, "validation": [int(row) for row in arrays.rows("validation")]})

    def _store(self, site: str) -> SiteStore:
        return SiteStore(self.folder / "sites" / (POOLED if self.strategy.pools else site))

    def _general(self) -> dict[str, Tensor]:
        """The mean of the latest local models over the start values; a pooled site's chosen model."""
        if self.strategy.pools:
            return dict(self._store(POOLED).snapshot("best").tensors)
        shapes = self.strategy.wire_shapes()
        latest = CheckpointFolder(self.folder / "server").latest()
        if not shapes or latest is None:
            return dict(self.worker.initial)
        mixed = unflatten(self.strategy.general_model(latest.state), tuple(shapes), shapes)
        return {name: mixed.get(name, start) for name, start in self.worker.initial.items()}

    def _private(self) -> tuple[str, ...]:
        """What an unseen site tunes: what sites keep to themselves; all that is trained where that is nothing."""
        trained, shared = self.strategy.trained(), set(self.strategy.shared())
        return tuple(name for name in trained if name not in shared) or trained

    def _ensemble(self, arrays: Arrays, batches: Sequence[Batch]) -> Result:
        """Average the probabilities of the sites' chosen models, of a class those of the models that know it."""
        model, head = self.worker.model, self.worker.model.head
        probability = torch.sigmoid if head == "sigmoid" else (lambda logits: logits.softmax(dim=1))
        known = dict.fromkeys(self.cell.sites, self.known_anywhere) if self.strategy.pools else self.known
        total: list[Tensor] = []
        for site in self.cell.sites:
            self.worker.install(self._store(site).snapshot("best").tensors)
            given = [
                probability(known_logits(logits, head, known[site])).cpu()
                for _, logits in predict_logits(model, self.forward, self._here(batches))
            ]
            total = [old + new for old, new in zip(total, given, strict=True)] if total else given
        knowing = [
            sum(label in labels for labels in known.values()) for label in range(1, self.preprocessing.classes + 1)
        ]
        models = torch.tensor([*([len(known)] if head == "softmax" else []), *knowing]).clamp(min=1).view(1, -1, 1, 1)
        means = iter([part / models for part in total])
        # The inverse of the head, so that masks are cut at the same threshold.
        back = torch.logit if head == "sigmoid" else torch.log
        return self._scores(
            arrays, "test", batches, self.known_anywhere, lambda _: back(next(means)).to(self.worker.device)
        )

    def _here(self, batches: Sequence[Batch]) -> list[Batch]:
        return [batch.to(self.worker.device) for batch in batches]

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
    """Return images, dice and hd95, each averaged over the classes that the site has, of several the Dice of each."""
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
    """Return what is kept of a round: means and what each site reports, the weights and similarities of all."""
    keys = ("dice_validation", "dice_local", "loss", "self_weight", "update_norm", "spread")
    sites = {
        site: {key: round(value, _DIGITS) for key in keys if (value := getattr(entry, key)) is not None}
        for site, entry in record.sites.items()
    }
    everyone = record.sites.values()
    matrices = {
        name: np.round(np.mean(getattr(record, name), axis=0), 4).tolist()
        for name in ("similarity", "weights")
        if len(getattr(record, name))
    }
    return {
        "round": record.round,
        "final": record.final,
        "bytes": sum(entry.bytes_up + entry.bytes_down for entry in everyone),
        "accepted": list(record.accepted),
        "sites": sites,
        **matrices,
    }


def _mean_dice(record: RoundRecord) -> float | None:
    known = [entry.dice_validation for entry in record.sites.values() if entry.dice_validation is not None]
    return sum(known) / len(known) if known else None
