"""Compare FedSCA with local training on the nuclei sites over seeds, and time a round against a bare PyTorch loop.

    python benchmarks/nuclei.py --data DIR            # three seeds, fedsca and local; results to JSON and a table
    python benchmarks/nuclei.py --compare A B ...     # results of earlier calls in one table

Each training run is the real command, ``kedro run --pipeline=federated_training --env=nuclei``, in its own data root;
``--jobs`` of them run at once, with one thread each. The timing comes afterwards, alone, with project and bare loop
interleaved; both include the two validation passes of a round. docs/nuclei.md says how to get the data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.batches import SiteBatches, plain_batches
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.prefix import FeatureCache
from fedsca_pipeline.federation.site.steps import LocalSettings
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation import load_foundation

PROJECT = Path(__file__).resolve().parents[1]
TRAINING_SITES = ("fluo_256", "fluo_360", "fluo_696", "tissue_violet_320", "tissue_white_320")
MEAN = "mean over sites"
IMAGE_SIZE, BYTES_FP32 = 256, 4


def main() -> None:
    """Run what the command line asks for; the file keeps earlier results of parts that do not run."""
    options = _options()
    if options.compare:
        _compare(options.compare, Console())
        return
    options.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.is_file() else {}
    results["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    cells = list(product(options.strategies, range(options.seeds)))
    if cells:
        with ThreadPoolExecutor(options.jobs) as pool:
            results["runs"] = list(pool.map(lambda cell: _train(options, *cell), cells))
        results["settings"] = {"rounds": options.rounds, "threads_a_run": 1, "params": options.params}
    if options.repetitions:
        results["timing"] = _timing(options)
    results["sizes"] = _sizes(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    _show(results, Console())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="folder of the nuclei sites, one folder each")
    what.add_argument("--compare", type=Path, nargs="+", metavar="RESULT", help="train nothing, compare these files")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3); 0 trains nothing")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--strategies", nargs="+", default=["fedsca", "local"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="training runs at once, one thread each")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of the timing; 0 skips it")
    parser.add_argument("--params", default="", help="further --params for every run, e.g. training.warmup_steps=0")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "nuclei.json")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fedsca_nuclei", help="data roots")
    options = parser.parse_args()
    if options.compare:
        return options
    if missing := [site for site in TRAINING_SITES if not (options.data / site).is_dir()]:
        parser.error(f"--data {options.data}: no folder {', '.join(missing)}; docs/nuclei.md says where to get them")
    options.work, options.data = options.work.absolute(), options.data.absolute()
    return options


def _train(options: argparse.Namespace, strategy: str, seed: int) -> dict[str, Any]:
    """Run one strategy with one seed by the command line, unless it is up to date; return its results."""
    parameters = {
        "run.seed": seed,
        "run.threads": 1,
        "federation.strategy": strategy,
        "federation.rounds": options.rounds,
    }
    further = [options.params] if options.params else []
    root = _kedro_run(
        options,
        f"{strategy}-{seed}",
        "federated_training",
        ",".join([*(f"{key}={value}" for key, value in parameters.items()), *further]),
    )
    table = json.loads((root / "08_reporting" / "final_table.json").read_text())
    run = json.loads((root / "06_models" / "run_description.json").read_text())["fingerprint"]
    rounds = sorted((root / "07_model_output" / "rounds" / run).glob("round_*.json"))
    records = [json.loads(path.read_text()) for path in rounds]
    return {
        "strategy": strategy,
        "seed": seed,
        "table": table,
        "traffic": _traffic(records),
        "weights": _weights(records),
    }


def _kedro_run(options: argparse.Namespace, name: str, pipeline: str, params: str) -> Path:
    """Run a pipeline in its own data root, which is copied from ``--data`` on first use; return the root."""
    root = options.work / name
    for site in TRAINING_SITES:
        if not (root / "01_raw" / site).is_dir():
            shutil.copytree(options.data / site, root / "01_raw" / site)
    given = f"data_root={root},foundation_root={options.work / 'foundations'},{params}"
    command = [sys.executable, "-m", "kedro", "run", f"--pipeline={pipeline}", "--env=nuclei", "--params", given]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "OMP_WAIT_POLICY": "passive"}
    with (root / "log.txt").open("w") as log:
        subprocess.run(command, cwd=PROJECT, env=environment, stdout=log, stderr=log, check=True)
    return root


def _traffic(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean serialised bytes of a training round, each way, by site."""
    training = [record["sites"] for record in records if not record["final"]]
    return {
        site: {key: statistics.mean(sites[site][key] for sites in training) for key in ("bytes_up", "bytes_down")}
        for site in training[0]
    }


def _weights(records: list[dict[str, Any]]) -> list[float]:
    """Return the mean self weight of each training round."""
    return [
        statistics.mean(entry["self_weight"] for entry in record["sites"].values() if entry["self_weight"] is not None)
        for record in records
        if not record["final"]
    ]


def _sizes(options: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of larger messages that a method could send instead, in fp32."""
    model = _model(options)
    layout = tensor_layout(model)
    return {
        "whole_model_fp32": BYTES_FP32 * sum(p.numel() for p in model.parameters()),
        "adapters_and_decoder_fp32": BYTES_FP32 * layout.size((*layout.adapters, *layout.decoder)),
        "low_adapters_fp32": BYTES_FP32 * layout.size(build_strategy("fedsca", {}, layout).shared()),
    }


def _model(options: argparse.Namespace) -> Any:
    root = options.work / "foundations"
    return attach_adapters(
        load_foundation(FoundationConfig(), root, image_size=IMAGE_SIZE, classes=1), AdaptersConfig()
    )


def _timing(options: argparse.Namespace) -> dict[str, Any]:
    """Time one whole federated round over all sites against a bare loop over the same batches, in turn."""
    for pipeline in ("preprocessing", "foundation"):
        root = _kedro_run(options, "timing", pipeline, "run.seed=0")
    data = {
        site: SiteArrays(
            root / "05_model_input" / f"{site}.safetensors",
            pd.read_csv(root / "03_primary" / site / "manifest.csv", dtype=dict(MANIFEST_DTYPES)),
        )
        for site in TRAINING_SITES
    }
    threads = resolve_threads(None)
    with deterministic(RunConfig(device="cpu"), threads):
        batches = {site: list(_batches(arrays, site)) for site, arrays in data.items()}
        validation = {site: list(plain_batches(arrays, "validation", 8)) for site, arrays in data.items()}
        rounds = {
            "project": lambda: _project_round(options, data),
            "bare": lambda: _bare_round(options, batches, validation),
        }
        # The first steps of a process are slower; without a warm-up the first candidate would pay for them.
        first = TRAINING_SITES[0]
        _bare_round(options, {first: batches[first][:2]}, {first: validation[first][:1]})
        pairs = []
        for repetition in range(options.repetitions):
            order = sorted(rounds, reverse=bool(repetition % 2))
            seconds = {name: rounds[name]() for name in order}
            pairs.append({name: seconds[name] for name in rounds})
    ratios = [pair["project"] / pair["bare"] for pair in pairs]
    return {"threads": threads, "seconds": pairs, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def _batches(arrays: SiteArrays, site: str) -> Iterator[Batch]:
    training = TrainingConfig()
    nothing_kept = FeatureCache(Path("unused"), [], (), 0)
    batches = SiteBatches(arrays, lambda images, _: images, training.augment, nothing_kept)
    return batches.training(training.batch_size, seed=0, site=site, round_=1, epoch=0)


def _project_round(options: argparse.Namespace, data: dict[str, SiteArrays]) -> float:
    """Return the seconds of one federated round: messages, training, validation, SGCA, checkpoint with fsync."""
    model = _model(options)
    layout = tensor_layout(model)
    strategy = build_strategy("fedsca", {}, layout)
    settings = LocalSettings("benchmark", 0, 1, "fp16", 8, 0.5, TrainingConfig())
    worker = LocalWorker(model, strategy, settings)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        server = Server(
            InProcessFleet(worker, data, Path(folder) / "sites"),
            strategy,
            worker.initial,
            FederationConfig(rounds=1),
            run="benchmark",
            seed=0,
            folder=CheckpointFolder(Path(folder) / "server", "benchmark"),
        )
        start = time.perf_counter()
        next(server.rounds())
        return time.perf_counter() - start


def _bare_round(
    options: argparse.Namespace, batches: dict[str, list[Batch]], validation: dict[str, list[Batch]]
) -> float:
    """Return the seconds of the same steps in a plain loop: ready batches, AdamW, loss, two validation passes."""
    model, training = _model(options), TrainingConfig()
    loss_of = build_loss("sigmoid", training.dice_weight)
    adapters = [p for p in model.encoder.parameters() if p.requires_grad]
    decoder = list(model.decoder.parameters())
    start = time.perf_counter()
    for site, site_batches in batches.items():
        rates = [
            {"params": adapters, "lr": training.learning_rate},
            {"params": decoder, "lr": 0.3 * training.learning_rate},
        ]
        optimiser = torch.optim.AdamW(rates, weight_decay=training.weight_decay)
        _bare_validation(model, validation[site])
        model.train()
        for batch in site_batches:
            loss = loss_of(model(model.normalise(batch.inputs, batch.valid.unsqueeze(1))), batch.masks, batch.valid)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*adapters, *decoder], training.clip_norm)
            optimiser.step()
        _bare_validation(model, validation[site])
    return time.perf_counter() - start


def _bare_validation(model: Any, batches: list[Batch]) -> None:
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            model(model.normalise(batch.inputs, batch.valid.unsqueeze(1)))


def _compare(files: list[Path], console: Console) -> None:
    """Print the chosen models' test Dice of several result files: seed by seed, mean, and the difference of means."""
    table = Table("results", "strategy", "seeds", "mean", "difference", title="nuclei: test Dice, mean over sites")
    first: dict[str, float] = {}
    for file in files:
        scores: dict[str, list[float]] = {}
        for run in json.loads(file.read_text())["runs"]:
            scores.setdefault(run["strategy"], []).append(run["table"][MEAN]["Dice chosen"])
        for strategy, found in scores.items():
            mean = statistics.mean(found)
            seeds = ", ".join(f"{score:.4f}" for score in found)
            table.add_row(file.stem, strategy, seeds, f"{mean:.4f}", f"{mean - first.setdefault(strategy, mean):+.4f}")
    console.print(table)


def _show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="nuclei: test Dice, mean over sites")
    for column in ("strategy", "seed", "before", "last round", "chosen", "worst site", "kB up", "kB down"):
        table.add_column(column, justify="right" if column != "strategy" else "left")
    for run in results.get("runs", []):
        mean, sites = run["table"][MEAN], [run["table"][site] for site in TRAINING_SITES]
        traffic = run["traffic"].values()
        table.add_row(
            run["strategy"],
            str(run["seed"]),
            *(f"{mean[f'Dice {model}']:.3f}" for model in ("before", "after", "chosen")),
            f"{min(row['Dice chosen'] for row in sites):.3f}",
            *(f"{statistics.mean(site[key] for site in traffic) / 1e3:.1f}" for key in ("bytes_up", "bytes_down")),
        )
    console.print(table)
    for strategy in dict.fromkeys(run["strategy"] for run in results.get("runs", [])):
        scores = [run["table"][MEAN]["Dice chosen"] for run in results["runs"] if run["strategy"] == strategy]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        console.print(f"{strategy}: {statistics.mean(scores):.4f} (standard deviation over seeds {spread:.4f})")
    for name, size in results["sizes"].items():
        console.print(f"{name}: {size / 1e6:.3f} MB")
    if timing := results.get("timing"):
        ratios = ", ".join(f"{ratio:.3f}" for ratio in timing["ratios"])
        console.print(f"a round / the bare loop, {timing['threads']} threads: {timing['median_ratio']:.3f} ({ratios})")


if __name__ == "__main__":
    main()
