"""Time the server's step on many sites against the same sums written plainly in PyTorch.

    python benchmarks/aggregation.py                                      # 100 sites x 1,000,000 values
    python benchmarks/aggregation.py --sites 1000 --server-memory 8       # needs 8 GiB of disk

A step is ``Strategy.aggregate`` of fedsca: local models from bases and updates, comparison, weights, mixing, spread.
The plain sums use the same memory, and pass over it as the step does: a busy machine slows both alike. Its large arrays
are those of a round (``RoundMemory``); the part of them beyond ``--server-memory`` is on disk.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch
from measure import Ratio, in_turn, ratios, report, seconds

from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.server.arrays import RoundMemory, mapped
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState, SiteLimits
from fedsca_pipeline.model.layout import TensorLayout

# The defaults of ``federation``.
LIMITS = SiteLimits(max_norm_ratio=10.0, max_share=0.5, clip_to_median=False)


class PeakMemory:
    """Measure the peak anonymous memory of this process while the block runs, in bytes; Linux only."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._done = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, kilobytes * 1024)
            time.sleep(0.02)


def main() -> None:
    """Run what the command line asks for and write ``results/aggregation_<sites>.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    torch.set_num_threads(threads)
    count, values = options.sites, options.values
    sites = tuple(f"site_{index:05d}" for index in range(count))
    strategy = build_strategy("fedsca", {}, TensorLayout((("adapter",),), (), {"adapter": (values,)}))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        memory = RoundMemory.within(options.server_memory, Path(folder), count, values)
        # In a run, the state before the round is the memory-mapped checkpoint.
        local_models = mapped(Path(folder), (count, values))
        _fill(memory.updates, 1e-3)
        _fill(memory.bases, 1.0)
        state = ServerState.initial(count, 0, 1)
        state = ServerState(local_models, state.trained, state.samples, state.memory, state.norms)
        replies = Replies(1, sites, memory.bases, memory.updates, torch.full((count,), 32.0, dtype=torch.float64))
        initial = torch.zeros(values)

        def step() -> None:
            strategy.aggregate(state, replies, sites=sites, initial=initial, limits=LIMITS, out=memory.results)

        weights, spread = torch.full((count, count), 1 / count), torch.empty(count)

        def plain() -> None:
            models, mixed = memory.results.local_models, memory.results.aggregates
            torch.mm(memory.updates, memory.updates.T)
            torch.add(memory.bases, memory.updates, out=models)
            torch.mm(weights, models, out=mixed)
            # By rows: all at once would need the memory of all sites once more.
            for row in range(count):
                spread[row] = torch.dist(local_models[row], mixed[row])

        step(), plain()
        # Not during the timing, because the watcher uses a core now and then.
        with PeakMemory() as peak:
            step()
        found = in_turn({"step": lambda: seconds(step), "plain": lambda: seconds(plain)}, options.repetitions)
    updates = 4 * count * values
    size = f"{count} sites x {values:,} values"
    findings = [
        Ratio(f"aggregation, {size}", "the same sums in plain PyTorch", ratios(found["step"], found["plain"]), 1.5)
    ]
    # Bases, updates, local models and aggregates.
    if 4 * updates > options.server_memory * 2**30:
        memory_ratio = [peak.bytes / updates]
        findings.append(Ratio("largest anonymous memory of the process", "bytes of the updates", memory_ratio, 2.1))
    details = {"seconds": found, "server_memory_gib": options.server_memory}
    report(f"aggregation_{count}", findings, details, threads=threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--server-memory", type=float, default=4.0, help="GiB, like federation.server_memory")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, help="number of torch threads (default: all cores)")
    parser.add_argument("--scratch", type=Path, help="folder for arrays that do not fit into memory")
    return parser.parse_args()


def _fill(array: torch.Tensor, scale: float) -> None:
    """Fill with random values, 16 rows at a time, that have a part common to all sites."""
    common = torch.randn(array.shape[1])
    for rows in array.split(16):
        rows.normal_().add_(common).mul_(scale)


if __name__ == "__main__":
    main()
