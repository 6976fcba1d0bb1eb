"""Local training of one site against a plain eager PyTorch loop, over rounds; and the bookkeeping on its own.

    python benchmarks/local_training.py               # 8 and 32 rounds of one demonstration site

The plain loop is what anyone would write: the same model in its ordinary memory layout, the same images, order, views,
loss, clipping and warm-up, AdamW as it comes, nothing kept. The project's loop is what a run does at a site: messages,
features kept on disk and filled from nothing, the site's state written with fsync. The bare step is the project's own
without messages and states. None validates. The three take turns, round by round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from measure import Ratio, ratios, report, seconds
from site_data import demonstration_site

from fedsca_pipeline.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.federation.batches import SiteBatches, build_augmentation
from fedsca_pipeline.federation.devices import deterministic
from fedsca_pipeline.federation.local import (
    Forward,
    LocalSettings,
    LocalWorker,
    ignore_step,
    local_step,
    warm_up,
    whole_model,
)
from fedsca_pipeline.federation.losses import build_loss
from fedsca_pipeline.federation.messages import Manifest, decode, encode, hash_tensors
from fedsca_pipeline.federation.prefix import FeatureCache, SplitModel
from fedsca_pipeline.federation.store import SiteStore
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.foundation.model import SegmentationModel
from fedsca_pipeline.runs import resolve_threads
from fedsca_pipeline.sites.arrays import SiteArrays

SIDE, SITE, RUN, SEED = 256, "site", "benchmark", 0
SHORT, LONG = 8, 32
TRAINING = TrainingConfig()


@dataclass
class Contestant:
    """One way to train a round: ``train(round)`` returns the mean loss; seconds and losses pile up round by round."""

    train: Callable[[int], float]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run(self, round_: int) -> None:
        """Train one round and note what it took."""
        self.seconds.append(seconds(lambda: self.losses.append(self.train(round_))))


def main() -> None:
    """Run what the command line asks for and write ``results/local_training.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    prepare_foundation(FoundationConfig(), options.foundations)
    passes = []
    with deterministic(RunConfig(device=options.device), threads) as device:
        for repetition in range(options.repetitions):
            with tempfile.TemporaryDirectory() as folder:
                passes.append(_compete(options, Path(folder), device, backwards=bool(repetition % 2)))
    report("local_training", _findings(passes), {"passes": passes, "images": options.images}, threads=threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=LONG)
    parser.add_argument("--images", type=int, default=16, help="training images of the site")
    parser.add_argument("--repetitions", type=int, default=3, help="whole passes, each from nothing")
    parser.add_argument("--threads", type=int, help="torch's threads; all cores by default")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--foundations", type=Path, default=Path("data/06_models/foundations"))
    return parser.parse_args()


def _compete(
    options: argparse.Namespace, folder: Path, device: torch.device, *, backwards: bool
) -> dict[str, dict[str, list[float]]]:
    """One pass over all rounds, the contestants in turn."""
    data = demonstration_site(folder, images=options.images, validation=0, side=SIDE)
    contestants = {
        "plain": Contestant(_plain(_model(options, device).to(memory_format=torch.contiguous_format), data)),
        "project": Contestant(_project(_model(options, device), data, folder / "project")),
        "bare step": Contestant(_bare_step(_model(options, device), data, folder / "bare")),
    }
    for round_ in range(1, options.rounds + 1):
        for name in sorted(contestants, reverse=backwards ^ bool(round_ % 2)):
            contestants[name].run(round_)
    return {name: {"seconds": c.seconds, "losses": c.losses} for name, c in contestants.items()}


def _model(options: argparse.Namespace, device: torch.device) -> SegmentationModel:
    model = load_foundation(FoundationConfig(), options.foundations, image_size=SIDE, classes=1)
    return attach_adapters(model, AdaptersConfig()).to(device)


def _plain(model: SegmentationModel, data: SiteArrays) -> Callable[[int], float]:
    nothing_kept = FeatureCache(Path("unused"), [], (), 0)
    batches = SiteBatches(data, lambda images, _: images, build_augmentation(TRAINING.augment), nothing_kept)
    return _loop(model, batches, whole_model(model), fused=None)


def _bare_step(model: SegmentationModel, data: SiteArrays, folder: Path) -> Callable[[int], float]:
    split = SplitModel(model, tensor_layout(model).shapes)
    views = [(int(row), view) for row in data.rows("train") for view in range(8)]
    cache = FeatureCache(folder / "features", views, split.feature_shape, 2**32)
    batches = SiteBatches(data, split.features, build_augmentation(TRAINING.augment), cache)
    return _loop(model, batches, lambda batch: split.logits(batch.inputs), fused=True)


def _loop(
    model: SegmentationModel, batches: SiteBatches, forward: Forward, *, fused: bool | None
) -> Callable[[int], float]:
    """Return what trains one round with a fresh AdamW, as the project's rounds do."""
    adapters = [p for p in model.encoder.parameters() if p.requires_grad]
    decoder = list(model.decoder.parameters())
    loss_of = build_loss(model.head, TRAINING.dice_weight)
    device = decoder[0].device

    def train(round_: int) -> float:
        rates = [
            {"params": adapters, "lr": TRAINING.learning_rate},
            {"params": decoder, "lr": TRAINING.decoder_factor * TRAINING.learning_rate},
        ]
        optimiser = torch.optim.AdamW(rates, weight_decay=TRAINING.weight_decay, fused=fused)
        schedule = warm_up(optimiser, TRAINING.warmup_steps)
        losses = []
        model.train()
        for batch in batches.training(TRAINING.batch_size, seed=SEED, site=SITE, round_=round_, epoch=0):
            losses.append(local_step(forward, batch.to(device), loss_of, optimiser, TRAINING.clip_norm, lambda: None))
            schedule.step()
        return float(torch.stack(losses).mean())

    return train


def _project(model: SegmentationModel, data: SiteArrays, folder: Path) -> Callable[[int], float]:
    """Return what trains one round by ``LocalWorker.work``; the site receives its own shared tensors back."""
    settings = LocalSettings(RUN, SEED, 1, "fp32", 8, 0.5, TRAINING, cache_bytes=2**32)
    worker = LocalWorker(model, tensor_layout(model), build_strategy("fedsca", {}), settings)
    store = SiteStore(folder)
    shared = {name: worker.initial[name] for name in worker.shared}

    def train(round_: int) -> float:
        manifest = Manifest("aggregate", RUN, round_, SITE, hash_tensors(shared), 0, "fp32", relative=False)
        reply = decode(worker.work(encode(manifest, shared), round_, SITE, data, store, ignore_step))
        for name, update in reply.tensors.items():
            shared[name] = shared[name] + update
        return reply.manifest.metrics["loss"]

    return train


def _findings(passes: list[dict[str, dict[str, list[float]]]]) -> list[Ratio]:
    def total(name: str, rounds: int) -> list[float]:
        return [list(accumulate(one[name]["seconds"]))[min(rounds, len(one[name]["seconds"])) - 1] for one in passes]

    trained = len(passes[0]["plain"]["seconds"])
    limits = [(rounds, limit) for rounds, limit in ((SHORT, 0.95), (LONG, 0.85)) if rounds <= trained]
    found = [
        Ratio(
            f"local training, {rounds} rounds",
            "plain loop",
            ratios(total("project", rounds), total("plain", rounds)),
            limit,
        )
        for rounds, limit in limits
    ]
    # Every round is a repetition here: both do the same steps, and the first fills the kept features of each.
    both = zip(passes[0]["project"]["seconds"], passes[0]["bare step"]["seconds"], strict=True)
    found.append(Ratio("a round with messages and states", "the bare step", [a / b for a, b in both], 1.03))
    curves = [
        statistics.mean(abs(a - b) / b for a, b in zip(one["project"]["losses"], one["plain"]["losses"], strict=True))
        for one in passes
    ]
    return [*found, Ratio("loss, mean |difference| of a round's / plain's", "plain loop", curves, 0.05)]


if __name__ == "__main__":
    main()
