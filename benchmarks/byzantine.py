"""Show what one hostile site of four does to the aggregate of each strategy, by server steps on drawn updates.

    python benchmarks/byzantine.py

Three honest sites send a common direction with noise of half its length; the fourth attacks. The error is the distance
of what the first site receives from what it receives if the fourth site is absent, relative to the length of the honest
mean update: 0 is no influence, 1 is as much as the whole update. The median of the drawn rounds is shown, and the
largest of the three honest sites. Updates over ``federation.max_norm_ratio`` times the median norm are rejected, as
always; an attack stays just below. Strategies whose weights follow from the claimed images are shown with the default
``federation.max_share``, without it, and with ``federation.clip_to_median`` beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.federation.strategies.server_step import Replies, ServerState, SiteLimits
from fedsca_pipeline.model.layout import TensorLayout

SITES, VALUES = ("a", "b", "c", "d"), 4096
LAYOUT = TensorLayout(blocks=(("adapter",),), decoder=(), shapes={"adapter": (VALUES,)})
DEFAULTS, FREE, CLIPPED = {}, {"max_share": 1.0}, {"clip_to_median": True}
ROWS = [
    *((name, changed) for name in ("fedavg", "fedsca", "fedamp", "pfedgraph") for changed in (FREE, DEFAULTS, CLIPPED)),
    *((name, DEFAULTS) for name in ("median", "trimmed_mean", "krum")),
]
# Of the honest mean update to the hostile one, and the images that the site claims; honest sites have 30.
ATTACKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "claims 2^31-1 images, sends noise": (lambda mean: torch.randn(VALUES) * mean.norm() / VALUES**0.5, 2.0**31 - 1),
    "claims as many, sends twice the update": (lambda mean: 2 * mean, 2.0**31 - 1),
    "claims as many, turns it round, nine times as long": (lambda mean: -9 * mean, 2.0**31 - 1),
    "turns the update round": (lambda mean: -mean, 30.0),
    "turns it round, nine times as long": (lambda mean: -9 * mean, 30.0),
    "sends noise, nine times as long": (lambda mean: 9 * torch.randn(VALUES) * mean.norm() / VALUES**0.5, 30.0),
}


def main() -> None:
    """Print a row per strategy and limits, and a column per attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=21, help="drawn rounds per figure")
    draws = parser.parse_args().draws
    table = Table("strategy", "federation", *ATTACKS, title="Error of an honest site's aggregate, in honest updates")
    for strategy, changed in ROWS:
        config = FederationConfig(**changed)
        limits = SiteLimits(config.max_norm_ratio, config.max_share, config.clip_to_median)
        errors = (
            statistics.median(_error(strategy, limits, attack, samples, seed) for seed in range(draws))
            for attack, samples in ATTACKS.values()
        )
        said = ", ".join(f"{key}: {str(value).lower()}" for key, value in changed.items())
        table.add_row(strategy, said, *(f"{error:.2f}" for error in errors))
    Console().print(table)


def _error(strategy: str, limits: SiteLimits, attack: Callable[[Tensor], Tensor], samples: float, seed: int) -> float:
    torch.manual_seed(seed)
    direction = torch.randn(VALUES)
    honest = direction + 0.5 * torch.randn(3, VALUES)
    mean = honest.mean(dim=0)
    sent = torch.cat([honest, attack(mean)[None]])
    attacked, alone = (_received(strategy, limits, sent[:count], samples) for count in (4, 3))
    return float(((attacked - alone).norm(dim=1) / mean.norm()).max())


def _received(name: str, limits: SiteLimits, updates: Tensor, samples: float) -> Tensor:
    """Return what the three honest sites receive, [3, V]."""
    count = len(updates)
    claimed = torch.tensor([30.0, 30.0, 30.0, samples][:count], dtype=torch.float64)
    replies = Replies(1, SITES[:count], torch.zeros(4, VALUES), updates.clone(), claimed)
    _, found = build_strategy(name, {}, LAYOUT).aggregate(
        ServerState.initial(4, VALUES, 1), replies, sites=SITES, initial=torch.zeros(VALUES), limits=limits
    )
    return found.aggregates[:3]


if __name__ == "__main__":
    main()
