"""Round records of a run as tables: learning curves, aggregation weights, traffic and privacy spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def records_of(description: Mapping[str, Any], round_metrics: Mapping[str, Any]) -> list[Any]:
    """Return this run's round records in order; partitions of other runs are not loaded."""
    from fedsca_pipeline.federation.server.records import RoundRecord

    own = sorted(key for key in round_metrics if key.startswith(f"{description['fingerprint']}/"))
    return [RoundRecord.from_json(round_metrics[key]()) for key in own]


def history_table(records: Sequence[Any]) -> pd.DataFrame:
    """Return one row per round and site: Dice, loss, own weight and seconds. Round 0 is the foundation.

    A record's ``dice_validation`` is the Dice of the model of the round before, so it moves up one row.
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


def aggregation_weights(records: Sequence[Any]) -> dict[int, pd.DataFrame]:
    """Return the aggregation weights by round, sites x sites, as their mean over the groups of tensors.

    Rounds without weights are left out; most strategies have none.
    """
    import pandas as pd

    return {
        record.round: pd.DataFrame(
            record.weights.array.mean(axis=0, dtype=float), index=record.accepted, columns=record.accepted
        )
        for record in records
        if record.weights
    }


def traffic_of(records: Sequence[Any], site_models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by site the bytes sent, the best round and the privacy spent: the ``traffic`` of ``final_table``."""
    # A model that was trained on pooled data has no record of any site.
    return {
        site: {
            "bytes_up": sum(r.sites[site].bytes_up for r in records if site in r.sites),
            "bytes_down": sum(r.sites[site].bytes_down for r in records if site in r.sites),
            "best_round": snapshots.get("best", {}).get("round"),
            **_privacy_spent([r.sites[site] for r in records if site in r.sites]),
        }
        for site, snapshots in site_models["sites"].items()
    }


def _privacy_spent(entries: Sequence[Any]) -> dict[str, Any]:
    """Return a site's last epsilon and its level; empty without differential privacy."""
    private = [entry for entry in entries if entry.epsilon is not None]
    return {"epsilon": private[-1].epsilon, "privacy": private[-1].privacy_level} if private else {}
