"""Time one fused step over several sites against the same steps site after site.

    python benchmarks/fused.py                        # mobile_sam at 256 px and the random tiny model at 64 px
    python benchmarks/fused.py --device cuda

The foundation is frozen and the sites' trainable tensors have the same shapes, so they can be stacked:
``torch.func.vmap`` turns each operation of the model into one batched operation over all sites. Both candidates clip
each site's gradient by its own norm and step with fused AdamW. Both start from the features of the frozen encoder
prefix, as a run does when these are cached. The script also compares the losses of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Ratio, in_turn, ratios, report, seconds
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from fedsca_pipeline.compute import autocast, deterministic
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.prefix import SplitModel
from fedsca_pipeline.federation.site.steps import local_step
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.linear import use_torch
from fedsca_pipeline.model.foundation.model import SegmentationModel

MODELS = {"mobile_sam": 256, "random": 64}
TRAINING = TrainingConfig()
SAME = 1e-4


class Trunk(torch.nn.Module):
    """The part of a model after the cached features, as the module that ``functional_call`` needs."""

    def __init__(self, model: SegmentationModel, trainable: frozenset[str]) -> None:
        super().__init__()
        self.model = model
        self.split = SplitModel(model, trainable)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of features."""
        return self.split.logits(features)


def main() -> None:
    """Run what the command line asks for and write ``results/fused.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    findings, details = [], {}
    with deterministic(RunConfig(device=options.device), threads) as device:
        for name, side in MODELS.items():
            one_by_one, fused = _sequential(options, name, side, device), _fused(options, name, side, device)
            apart = max(
                ((a - b).abs() / b).max().item()
                for a, b in [(fused(), one_by_one()) for _ in range(options.compared_steps)]
            )
            found = in_turn(
                {"site after site": lambda step=one_by_one: seconds(step), "fused": lambda step=fused: seconds(step)},
                options.repetitions,
            )
            what = f"{name}, {side} px, {options.sites} sites"
            findings += [
                Ratio(
                    f"a fused step of {what}", "site after site", ratios(found["fused"], found["site after site"]), 1
                ),
                Ratio(f"losses of {what}, largest |difference|", "of the loss", [apart], SAME),
            ]
            details[name] = found
    report("fused", findings, {"seconds": details, "batch_size": TRAINING.batch_size}, threads=threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--compared-steps", type=int, default=3, help="steps whose losses are compared")
    parser.add_argument("--threads", type=int, help="number of torch threads (default: all cores)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--foundations", type=Path, default=Path("data/06_models/foundations"))
    return parser.parse_args()


def _model(options: argparse.Namespace, name: str, side: int, device: torch.device) -> tuple[Trunk, frozenset[str]]:
    config = FoundationConfig(name=name)
    prepare_foundation(config, options.foundations)
    model = attach_adapters(load_foundation(config, options.foundations, image_size=side, classes=1), AdaptersConfig())
    # vmap has no rule for oneDNN's operator.
    use_torch(model)
    trainable = frozenset(tensor_layout(model).efficient)
    return Trunk(model.to(device).train(), trainable), trainable


def _batches(options: argparse.Namespace, trunk: Trunk, side: int, device: torch.device) -> list[Batch]:
    """Return one batch per site: features of random images, and square masks."""
    draw = torch.Generator().manual_seed(0)
    valid = torch.ones(TRAINING.batch_size, side, side, dtype=torch.bool, device=device)
    masks = torch.zeros(TRAINING.batch_size, side, side, dtype=torch.uint8, device=device)
    masks[:, side // 4 : side // 2, side // 4 : side // 2] = 1
    images = 255 * torch.rand(options.sites, TRAINING.batch_size, 3, side, side, generator=draw)
    split = trunk.split
    return [Batch(split.features(image.to(device), valid), masks, valid) for image in images]


def _sequential(options: argparse.Namespace, name: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that runs one step of every site, one after the other, with one model per site."""
    built = [_model(options, name, side, device) for _ in range(options.sites)]
    batches = _batches(options, built[0][0], side, device)
    optimisers = [
        torch.optim.AdamW([p for p in trunk.parameters() if p.requires_grad], fused=True) for trunk, _ in built
    ]
    loss_of = build_loss(built[0][0].model.head, TRAINING.dice_weight)

    def step() -> Tensor:
        return torch.stack(
            [
                local_step(lambda batch, trunk=trunk: trunk(batch.inputs), batch, loss_of, optimiser,
                           TRAINING.clip_norm, lambda: None)
                for (trunk, _), batch, optimiser in zip(built, batches, optimisers, strict=True)
            ]
        )  # fmt: skip

    return step


def _fused(options: argparse.Namespace, name: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that runs one step of every site in one pass over stacked trainable tensors."""
    trunk, trainable = _model(options, name, side, device)
    batches = _batches(options, trunk, side, device)
    inputs, masks, valid = (torch.stack([getattr(b, part) for b in batches]) for part in ("inputs", "masks", "valid"))
    stacked, _ = stack_module_state([trunk] * options.sites)
    names = [name for name in stacked if name.removeprefix("model.") in trainable]
    frozen = {name: p.detach() for name, p in trunk.named_parameters() if name not in names}
    values = {name: stacked[name].detach().clone().requires_grad_() for name in names}
    optimiser = torch.optim.AdamW(list(values.values()), fused=True)
    loss_of = build_loss(trunk.model.head, TRAINING.dice_weight)

    def loss(own: dict[str, Tensor], inputs: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
        with autocast(device):
            logits = functional_call(trunk, frozen | own, (inputs,))
        return loss_of(logits, masks, valid)

    def step() -> Tensor:
        losses = vmap(loss, randomness="different")(values, inputs, masks, valid)
        optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in values.values()]).norm(dim=0)
        scale = (TRAINING.clip_norm / (norms + 1e-6)).clamp(max=1)
        for p in values.values():
            p.grad.mul_(scale.reshape(-1, *[1] * (p.dim() - 1)))
        optimiser.step()
        return losses.detach()

    return step


if __name__ == "__main__":
    main()
