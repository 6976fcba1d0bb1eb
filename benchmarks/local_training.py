"""Time local training of one site against a plain eager PyTorch loop over rounds, and its bookkeeping separately.

    python benchmarks/local_training.py               # 8 and 32 rounds of one demonstration site

The plain loop is a straightforward implementation: the same model in its default memory layout, the same images,
order, augmentation, loss, clipping and warm-up, PyTorch's default linear layers and AdamW, no cache. The project's loop
is what a run does at a site: messages, a feature cache on disk that starts empty, and the site's state written with
fsync. The two take turns, round by round. Neither validates.

Training is chaotic. To show what rounding alone does to the loss curve, the plain loop also runs from weights rounded
once to half precision, the precision of the feature cache. The project's curve may be at most twice as far from the
plain curve as that one.

The bookkeeping is measured separately, with as many images as a site of the nuclei benchmark trains on: the project's
round against the bare step, which is the same round without messages and states.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measure import Ratio, ratios, report, seconds
from site_data import demonstration_site
from torch import Tensor

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.site.batches import SiteBatches
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.prefix import FeatureCache, SplitModel
from fedsca_pipeline.federation.site.steps import LocalSettings, ignore_step, local_step, warm_up
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.linear import use_torch
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.inference import Forward, image_forward
from fedsca_pipeline.model.layout import hash_tensors

SIDE, SITE, RUN, SEED = 256, "site", "benchmark", 0
SHORT, LONG = 8, 32
TRAINING = TrainingConfig()

Pass = dict[str, dict[str, list[float]]]


@dataclass
class Contestant:
    """One candidate: ``train(round)`` returns the mean loss; ``seconds`` and ``losses`` collect one value per round."""

    train: Callable[[int], float]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run(self, round_: int) -> None:
        """Train one round; record its seconds and its loss."""
        self.seconds.append(seconds(lambda: self.losses.append(self.train(round_))))


def main() -> None:
    """Run what the command line asks for and write ``results/local_training.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    prepare_foundation(FoundationConfig(), options.foundations)
    passes, kept = [], []
    with deterministic(RunConfig(device=options.device), threads) as device:
        for repetition in range(options.repetitions):
            backwards = bool(repetition % 2)
            passes.append(_against_plain(options, device, backwards=backwards))
            kept.append(_against_bare_step(options, device, backwards=backwards))
        rounded = _rounded(options, device)
    details = {
        "passes": passes,
        "images": options.images,
        "rounded": rounded,
        "bookkeeping": kept,
        "bookkeeping_images": options.bookkeeping_images,
    }
    report("local_training", _findings(passes, rounded, kept), details, threads=threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=LONG)
    parser.add_argument("--images", type=int, default=16, help="training images of the site (default 16)")
    parser.add_argument("--bookkeeping-rounds", type=int, default=4)
    parser.add_argument("--bookkeeping-images", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3, help="complete passes, each from the start values")
    parser.add_argument("--threads", type=int, help="number of torch threads (default: all cores)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--foundations", type=Path, default=Path("data/06_models/foundations"))
    return parser.parse_args()


def _against_plain(options: argparse.Namespace, device: torch.device, *, backwards: bool) -> Pass:
    """Run one pass of the project's rounds against those of the plain loop."""
    with tempfile.TemporaryDirectory() as folder:
        data = demonstration_site(Path(folder), images=options.images, validation=0, side=SIDE)
        contestants = {
            "plain": Contestant(_plain(_plain_model(options, device), data)),
            "project": Contestant(_project(_model(options, device), data, Path(folder) / "project")),
        }
        return _compete(contestants, options.rounds, backwards=backwards)


def _against_bare_step(options: argparse.Namespace, device: torch.device, *, backwards: bool) -> Pass:
    """Run one pass of the project's rounds against those of its bare step."""
    with tempfile.TemporaryDirectory() as folder:
        data = demonstration_site(Path(folder), images=options.bookkeeping_images, validation=0, side=SIDE)
        contestants = {
            "bare step": Contestant(_bare_step(_model(options, device), data, Path(folder) / "bare")),
            "project": Contestant(_project(_model(options, device), data, Path(folder) / "project")),
        }
        return _compete(contestants, options.bookkeeping_rounds, backwards=backwards)


def _rounded(options: argparse.Namespace, device: torch.device) -> list[float]:
    """Return the losses of the plain loop's rounds when its start values are rounded to half precision."""
    model = _plain_model(options, device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half())
    with tempfile.TemporaryDirectory() as folder:
        train = _plain(model, demonstration_site(Path(folder), images=options.images, validation=0, side=SIDE))
        return [train(round_) for round_ in range(1, options.rounds + 1)]


def _compete(contestants: Mapping[str, Contestant], rounds: int, *, backwards: bool) -> Pass:
    """Train the contestants in turn, round by round; return their seconds and losses."""
    for round_ in range(1, rounds + 1):
        for name in sorted(contestants, reverse=backwards ^ bool(round_ % 2)):
            contestants[name].run(round_)
    return {name: {"seconds": c.seconds, "losses": c.losses} for name, c in contestants.items()}


def _plain_model(options: argparse.Namespace, device: torch.device) -> SegmentationModel:
    model = _model(options, device).to(memory_format=torch.contiguous_format)
    use_torch(model)
    return model


def _model(options: argparse.Namespace, device: torch.device) -> SegmentationModel:
    model = load_foundation(FoundationConfig(), options.foundations, image_size=SIDE, classes=1)
    return attach_adapters(model, AdaptersConfig()).to(device)


def _plain(model: SegmentationModel, data: SiteArrays) -> Callable[[int], float]:
    nothing_kept = FeatureCache(Path("unused"), [], (), 0)
    batches = SiteBatches(data, lambda images, _: images, TRAINING.augment, nothing_kept)
    return _loop(model, batches, image_forward(model), fused=None)


def _bare_step(model: SegmentationModel, data: SiteArrays, folder: Path) -> Callable[[int], float]:
    split = SplitModel(model, tensor_layout(model).efficient)
    views = [(int(row), view) for row in data.rows("train") for view in range(8)]
    cache = FeatureCache(folder / "features", views, split.feature_shape, 2**32)
    device = next(iter(model.parameters())).device

    def embed(images: Tensor, valid: Tensor) -> Tensor:
        return split.features(images.to(device), valid.to(device))

    batches = SiteBatches(data, embed, TRAINING.augment, cache)
    return _loop(model, batches, lambda batch: split.logits(batch.inputs), fused=True)


def _loop(
    model: SegmentationModel, batches: SiteBatches, forward: Forward, *, fused: bool | None
) -> Callable[[int], float]:
    """Return a function that trains one round with a new AdamW, as the project's rounds do."""
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
    """Return a function that trains one round by ``LocalWorker.work``; the site's aggregate is its own local model."""
    settings = LocalSettings(RUN, SEED, 1, "fp32", 8, 0.5, TRAINING, cache_bytes=2**32)
    layout = tensor_layout(model)
    worker = LocalWorker(model, build_strategy("fedsca", {}, layout), settings)
    store = SiteStore(folder, "benchmark")
    shared = {name: worker.initial[name] for name in worker.shared}

    def train(round_: int) -> float:
        manifest = Manifest("aggregate", RUN, round_, SITE, hash_tensors(shared), 0, "fp32", False, {}, round_ - 1)
        reply = decode(worker.work(encode(manifest, shared), round_, SITE, data, store, ignore_step))
        for name, update in reply.tensors.items():
            shared[name] = shared[name] + update
        return reply.manifest.metrics["loss"]

    return train


def _findings(passes: Sequence[Pass], rounded: Sequence[float], kept: Sequence[Pass]) -> list[Ratio]:
    trained = len(passes[0]["plain"]["seconds"])
    found = [
        Ratio(
            f"local training, {rounds} rounds",
            "plain loop",
            ratios(*([sum(one[name]["seconds"][:rounds]) for one in passes] for name in ("project", "plain"))),
            limit,
        )
        for rounds, limit in ((SHORT, 0.95), (LONG, 0.85))
        if rounds <= trained
    ]
    # Each round is a repetition here: both run the same steps, and the first round fills both feature caches.
    books = [value for one in kept for value in ratios(one["project"]["seconds"], one["bare step"]["seconds"])]
    apart = [_apart(one["project"]["losses"], one["plain"]["losses"]) for one in passes]
    rounding = [_apart(rounded, one["plain"]["losses"]) for one in passes]
    return [
        *found,
        Ratio("a round with messages and states", "the bare step", books, 1.03),
        Ratio(
            "distance of the loss curve from the plain one",
            "distance of a rounded plain loop",
            ratios(apart, rounding),
            2.0,
        ),
    ]


def _apart(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Return the mean relative difference of two loss curves."""
    return statistics.mean(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


if __name__ == "__main__":
    main()
