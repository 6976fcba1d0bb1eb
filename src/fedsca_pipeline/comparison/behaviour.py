"""How a method behaves over rounds, read from its cells."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Behaviour:
    """What the reference's server saw and did, means over seeds: sites x sites, and series by round, and by site."""

    similarity: pd.DataFrame
    weights: pd.DataFrame
    self_weight: pd.Series
    update_norm: pd.DataFrame
    spread: pd.Series
