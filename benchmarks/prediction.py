"""Time predictions of new images against a bare batched loop with the same model, and measure their peak memory.

    python benchmarks/prediction.py --model data/06_models/<site> --foundations data/02_intermediate/_foundations

The images are PNG of the demonstration's size. The bare loop opens them with Pillow, prepares them as the model's card
says, runs batches, resizes the logits, thresholds them and saves masks as PNG; it checks, counts and records nothing.
Both write to one disk, with one torch thread; overlays are off. Seconds are those of the processors, children counted.
Memory is the peak of a separate process (Linux only: from /proc).
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from measure import Ratio, in_turn, ratios, report
from PIL import Image
from torch import nn

from fedsca_pipeline.config import PredictConfig
from fedsca_pipeline.model.site_model import SiteModel, load_site_model
from fedsca_pipeline.prediction.predict import predict
from fedsca_pipeline.prediction.sources import find_sources

LIMIT, MEMORY_LIMIT, BATCH = 1.1, 1.1, 8


def main() -> None:
    """Measure, and write ``results/prediction.json``."""
    options = _options()
    torch.set_num_threads(1)
    model = load_site_model(options.model, options.foundations)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        few, many = (_images(place / str(count), count) for count in (options.images, 10 * options.images))
        found = in_turn(
            {
                "bare loop": lambda: _processor_seconds(lambda: _bare(model, few, place / "bare")),
                "predict": lambda: _processor_seconds(lambda: _predict(model, few, place / "out")),
            },
            options.repetitions,
        )
        peaks = {name: [_peak(options, images, place / "out")] for name, images in (("many", many), ("few", few))}
    report(
        "prediction",
        [
            Ratio(f"{options.images} images", "bare batched loop", ratios(found["predict"], found["bare loop"]), LIMIT),
            Ratio(
                f"memory of {10 * options.images} images", f"{options.images}", ratios(*peaks.values()), MEMORY_LIMIT
            ),
        ],
        {"seconds": found, "peaks_mb": peaks},
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a site's model")
    parser.add_argument("--foundations", type=Path, required=True)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    return parser.parse_args()


def _images(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number:05}.png")
    return folder


def _processor_seconds(work: Callable[[], object]) -> float:
    own = psutil.Process()

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))

    start = spent()
    work()
    return spent() - start


def _predict(model: SiteModel, images: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    predict(model, find_sources(images).sources, output, PredictConfig(batch_size=BATCH, overlays=False))


@torch.inference_mode()
def _bare(model: SiteModel, images: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    paths = sorted(images.iterdir())
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        pixels = torch.from_numpy(np.stack([model.fit(np.array(Image.open(path))) for path in batch]))
        logits = model.network(model.network.normalise(pixels, torch.ones(len(batch), 1, *pixels.shape[2:]).bool()))
        full = nn.functional.interpolate(logits, size=(256, 256), mode="bilinear", align_corners=False)
        for path, mask in zip(batch, (full[:, 0] > 0).to(torch.uint8).numpy(), strict=True):
            Image.fromarray(mask).save(output / path.name)


def _peak(options: argparse.Namespace, images: Path, output: Path) -> float:
    """Return the peak memory, in MB, of a process that only predicts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, options.model, options.foundations, images, output).result()


def _resident(model: Path, foundations: Path, images: Path, output: Path) -> float:
    torch.set_num_threads(1)
    _predict(load_site_model(model, foundations), images, output)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(peak.split()[1]) * 1024 / 1e6, 1)


if __name__ == "__main__":
    main()
