"""The coordinator's tasks beside the rounds: ask the sites to join, and to write and test their models."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import FederationConfig, Settings
from fedsca_pipeline.errors import ConfigError, MessageError, ResumeError, counted
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.messages.codec import most_bytes
from fedsca_pipeline.federation.run import RunFolder, code_version, configuration_of, unfinished_run
from fedsca_pipeline.federation.setup import Setup
from fedsca_pipeline.files import read_json
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator import superlink
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
from fedsca_pipeline.flower.messages import documents

logger = logging.getLogger(__name__)


@contextmanager
def open_flower_fleet(flower: FlowerConfig, **options: Any) -> Iterator[FlowerFleet]:
    """Open the fleet over the SuperLink. ``options`` are those of ``FlowerFleet``; leaving it ends the Flower run."""
    with superlink.open_link(flower) as link, AuditLog(flower.audit) as log:
        yield FlowerFleet(link, flower, log=log, **options)


def check_message_size(setup: Setup, flower: FlowerConfig) -> None:
    """Check that the messages of a run's rounds are no larger than ``flower.max_message``.

    Raises:
        ConfigError: they are; the message has the value that is large enough, and where else it belongs.
    """
    wire_dtype = setup.settings.federation.wire_dtype
    needed = math.ceil(most_bytes(setup.strategy.wire_shapes(), wire_dtype) / 2**20)
    if needed > flower.max_message:
        raise ConfigError(
            f"flower.max_message allows {flower.max_message} MiB, but messages of this run have up to {needed} MiB "
            f"({setup.strategy.name}, {wire_dtype}); set it to {needed}, and client_max_body_size in nginx.conf to "
            f"{needed}m"
        )


def join_sites(
    settings: Settings, foundation: str, flower: FlowerConfig, checkpoints: Path, *, force: bool
) -> dict[str, dict[str, Any]]:
    """Ask every site to prepare its data, wait for all, and return each site's counts and hashes.

    An unfinished run resumes without a site that is away, as a round does: the site's answer at the start of the run
    still holds. ``foundation`` is the SHA-256 of the coordinator's weights.

    Raises:
        ConfigError: the SuperLink cannot be reached, ``run.threads`` is not given, or a site has another foundation, or
            claims more training images than ``flower.sites`` allows it or another number than at the run's start.
        MessageError: a site's answer has another form.
    """
    configuration, federation = configuration_of(settings), settings.federation
    if configuration["run"]["threads"] is None:
        raise ConfigError("run.threads: give a number; a site with another number would order its sums differently")
    request = documents.write(documents.PrepareRequest(configuration=configuration, code=code_version()))
    before = {} if force else _joined_before(checkpoints, configuration)
    known = before.keys() >= set(flower.sites)
    with open_flower_fleet(flower) as fleet:
        answers = fleet.ask(
            "prepare",
            0,
            dict.fromkeys(flower.sites, request),
            deadline=federation.deadline if known else None,
            quorum=federation.quorum if known else len(flower.sites),
            grace=_grace(federation),
        )
    joined = {}
    for site in flower.sites:
        answer = answers[site]
        if isinstance(answer, Failure):
            logger.warning("%s: %s; the run resumes with the site's answer from its start", site, answer.reason)
            joined[site] = documents.Prepared(**before[site])
            continue
        try:
            joined[site] = documents.read(documents.Prepared, answer)
        except MessageError as error:
            raise MessageError(f"{site}: its answer on its data is refused: {error}") from error
    for site, prepared in joined.items():
        if prepared.site != site:
            raise ConfigError(f"{site}: its node answers as {prepared.site}; correct site in its YAML file, or its key")
        if prepared.foundation != foundation:
            raise ConfigError(
                f"{site}: its foundation is {prepared.foundation[:16]}, the coordinator's {foundation[:16]}; put the "
                "same weights at both"
            )
        _check_count(site, prepared, before.get(site), flower.sites[site])
        logger.info("%s: %s to train on, %d to validate", site, counted(prepared.train, "image"), prepared.validation)
    return {site: prepared.model_dump() for site, prepared in joined.items()}


def finish_sites(settings: Settings, run: str, flower: FlowerConfig, checkpoints: Path) -> dict[str, dict[str, Any]]:
    """Ask every site to write and test its models, and return the means of its test scores, sorted by site.

    Left out are sites that cannot test, and sites that do not answer before ``federation.deadline`` or within
    ``federation.grace`` of ``federation.quorum`` answers.
    """
    federation = settings.federation
    request = documents.write(documents.FinishRequest(run=run))
    with open_flower_fleet(flower, begun=RunFolder(checkpoints, run).begun()) as fleet:
        answers = fleet.ask(
            "finish",
            federation.rounds + 2,
            dict.fromkeys(flower.sites, request),
            deadline=federation.deadline,
            quorum=federation.quorum,
            grace=_grace(federation),
        )
    scores = {}
    for site, answer in sorted(answers.items()):
        try:
            scores[site] = read_scores(site, run, answer, settings.preprocessing.classes)
        except MessageError as error:
            logger.warning("%s: no test scores (%s)", site, error)
    return scores


def read_scores(site: str, run: str, answer: bytes | Failure, classes: int) -> dict[str, Any]:
    """Return the scores in a site's answer.

    Raises:
        MessageError: there is no answer, or it is of another site, run or number of classes.
    """
    if isinstance(answer, Failure):
        raise MessageError(answer.reason)
    scores = documents.read(documents.Scores, answer)
    if (scores.site, scores.run) != (site, run):
        raise MessageError(f"scores of site {scores.site}, run {scores.run}")
    scores.check_classes(classes)
    return scores.model_dump()


def _check_count(site: str, prepared: documents.Prepared, before: Mapping[str, Any] | None, most: int | None) -> None:
    """Check the number of training images and slices that a site claims, by which its updates are weighted.

    A claim above the coordinator's bound is refused and not cut to it: the weight would be a number that neither side
    has stated, and nobody would see the lie.

    Args:
        site: the site.
        prepared: its answer.
        before: its answer at the start of the unfinished run that this one resumes; None: there is none.
        most: the bound; None: no bound.

    Raises:
        ConfigError: the number is above the bound, or differs from the earlier one though the data are the same.
    """
    claimed = prepared.samples
    if most is not None and claimed > most:
        raise ConfigError(
            f"{site}: it claims {claimed} training images and slices, and flower.sites.{site} allows {most}; raise "
            "that number if the hospital has so many, else leave the site out"
        )
    if before and before["version"] == prepared.version and before["samples"] != claimed:
        raise ConfigError(
            f"{site}: it claims {claimed} training images and slices, and {before['samples']} of the same data when "
            "the run began; have the hospital look why, or start the run anew with --params=force=true"
        )


def _joined_before(checkpoints: Path, configuration: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sites' answers at the start of an unfinished run of this configuration; empty if there is none.

    Raises:
        ResumeError: their file is damaged.
    """
    description = unfinished_run(checkpoints)
    if description is None or description["configuration"] != configuration:
        return {}
    answers = RunFolder(checkpoints, description["fingerprint"]).joined
    try:
        return read_json(answers) if answers.is_file() else {}
    except ValueError as error:
        raise ResumeError(
            f"{answers}: damaged ({error}); delete it, and the command waits until every site has joined again"
        ) from error


def _grace(federation: FederationConfig) -> float:
    return math.inf if federation.grace is None else federation.grace
