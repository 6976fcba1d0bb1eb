"""Check a run on one CUDA GPU: whether it is right and repeats, how fast it is, and what its steps wait for.

    python benchmarks/gpu.py                          # mobile_sam at 256 px, under eight minutes on one H200
    python benchmarks/gpu.py --foundation random      # a tiny model, to see whether the script runs
    python benchmarks/gpu.py --compile                # also times torch.compile, whose first step takes minutes

Every ratio has its baseline in the same run. The sites are generated phantoms. The script measures

1. two runs of two rounds, which must end in the same bits without a warning about determinism, and the first round's
   loss on the CPU;
2. rounds of ``fleet: processes`` with several workers on the GPU, and of ``in_process`` with and without feature cache;
3. one step by batch size as the product makes it, and made otherwise: without deterministic algorithms, with frozen
   weights cast by autocast, with attention by matrix products, with ``F.interpolate``, in fp32, as a CUDA graph, by
   torch.compile; and the frozen prefix alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measure import Ratio, in_turn, ratios, report, seconds
from site_data import demonstration_files
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsca_pipeline.compute import autocast_dtype, deterministic
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.federation.fleets.data import SiteData
from fedsca_pipeline.federation.fleets.in_process import LocalSites
from fedsca_pipeline.federation.fleets.registry import open_fleet
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.prefix import SplitModel
from fedsca_pipeline.federation.site.steps import LocalSettings, ignore_step, local_step
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, start_values, tensor_layout
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation import model as foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.half import HalfWeights

SIDES = {"mobile_sam": 256, "random": 64}
TRAINING = TrainingConfig()
# The losses of the first round on GPU and CPU, which differ by the rounding of bf16.
APART = 0.02
_CACHE = 2**30
_WARM_UP = 3
_PREFIX = "frozen prefix, image by image"


@dataclass(frozen=True)
class Outcome:
    """A run: seconds of its last round, mean loss of each round, and the local models at the end."""

    seconds: float
    losses: Sequence[float]
    models: Tensor


def main() -> None:
    """Run all three parts and write ``results/gpu.json``."""
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU, and torch finds none here")
    prepare_foundation(FoundationConfig(name=options.foundation), options.foundations)
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(options, Path(root))
        repeated, details = bench.repeated()
        findings = [*repeated, *bench.fleets(details)]
    with deterministic(RunConfig(device="cuda"), resolve_threads(options.threads)) as device:
        for size in options.batches:
            findings += _steps(options, device, size, details)
    report("gpu", findings, details, threads=options.threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundation", choices=SIDES, default="mobile_sam")
    parser.add_argument("--foundations", type=Path, default=Path("data/06_models/foundations"))
    parser.add_argument("--images", type=int, default=40, help="training images per site")
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8], help="workers on the GPU, against one")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32], help="images in the batch of a step")
    parser.add_argument("--repetitions", type=int, default=15, help="of the steps")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile; it needs a C++ compiler")
    return parser.parse_args()


class Bench:
    """Whole runs over ``sites`` phantom sites, each in a folder of its own below ``root``."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options, self.root = options, root
        side = SIDES[options.foundation]
        files = list(demonstration_files(root, images=options.images, validation=4, side=side).values())
        self.sources = {f"site_{number}": files[number % len(files)] for number in range(options.sites)}

    def repeated(self) -> tuple[list[Ratio], dict[str, Any]]:
        """Run twice on the GPU and once on the CPU; return what must hold, and the figures behind it."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = (self.run(f"repeated {number}") for number in range(2))
        on_cpu = self.run("cpu", device="cpu", rounds=1)
        warned = sorted({str(found.message) for found in caught if "determin" in str(found.message).lower()})
        different = int((first.models != second.models).sum())
        apart = abs(first.losses[0] - on_cpu.losses[0]) / on_cpu.losses[0]
        findings = [
            Ratio("values that differ when a run is repeated", "values", [different], 0),
            Ratio("warnings about determinism", "warnings", [len(warned)], 0),
            Ratio("loss of the first round, apart from the CPU's", "of the loss", [apart], APART),
        ]
        return findings, {"warnings": warned, "losses": first.losses, "loss_on_the_cpu": on_cpu.losses}

    def fleets(self, details: dict[str, Any]) -> list[Ratio]:
        """Time a round by number of workers and by feature cache."""
        one = self.run("1 worker", fleet="processes", workers=1).seconds
        several = {n: self.run(f"{n} workers", fleet="processes", workers=n).seconds for n in self.options.workers}
        without = self.run("no cache").seconds
        # The cache is full after some rounds, when most of the eight views of an image have been seen.
        with mock.patch.object(SplitModel, "worth_caching", new=True):
            cached = self.run("cache", rounds=6, cache=_CACHE).seconds
        details |= {"seconds_of_a_round": {"workers": {1: one, **several}, "no cache": without, "cache": cached}}
        return [
            *(Ratio(f"a round, {n} workers", "one worker", [taken / one], 1.0) for n, taken in several.items()),
            # A run on a GPU computes features again.
            Ratio("a round in process, features cached", "not cached", [cached / without], 1.0, at_least=True),
        ]

    def run(
        self,
        name: str,
        *,
        device: str = "cuda",
        fleet: str = "in_process",
        workers: int | None = None,
        rounds: int = 2,
        cache: int = 0,
    ) -> Outcome:
        """Run ``rounds`` rounds of FedSCA and return their outcome."""
        threads, folder = self.options.threads, self.root / name
        config = FederationConfig(rounds=rounds, fleet=fleet, workers=workers)
        with deterministic(RunConfig(device=device), threads) as place:
            model = _model(self.options)
            strategy = build_strategy("fedsca", {}, tensor_layout(model))
            settings = LocalSettings("gpu", 0, 1, "fp16", 8, 0.5, TRAINING, cache_bytes=cache, rounds=rounds)
            start = start_values(model, strategy.shared())
            sites = LocalSites(model, strategy, settings, SiteData(self.sources), folder / "sites", place, threads)
            checkpoints = CheckpointFolder(folder / "server", "gpu")
            with open_fleet(config, sites, ignore_step) as opened:
                server = Server(opened, strategy, start, config, run="gpu", seed=0, folder=checkpoints)
                losses: list[float] = []
                records = server.rounds()
                taken = [seconds(lambda: losses.append(_mean_loss(next(records)))) for _ in range(rounds)]
        return Outcome(taken[-1], losses, checkpoints.latest().state.local_models.clone())


def _mean_loss(record: Any) -> float:
    losses = [site.loss for site in record.sites.values()]
    return sum(losses) / len(losses)


def _model(options: argparse.Namespace) -> SegmentationModel:
    config, side = FoundationConfig(name=options.foundation), SIDES[options.foundation]
    model = load_foundation(config, options.foundations, image_size=side, classes=1)
    return attach_adapters(model, AdaptersConfig(width=4 if options.foundation == "random" else None))


class Trial:
    """One model, optimiser and batch of images on the GPU, whose features are known; ``step`` trains on it."""

    def __init__(
        self, options: argparse.Namespace, device: torch.device, images: int, *, half: bool = True, **adamw: bool
    ) -> None:
        self.model = _model(options).to(device).train()
        trained = frozenset(tensor_layout(self.model).efficient)
        self.split = SplitModel(self.model, trained)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=TRAINING.learning_rate, fused=True, **adamw)
        self.loss_of = build_loss(self.model.head, TRAINING.dice_weight)
        side = SIDES[options.foundation]
        self.images = torch.randint(0, 256, (images, 3, side, side), device=device)
        self.valid = torch.ones(images, side, side, dtype=torch.bool, device=device)
        masks = torch.zeros(images, side, side, dtype=torch.uint8, device=device)
        masks[:, side // 4 : side // 2, side // 4 : side // 2] = 1
        self.batch = Batch(self.split.features(self.images, self.valid), masks, self.valid)
        # A round enters this block once, for all of its steps.
        self.frozen = HalfWeights(self.model, trained, autocast_dtype(device) if half else None).in_use()
        self.frozen.__enter__()
        self.forward: Callable[[Tensor], Tensor] = self.split.logits

    def step(self) -> None:
        """Train one step as the product does."""
        local_step(
            lambda batch: self.forward(batch.inputs), self.batch, self.loss_of, self.optimiser, TRAINING.clip_norm,
            lambda: None,
        )  # fmt: skip

    def features(self) -> None:
        """Compute the features of the batch, image by image."""
        self.split.features(self.images, self.valid)


def _steps(options: argparse.Namespace, device: torch.device, images: int, details: dict[str, Any]) -> Iterator[Ratio]:
    """Time the ways of a step on a batch of this size in turn; yield each against the product's."""
    product = Trial(options, device, images)
    making: dict[str, Callable[[], Callable[[], None]]] = {
        "product": lambda: product.step,
        _PREFIX: lambda: product.features,
        "not deterministic": lambda: _within(_not_deterministic, Trial(options, device, images).step),
        "frozen weights cast by autocast": lambda: Trial(options, device, images, half=False).step,
        "attention by matrix products": lambda: _within(_by_products, Trial(options, device, images).step),
        "F.interpolate": lambda: _within(_interpolating, Trial(options, device, images).step),
        "fp32": lambda: _within(_without_bf16, Trial(options, device, images, half=False).step),
        "a CUDA graph": lambda: _graph(Trial(options, device, images, capturable=True)),
    }
    if options.compile:
        making["torch.compile"] = lambda: _compiled(Trial(options, device, images))
    ways: dict[str, Callable[[], None]] = {}
    for name, make in making.items():
        try:
            ways[name] = _warm(make())
        except RuntimeError as error:
            # A way that this GPU or this torch does not offer is a finding, too.
            details[f"not measured: {name}, batch of {images}"] = str(error)
    torch.cuda.reset_peak_memory_stats(device)
    product.step()
    peak = torch.cuda.max_memory_allocated(device)
    found = in_turn({name: (lambda step=step: seconds(step)) for name, step in ways.items()}, options.repetitions)
    details |= {f"seconds_of_a_step_of_{images}": found, f"peak_bytes_of_a_step_of_{images}": peak}
    for name, taken in found.items():
        if name != "product":
            # Each way but the prefix, which is a part of a step, is one that the product does not choose.
            compared = ratios(taken, found["product"])
            yield Ratio(f"{name}, batch of {images}", "the product's step", compared, 1.0, at_least=name != _PREFIX)


def _within(block: Callable[[], AbstractContextManager[object]], step: Callable[[], None]) -> Callable[[], None]:
    def inside() -> None:
        with block():
            step()

    return inside


def _warm(step: Callable[[], None]) -> Callable[[], None]:
    """Return a step after its first calls, which load kernels."""
    for _ in range(_WARM_UP):
        step()
    return step


def _compiled(trial: Trial) -> Callable[[], None]:
    trial.forward = torch.compile(trial.split.logits)
    return trial.step


def _by_products() -> AbstractContextManager[object]:
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def _not_deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def _interpolating() -> AbstractContextManager[object]:
    def interpolated(maps: Tensor, weights: Tensor) -> Tensor:
        return F.interpolate(maps, size=len(weights), mode="bilinear", align_corners=False)

    return mock.patch.object(foundation, "upsampled", interpolated)


def _without_bf16() -> AbstractContextManager[object]:
    return mock.patch.object(torch.cuda, "is_bf16_supported", return_value=False)


def _graph(trial: Trial) -> Callable[[], None]:
    """Return a function that replays a whole step, captured as one CUDA graph."""

    def step() -> None:
        with _uncached():
            logits = trial.split.logits(trial.batch.inputs)
        trial.optimiser.zero_grad(set_to_none=False)
        trial.loss_of(logits, trial.batch.masks, trial.batch.valid).backward()
        torch.nn.utils.clip_grad_norm_(trial.parameters, TRAINING.clip_norm, foreach=True)
        trial.optimiser.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _uncached() -> AbstractContextManager[object]:
    """Return the product's autocast without its cache, whose casts would not be part of the graph."""
    real = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if real else nullcontext()


if __name__ == "__main__":
    main()
