"""Nodes of the coordinator: the sites join, train in rounds, and test; images and private tensors stay there."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fedsca_pipeline.config import FederationConfig, Settings
from fedsca_pipeline.errors import ConfigError, MessageError
from fedsca_pipeline.federation.run import (
    RunFolder,
    code_version,
    configuration_of,
    describe_run,
    open_run,
    unfinished_run,
)
from fedsca_pipeline.files import read_json, write_json
from fedsca_pipeline.flower.config import FlowerConfig

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fedsca_pipeline.federation.fleets.fleet import Failure


def join(
    settings: Settings, foundation_provenance: Mapping[str, Any], force: bool, flower: FlowerConfig, checkpoints: Path
) -> dict[str, dict[str, Any]]:
    """Ask every site to prepare its data; wait for all, and return what each says of them: counts and hashes.

    An unfinished run resumes without a site that is away, as a round does: the site's answer at the start of the run
    still holds.

    Raises:
        ConfigError: the SuperLink cannot be reached, ``run.threads`` is not given, or a site has another foundation.
    """
    from fedsca_pipeline.federation.fleets.fleet import Failure
    from fedsca_pipeline.flower.messages import documents

    configuration, federation = configuration_of(settings), settings.federation
    if configuration["run"]["threads"] is None:
        raise ConfigError("run.threads: give a number; sites with other numbers of threads would order sums otherwise")
    terms = documents.write(documents.PrepareRequest(configuration=configuration, code=code_version()))
    before = {} if force else _joined_before(checkpoints, configuration)
    known = before.keys() >= set(flower.sites)
    with _fleet(flower) as fleet:
        answers = fleet.ask(
            "prepare",
            0,
            dict.fromkeys(flower.sites, terms),
            deadline=federation.deadline if known else None,
            quorum=federation.quorum if known else len(flower.sites),
            grace=_grace(federation),
        )
    joined = {}
    for site in flower.sites:
        answer = answers[site]
        try:
            if isinstance(answer, Failure):
                logger.warning("%s: %s; the run goes on with what it said when that began", site, answer.reason)
                joined[site] = documents.Prepared(**before[site])
            else:
                joined[site] = documents.read(documents.Prepared, answer)
        except MessageError as error:
            raise MessageError(f"{site}: what it says of its data cannot be taken: {error}") from error
    for site, prepared in joined.items():
        if prepared.site != site:
            raise ConfigError(f"{site}: its node answers as {prepared.site}; correct site in its YAML file, or its key")
        if prepared.foundation != foundation_provenance["sha256"]:
            raise ConfigError(
                f"{site}: its foundation is {prepared.foundation[:16]}, the coordinator's "
                f"{foundation_provenance['sha256'][:16]}; put the same weights at both"
            )
        logger.info("%s: %d images to train on, %d to validate", site, prepared.train, prepared.validation)
    return {site: prepared.model_dump() for site, prepared in joined.items()}


def _joined_before(checkpoints: Path, configuration: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the sites said when an unfinished run of this configuration began; of none: nothing."""
    description = unfinished_run(checkpoints)
    if description is None or description["configuration"] != configuration:
        return {}
    said = RunFolder(checkpoints, description["fingerprint"]).joined
    return read_json(said) if said.is_file() else {}


def _grace(federation: FederationConfig) -> float:
    return math.inf if federation.grace is None else federation.grace


def describe(
    settings: Settings, foundation_provenance: Mapping[str, Any], joined_sites: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the run's description with its fingerprint, which is the one of a run in process on the same data."""
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
            RoundProgress(flower.sites, federation.rounds) as progress,
            _fleet(flower, begun=folder.begun(), opening=opening, absent=federation.inject_failures) as fleet,
        ):
            samples = {site: said["samples"] for site, said in joined_sites.items()}
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
    """Have every site write and test its models, and write the general model here.

    Returns the index of the sites' models, and the means of their test scores. A site that does not answer before
    ``federation.deadline``, or ``federation.grace`` after ``federation.quorum`` sites have, or cannot test, is in
    neither.
    """
    from fedsca_pipeline.federation.export import write_site_models
    from fedsca_pipeline.federation.setup import set_up
    from fedsca_pipeline.flower.messages import documents
    from fedsca_pipeline.model.adapters.attach import start_values

    federation = settings.federation
    wanted = documents.write(documents.FinishRequest(run=description["fingerprint"]))
    with _fleet(flower, begun=RunFolder(checkpoints, description["fingerprint"]).begun()) as fleet:
        answers = fleet.ask(
            "finish",
            federation.rounds + 2,
            dict.fromkeys(flower.sites, wanted),
            deadline=federation.deadline,
            quorum=federation.quorum,
            grace=_grace(federation),
        )
    scores = {}
    for site, answer in answers.items():
        try:
            scores[site] = _scores(site, description["fingerprint"], answer, settings.preprocessing.classes)
        except MessageError as error:
            logger.warning("%s: no test scores (%s)", site, error)
    setup = set_up(settings, foundations, run=description["fingerprint"], sites=len(flower.sites))
    start = start_values(setup.model, setup.strategy.trained())
    index = write_site_models(setup, start, description, [], foundations, checkpoints, models)
    kept = {
        site: {
            name: {"round": round_, "dice_validation": entry["dice_validation"][name]}
            for name, round_ in entry["rounds"].items()
        }
        for site, entry in sorted(scores.items())
    }
    return {**index, "sites": kept}, dict(sorted(scores.items()))


def tabulate(
    settings: Settings,
    description: dict[str, Any],
    round_metrics: Mapping[str, Any],
    site_models: Mapping[str, Any],
    deployed_scores: Mapping[str, Any],
) -> tuple[Any, Any, Any]:
    """Gather the sites' means, as evaluation in process does their scores.

    Returns the tables per site, and at the end, and the latter as ``{site: {column: value}}``.
    """
    import json

    from fedsca_pipeline.evaluation.history import records_of, traffic_of
    from fedsca_pipeline.evaluation.tables import final_table, table_of_means
    from fedsca_pipeline.flower.messages import documents

    sites = table_of_means(_rows(deployed_scores, "means", documents.Means), settings.preprocessing.names)
    final = final_table(sites, traffic_of(records_of(description, round_metrics), site_models))
    return sites, final, json.loads(final.set_index("site").to_json(orient="index"))


def tabulate_volumes(settings: Settings, deployed_scores: Mapping[str, Any]) -> tuple[Any, Any]:
    """Gather the sites' means by volume: per site, and of the chosen models as ``{site: {column: value}}``.

    No site with volumes: no row.
    """
    import json

    from fedsca_pipeline.evaluation.volume_tables import final_volume_table, volume_table_of_means
    from fedsca_pipeline.flower.messages import documents

    sites = volume_table_of_means(
        _rows(deployed_scores, "volumes", documents.VolumeMeans), settings.preprocessing.names
    )
    return sites, json.loads(final_volume_table(sites).set_index("site").to_json(orient="index"))


def _rows(deployed_scores: Mapping[str, Any], part: str, kind: type[BaseModel]) -> Any:
    import pandas as pd

    rows = [{"site": site, **row} for site, scores in deployed_scores.items() for row in scores[part]]
    return pd.DataFrame(rows, columns=["site", *kind.model_fields])


def _scores(site: str, run: str, answer: bytes | Failure, classes: int) -> dict[str, Any]:
    """Return what a site says of its models.

    Raises:
        MessageError: it says nothing, or of another site, run or number of classes.
    """
    from fedsca_pipeline.federation.fleets.fleet import Failure
    from fedsca_pipeline.flower.messages import documents

    if isinstance(answer, Failure):
        raise MessageError(answer.reason)
    scores = documents.read(documents.Scores, answer)
    if (scores.site, scores.run) != (site, run):
        raise MessageError(f"scores of site {scores.site}, run {scores.run}")
    scores.check_classes(classes)
    return scores.model_dump()


def _fleet(flower: FlowerConfig, **options: Any) -> Any:
    """Return the fleet, to be entered; leaving it ends the Flower run."""
    from contextlib import contextmanager

    from fedsca_pipeline.flower.audit.log import AuditLog
    from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
    from fedsca_pipeline.flower.coordinator.superlink import open_link

    @contextmanager
    def opened() -> Iterator[FlowerFleet]:
        with open_link(flower) as link, AuditLog(flower.audit) as log:
            yield FlowerFleet(link, flower, log=log, **options)

    return opened()
