"""How the reference method behaves over the rounds: similarity, mixing weights and update norms, from its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Behaviour:
    """Server-side behaviour of one method, averaged over seeds.

    ``similarity`` and ``weights`` are sites x sites, means over complete rounds too. ``self_weight`` and ``spread`` are
    means over sites by round; ``update_norm`` is sites x rounds.
    """

    similarity: pd.DataFrame
    weights: pd.DataFrame
    self_weight: pd.Series
    update_norm: pd.DataFrame
    spread: pd.Series


def behaviour_of(results: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> Behaviour:
    """Return the behaviour of a method from its cells' results, one per seed; empty frames if there is none.

    ``sites`` are the training sites. Matrices are averaged over the rounds in which the server accepted all of them.
    """
    rounds = [record for result in results for record in result["rounds"] if not record["final"]]
    complete = [record for record in rounds if "weights" in record and record["accepted"] == sorted(sites)]
    by_site = pd.DataFrame(
        [
            {"round": record["round"], "site": site, **entry}
            for record in rounds
            for site, entry in record["sites"].items()
        ],
        columns=["round", "site", "self_weight", "update_norm", "spread"],
    )
    return Behaviour(
        similarity=_mean_matrix(complete, "similarity", sites),
        weights=_mean_matrix(complete, "weights", sites),
        self_weight=by_site.groupby("round")["self_weight"].mean(),
        update_norm=by_site.pivot_table(index="site", columns="round", values="update_norm"),
        spread=by_site.groupby("round")["spread"].mean(),
    )


def _mean_matrix(rounds: Sequence[Mapping[str, Any]], name: str, sites: Sequence[str]) -> pd.DataFrame:
    if not rounds:
        return pd.DataFrame()
    return pd.DataFrame(np.mean([record[name] for record in rounds], axis=0), index=list(sites), columns=list(sites))
