"""Time bilinear upsampling of logits as two matrix products against ``F.interpolate``, forward and backward.

    python benchmarks/upsampling.py
    python benchmarks/upsampling.py --device cuda

On CUDA both run with PyTorch's deterministic algorithms, as a run does. There the model uses the products; on the CPU
it uses ``F.interpolate``, because the products sum in another order and so would change the bits of every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import Ratio, in_turn, ratios, report, seconds
from torch import Tensor

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import RunConfig
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.model.foundation.model import interpolation_weights, upsampled

# Images in a batch and pixels of a side.
SHAPES = ((2, 256), (8, 256), (2, 1024))


def main() -> None:
    """Time both ways in turn and write ``results/upsampling.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    findings, details = [], {}
    with deterministic(RunConfig(device=options.device), threads) as device:
        for images, side in SHAPES:
            weights = interpolation_weights(side // 4, side).to(device)
            ways = {
                "products": partial(upsampled, weights=weights),
                "F.interpolate": partial(F.interpolate, size=(side, side), mode="bilinear", align_corners=False),
            }
            maps = torch.randn(images, 1, side // 4, side // 4, device=device, requires_grad=True)
            found = in_turn(
                {name: partial(_seconds_per_pass, way, maps, options.passes) for name, way in ways.items()},
                options.repetitions,
            )
            what = f"{images} images of {side} px"
            findings.append(
                Ratio(f"products, {what}", "F.interpolate", ratios(found["products"], found["F.interpolate"]), 1.0)
            )
            details[what] = found
    report("upsampling", findings, {"device": device.type, "seconds": details}, threads=threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--passes", type=int, default=20, help="forward and backward passes in a repetition")
    parser.add_argument("--threads", type=int, help="number of torch threads (default: all cores)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def _seconds_per_pass(way: Callable[[Tensor], Tensor], maps: Tensor, passes: int) -> float:
    def work() -> None:
        for _ in range(passes):
            torch.autograd.grad(way(maps).sum(), maps)

    return seconds(work) / passes


if __name__ == "__main__":
    main()
