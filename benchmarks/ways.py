"""Time each way of speeding up a local step on its own, including those that did not pay.

    python benchmarks/ways.py                 # seconds of one step on a batch of two; --compile adds torch.compile
    python benchmarks/ways.py --evaluation    # seconds per image of inference, by batch size

The baseline is the plain eager step of the same run: the same model in its default memory layout, PyTorch's default
linear layers and AdamW, no cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measure import Ratio, in_turn, ratios, report, seconds
from torch import Tensor, nn

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, TrainingConfig
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.prefix import SplitModel
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.linear import use_onednn, use_torch
from fedsca_pipeline.model.foundation.model import SegmentationModel

SIDE = 256
Step = Callable[[], object]


class Trial:
    """One model, one optimiser, one batch of random images; ``step`` trains on it.

    Args:
        foundations: folder of the foundation's weights.
        batch: images in the batch.
        channels_last: whether the encoder uses this memory layout.
        onednn: whether linear layers run on oneDNN.
        optimiser: returns an AdamW for the trainable parameters; default: PyTorch's own.
        prefix: how the frozen encoder prefix runs: ``with the batch``, ``by image``, or ``kept`` (cached before).
        precision: returns the context manager of the forward pass.
        compiled: whether torch.compile compiles the forward pass.
    """

    def __init__(
        self,
        foundations: Path,
        batch: int,
        *,
        channels_last: bool = False,
        onednn: bool = False,
        optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        prefix: str = "with the batch",
        precision: Callable[[], Any] = nullcontext,
        compiled: bool = False,
    ) -> None:
        model = _model(foundations).train()
        if not channels_last:
            model.to(memory_format=torch.contiguous_format)
        (use_onednn if onednn else use_torch)(model)
        self.images, self.masks, self.valid = _batch(batch)
        split = SplitModel(model, tensor_layout(model).efficient)
        kept = split.features(self.images, self.valid)
        forwards: Mapping[str, Callable[[], Tensor]] = {
            "with the batch": lambda: model(model.normalise(self.images, self.valid.unsqueeze(1))),
            "by image": lambda: split.logits(split.features(self.images, self.valid)),
            "kept": lambda: split.logits(kept),
        }
        self.forward = torch.compile(forwards[prefix]) if compiled else forwards[prefix]
        self.precision = precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = (optimiser or _adamw)(self.parameters)
        self.loss_of = build_loss(model.head, 0.5)

    def step(self) -> None:
        """Train one step."""
        with self.precision():
            logits = self.forward()
        loss = self.loss_of(logits, self.masks, self.valid)
        owned = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.optimiser.zero_grad(set_to_none=owned[0] is self.parameters[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(owned, TrainingConfig().clip_norm)
        self.optimiser.step()


def main() -> None:
    """Run what the command line asks for and write ``results/ways.json`` or ``results/evaluation.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    torch.set_num_threads(threads)
    prepare_foundation(FoundationConfig(), options.foundations)
    (_evaluation if options.evaluation else _training)(options, threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, help="number of torch threads (default: all cores)")
    parser.add_argument("--evaluation", action="store_true", help="time inference instead of training")
    parser.add_argument(
        "--compile", action="store_true", help="also time torch.compile; needs a C++ compiler, takes minutes"
    )
    parser.add_argument("--foundations", type=Path, default=Path("data/06_models/foundations"))
    return parser.parse_args()


def _training(options: argparse.Namespace, threads: int) -> None:
    def trial(**ways: Any) -> Step:
        return Trial(options.foundations, options.batch, **ways).step

    best = {"channels_last": True, "onednn": True, "optimiser": _fused, "prefix": "kept"}
    ways = {
        "plain": trial(),
        "encoder channels-last": trial(channels_last=True),
        "linear layers by oneDNN": trial(onednn=True),
        "fused AdamW": trial(optimiser=_fused),
        "prefix image by image": trial(prefix="by image"),
        "prefix kept": trial(prefix="kept"),
        "these together, kept": trial(**best),
        "these together, not yet kept": trial(**{**best, "prefix": "by image"}),
        "not in the code: fused AdamW over one flat buffer": trial(optimiser=_flat),
        "not in the code: bf16 autocast on the CPU": trial(
            precision=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        ),
    }
    if options.compile:
        ways["not in the code: torch.compile of these together"] = trial(**best, compiled=True)
    first = {name: seconds(step) for name, step in ways.items()}
    found = in_turn({name: (lambda step=step: seconds(step)) for name, step in ways.items()}, options.repetitions)
    findings = [
        Ratio(name, "plain step", ratios(taken, found["plain"]), 1.0)
        for name, taken in found.items()
        if name != "plain"
    ]
    report("ways", findings, {"seconds": found, "first_step_seconds": first, "batch": options.batch}, threads=threads)


def _evaluation(options: argparse.Namespace, threads: int) -> None:
    model = _model(options.foundations).eval()
    split = SplitModel(model, tensor_layout(model).efficient)
    ways: dict[str, Callable[[], float]] = {}
    for size in (1, 2, 4, 8, 16):
        images, _, valid = _batch(size)
        features = split.features(images, valid)
        pixels = model.normalise(images, valid.unsqueeze(1))
        ways[f"batch {size}"] = _per_image(lambda pixels=pixels: model(pixels), size)
        ways[f"batch {size}, prefix kept"] = _per_image(lambda features=features: split.logits(features), size)
    found = in_turn(ways, options.repetitions)
    findings = [
        Ratio(name, "batch 1", ratios(taken, found["batch 1"]), 1.0)
        for name, taken in found.items()
        if name != "batch 1"
    ]
    report("evaluation", findings, {"seconds_an_image": found}, threads=threads)


def _per_image(work: Step, images: int) -> Callable[[], float]:
    @torch.inference_mode()
    def timed() -> float:
        return seconds(work) / images

    return timed


def _model(foundations: Path) -> SegmentationModel:
    return attach_adapters(
        load_foundation(FoundationConfig(), foundations, image_size=SIDE, classes=1), AdaptersConfig()
    )


def _batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, SIDE, SIDE), generator=draw)
    masks = (torch.rand(size, SIDE, SIDE, generator=draw) > 0.7).to(torch.uint8)
    return images, masks, torch.ones(size, SIDE, SIDE, dtype=torch.bool)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def _fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _flat(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return one AdamW over one buffer; all parameters and their gradients become views of it."""
    values = torch.cat([p.detach().reshape(-1) for p in parameters])
    gradients = torch.zeros_like(values)
    sizes = [p.numel() for p in parameters]
    for p, value, gradient in zip(parameters, values.split(sizes), gradients.split(sizes), strict=True):
        p.data, p.grad = value.view_as(p), gradient.view_as(p)
    flat = nn.Parameter(values)
    flat.grad = gradients
    return torch.optim.AdamW([flat], lr=1e-4, fused=True)


if __name__ == "__main__":
    main()
