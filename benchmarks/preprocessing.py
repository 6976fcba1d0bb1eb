"""Time preprocessing of PNG sites against a bare Pillow loop over the same files, and measure its peak memory.

    python benchmarks/preprocessing.py              # the demonstration sites at 256 and 1024 px, one and two processes
    python benchmarks/preprocessing.py --data DIR   # also the raw PNG sites of DIR, one folder each

The bare loop opens and decodes each image and its mask, converts the image to RGB and resizes both (bilinear and
nearest neighbour). It stores nothing and does no check, hash or normalisation. Both candidates process the same sites
in the same number of processes for wall time, and in one process for CPU seconds, which other work on the machine
hardly affects; those of the process that decodes are counted. A third candidate decodes in its own process: what the
protection against hostile files costs. A timing ends when the results are on disk under their final names; they are
deleted afterwards. Memory is the peak of a separate process, over sites made of shifted copies of one picture (Linux
only: from /proc).
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
from measure import Ratio, in_turn, ratios, report, seconds
from PIL import Image
from rich.console import Console
from rich.table import Table

from fedsca_pipeline.config import DemoSitesConfig, PreprocessingConfig
from fedsca_pipeline.data.demo.sites import write_demo_sites
from fedsca_pipeline.data.preprocessing import samples
from fedsca_pipeline.data.preprocessing.geometry import fitted_size
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data.readers import images

CONFIG = PreprocessingConfig(on_bad_sample="quarantine")
SPEED_LIMIT, MEMORY_LIMIT, CHILD_LIMIT = 0.8, 1.1, 1.05


def main() -> None:
    """Measure, print two tables, and write ``results/preprocessing.json``."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        place = Path(folder)
        data = {
            f"demonstration, {side} px": _demonstration(place / f"demo_{side}", count, side)
            for side, count in ((256, options.images), (1024, max(4, options.images // 4)))
        }
        if options.data:
            data[options.data.resolve().parent.name] = options.data
        findings, measured = [], {}
        for name, raw in data.items():
            ways = [(1, _processor_seconds), *((count, _clock_seconds) for count in options.processes)]
            for processes, measure in ways:
                found = _times(raw, place / "scratch", processes, measure, options.repetitions)
                unit = "processor" if measure is _processor_seconds else "clock"
                what = f"{name}; {processes} process{'es' * (processes > 1)}, {unit}"
                speeds = ratios(found["bare loop"], found["prepare_site"])
                findings.append(Ratio(what, "speed of the bare loop", speeds, SPEED_LIMIT, at_least=True))
                costs = ratios(found["prepare_site"], found["decoding here"])
                findings.append(Ratio(f"{what}; a process to decode", "the same without it", costs, CHILD_LIMIT))
                measured[what] = found
        peaks = {count: [_peak(place, count) for _ in range(options.peaks)] for count in options.counts}
    least, most = min(peaks), max(peaks)
    findings.append(Ratio(f"memory of {most} images", f"{least}", ratios(peaks[most], peaks[least]), MEMORY_LIMIT))
    _show(peaks)
    report("preprocessing", findings, {"seconds": measured, "peaks_mb": peaks})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of further raw sites to measure on, PNG only")
    parser.add_argument("--images", type=int, default=40, help="images of each demonstration site of 256 px, 4 or more")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[100, 500, 2500], help="numbers of images for the memory table"
    )
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of the timing")
    parser.add_argument("--peaks", type=int, default=1, help="repetitions of the memory table")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for all files of the benchmark"
    )
    return parser.parse_args()


def _demonstration(raw: Path, images: int, side: int) -> Path:
    write_demo_sites(raw, DemoSitesConfig(images_per_site=images, image_size=side))
    return raw


Measure = Callable[[ProcessPoolExecutor, Callable[[str], None], Sequence[str]], float]


def _times(raw: Path, scratch: Path, processes: int, measure: Measure, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each candidate over all sites, in processes that have run it once before."""
    sites = sorted(path.name for path in raw.iterdir() if path.is_dir())
    candidates = {"bare loop": partial(_bare, raw), "prepare_site": partial(_prepare, raw, scratch)}
    candidates["decoding here"] = partial(_prepare_here, raw, scratch)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:

        def timed(work: Callable[[str], None]) -> float:
            found = measure(pool, work, sites)
            shutil.rmtree(scratch, ignore_errors=True)
            return found

        timings = {name: partial(timed, work) for name, work in candidates.items()}
        for timing in timings.values():
            timing()
        return in_turn(timings, repetitions)


def _clock_seconds(pool: ProcessPoolExecutor, work: Callable[[str], None], sites: Sequence[str]) -> float:
    return seconds(lambda: list(pool.map(work, sites)))


def _processor_seconds(pool: ProcessPoolExecutor, work: Callable[[str], None], sites: Sequence[str]) -> float:
    return sum(pool.map(partial(_worked, work), sites))


def _worked(work: Callable[[str], None], site: str) -> float:
    start = _processor()
    work(site)
    return _processor() - start


def _processor() -> float:
    """Return the processor seconds of this process and of those that it started."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def _bare(raw: Path, site: str) -> None:
    for image in sorted((raw / site / "images").iterdir()):
        for path, method in ((image, "BILINEAR"), (raw / site / "masks" / image.name, "NEAREST")):
            with Image.open(path) as opened:
                opened.load()
                pixels = opened.convert("RGB") if method == "BILINEAR" else opened
                height, width = fitted_size(opened.height, opened.width, CONFIG.image_size)
                pixels.resize((width, height), Image.Resampling[method])


def _prepare(raw: Path, scratch: Path, site: str) -> None:
    prepare_site(raw, site, CONFIG, seed=0, scratch=scratch).arrays.move_to(scratch / f"{site}.safetensors")


def _prepare_here(raw: Path, scratch: Path, site: str) -> None:
    here = inspect.unwrap(images.decode_pixels)
    with mock.patch.object(images, "decode_pixels", here), mock.patch.object(samples, "decode_ahead"):
        _prepare(raw, scratch, site)


def _peak(place: Path, count: int) -> float:
    """Return the peak memory, in MB, of a process that only prepares one site of ``count`` images."""
    raw = place / f"many_{count}"
    if not raw.is_dir():
        _write_many(raw / "many", count)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, raw, place / "scratch").result()


def _resident(raw: Path, scratch: Path) -> float:
    _prepare(raw, scratch, "many")
    # getrusage starts from the memory of the parent process, so its peak is of no use here.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(peak.split()[1]) * 1024 / 1e6, 1)


def _write_many(folder: Path, count: int) -> None:
    """Write a site of copies of one picture, each shifted differently, so that no two are equal."""
    side = CONFIG.image_size
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2] = 255
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        shift = divmod(number, side)
        Image.fromarray(np.roll(picture, shift, (0, 1))).save(folder / "images" / f"{number}.png", compress_level=0)
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def _show(peaks: dict[int, list[float]]) -> None:
    table = Table("images", "peak MB, median", "arrays on disk, MB")
    each = 4 * CONFIG.image_size**2 / 1e6
    for count, found in peaks.items():
        table.add_row(f"{count:,}", f"{statistics.median(found):.0f}", f"{count * each:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
