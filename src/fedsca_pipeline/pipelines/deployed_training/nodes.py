"""Nodes of the coordinator: sites join, train in rounds and test. Images and private tensors stay at the sites."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedsca_pipeline.config import Settings
from fedsca_pipeline.federation.run import configuration_of, describe_run, open_run
from fedsca_pipeline.files import write_json
from fedsca_pipeline.flower.config import FlowerConfig


def join(
    settings: Settings,
    foundation_provenance: Mapping[str, Any],
    force: bool,
    flower: FlowerConfig,
    foundations: Path,
    checkpoints: Path,
) -> dict[str, dict[str, Any]]:
    """Ask every site to prepare its data, and return each site's counts and hashes."""
    from fedsca_pipeline.federation.setup import set_up
    from fedsca_pipeline.flower.coordinator.tasks import check_message_size, join_sites

    # Before any site is asked: a message that nginx refuses would never arrive.
    check_message_size(set_up(settings, foundations, run="", sites=len(flower.sites)), flower)
    return join_sites(settings, foundation_provenance["sha256"], flower, checkpoints, force=force)


def describe(
    settings: Settings, foundation_provenance: Mapping[str, Any], joined_sites: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the run's description with its fingerprint, which equals that of a run in process on the same data."""
    configuration = configuration_of(settings)
    return describe_run(
        configuration,
        {site: prepared["version"] for site, prepared in joined_sites.items()},
        foundation_provenance["sha256"],
        configuration["run"]["threads"],
    )


def train(
    settings: Settings,
    description: dict[str, Any],
    joined_sites: Mapping[str, Any],
    force: bool,
    flower: FlowerConfig,
    foundations: Path,
    checkpoints: Path,
) -> Iterator[dict[str, Any]]:
    """Run the rounds that are left, and yield each round's record as soon as it is done."""
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.federation.setup import set_up
    from fedsca_pipeline.flower.coordinator.tasks import open_flower_fleet
    from fedsca_pipeline.flower.messages import documents
    from fedsca_pipeline.model.adapters.attach import start_values
    from fedsca_pipeline.pipelines.progress.rounds import RoundProgress, serve

    folder, federation = open_run(checkpoints, description, force=force), settings.federation
    write_json(folder.joined, joined_sites)
    opening = documents.write(documents.Description(**description))
    with deterministic(settings.run, description["threads"]):
        setup = set_up(settings, foundations, run=folder.fingerprint, sites=len(flower.sites))
        start = start_values(setup.model, setup.strategy.shared())
        with (
            RoundProgress(tuple(flower.sites), federation.rounds) as progress,
            open_flower_fleet(
                flower, begun=folder.begun(), opening=opening, absent=federation.inject_failures
            ) as fleet,
        ):
            samples = {site: prepared["samples"] for site, prepared in joined_sites.items()}
            yield from serve(fleet, progress, setup, start, folder, samples)


def finish(
    settings: Settings,
    description: dict[str, Any],
    round_metrics: Any,
    flower: FlowerConfig,
    foundations: Path,
    checkpoints: Path,
    models: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask every site to write and test its models, and write the general model here.

    Returns the index of the sites' models, and the means of their test scores.
    """
    from fedsca_pipeline.federation.export import write_site_models
    from fedsca_pipeline.federation.setup import set_up
    from fedsca_pipeline.flower.coordinator.tasks import finish_sites
    from fedsca_pipeline.model.adapters.attach import start_values

    scores = finish_sites(settings, description["fingerprint"], flower, checkpoints)
    setup = set_up(settings, foundations, run=description["fingerprint"], sites=len(flower.sites))
    start = start_values(setup.model, setup.strategy.trained())
    index = write_site_models(setup, start, description, [], foundations, checkpoints, models)
    snapshots = {
        site: {
            name: {"round": round_, "dice_validation": entry["dice_validation"][name]}
            for name, round_ in entry["rounds"].items()
        }
        for site, entry in scores.items()
    }
    return {**index, "sites": snapshots}, scores


def tabulate(
    settings: Settings,
    description: dict[str, Any],
    round_metrics: Mapping[str, Any],
    site_models: Mapping[str, Any],
    deployed_scores: Mapping[str, Any],
) -> tuple[Any, Any, Any]:
    """Gather the sites' mean scores: per site, the final table, and that as ``{site: {column: value}}``."""
    from fedsca_pipeline.evaluation.history import records_of, traffic_of
    from fedsca_pipeline.evaluation.tables import final_table, table_of_means
    from fedsca_pipeline.flower.messages import documents

    sites = table_of_means(_rows(deployed_scores, "means", documents.Means), settings.preprocessing.names)
    final = final_table(sites, traffic_of(records_of(description, round_metrics), site_models))
    return sites, final, json.loads(final.set_index("site").to_json(orient="index"))


def tabulate_volumes(settings: Settings, deployed_scores: Mapping[str, Any]) -> tuple[Any, Any]:
    """Gather the sites' mean scores by volume: per site, and of the chosen models as ``{site: {column: value}}``.

    Without volumes both are empty.
    """
    from fedsca_pipeline.evaluation.volume_tables import final_volume_table, volume_table_of_means
    from fedsca_pipeline.flower.messages import documents

    rows = _rows(deployed_scores, "volumes", documents.VolumeMeans)
    sites = volume_table_of_means(rows, settings.preprocessing.names)
    return sites, json.loads(final_volume_table(sites).set_index("site").to_json(orient="index"))


def _rows(deployed_scores: Mapping[str, Any], part: str, kind: type[BaseModel]) -> Any:
    import pandas as pd

    rows = [{"site": site, **row} for site, scores in deployed_scores.items() for row in scores[part]]
    return pd.DataFrame(rows, columns=["site", *kind.model_fields])
