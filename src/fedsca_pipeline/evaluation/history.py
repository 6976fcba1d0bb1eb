"""A run's round records as tables: traffic, privacy spent and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def traffic_of(records: Sequence[Any], site_models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what crossed the wire, the chosen round and the privacy spent, by site, as ``final_table`` asks for it."""
    # Of a model trained on pooled data no site has a record.
    return {
        site: {
            "bytes_up": sum(r.sites[site].bytes_up for r in records if site in r.sites),
            "bytes_down": sum(r.sites[site].bytes_down for r in records if site in r.sites),
            "best_round": kept.get("best", {}).get("round"),
            **_privacy_spent([r.sites[site] for r in records if site in r.sites]),
        }
        for site, kept in site_models["sites"].items()
    }


def _privacy_spent(entries: Sequence[Any]) -> dict[str, Any]:
    """Return the last epsilon that a site told of, and its level; nothing where there is no differential privacy."""
    told = [entry for entry in entries if entry.epsilon is not None]
    return {"epsilon": told[-1].epsilon, "privacy": told[-1].privacy_level} if told else {}


def records_of(description: dict[str, Any], round_metrics: Mapping[str, Any]) -> list[Any]:
    """Return this run's round records in order; partitions of other runs are left alone."""
    from fedsca_pipeline.federation.server.checkpoint import RoundRecord

    mine = sorted(key for key in round_metrics if key.startswith(f"{description['fingerprint']}/"))
    return [RoundRecord.from_json(round_metrics[key]()) for key in mine]


def history_table(records: list[Any]) -> pd.DataFrame:
    """Return one row a (round, site): loss, Dice and what else was logged; round 0 is the foundation.

    A record's ``dice_validation`` belongs to the model of the round before, so it moves up one row.
    """
    import pandas as pd

    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for record in records:
        for site, entry in record.sites.items():
            if entry.absent is not None:
                continue
            rows.setdefault((record.round - 1, site), {})["dice_validation"] = entry.dice_validation
            if not record.final:
                rows.setdefault((record.round, site), {}).update(
                    loss=entry.loss, dice_local=entry.dice_local, self_weight=entry.self_weight, seconds=entry.seconds
                )
    columns = ["dice_validation", "loss", "dice_local", "self_weight", "seconds"]
    return pd.DataFrame(
        [
            {"round": round_, "site": site, **dict.fromkeys(columns), **row}
            for (round_, site), row in sorted(rows.items())
        ]
    )


def weights_by_round(records: list[Any]) -> dict[int, pd.DataFrame]:
    """Return the mixing weights of each round, mean over groups, by name of the accepted sites; rows receive."""
    import numpy as np
    import pandas as pd

    return {
        record.round: pd.DataFrame(
            np.asarray(record.weights).mean(axis=0), index=record.accepted, columns=record.accepted
        )
        for record in records
        if record.weights
    }
