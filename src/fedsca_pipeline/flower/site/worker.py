"""The site's worker: prepares, trains, exports and tests, in one long-lived process.

A run's foundation is loaded once, by whatever task needs it first, and is all of the run's models in turn.

The work folder has the layout of ``data/``, and the functions are those of the pipelines: a site does here what
``kedro run`` would do with it in process. Started by the site's command (``worker_process``), never by hand.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import PrivacyBound, PrivacyConfig, RunConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.errors import ConfigError, DataError, FedscaError, MessageError, SiteError, WeightsError
from fedsca_pipeline.evaluation.examples import draw_examples
from fedsca_pipeline.evaluation.scoring import score_test_images
from fedsca_pipeline.evaluation.tables import site_means
from fedsca_pipeline.evaluation.volume_scoring import score_test_volumes
from fedsca_pipeline.evaluation.volume_tables import site_volume_means, volume_table
from fedsca_pipeline.federation.export import write_site_models
from fedsca_pipeline.federation.messages.manifest import outline
from fedsca_pipeline.federation.run import RunFolder, code_version, data_version
from fedsca_pipeline.federation.setup import Setup, set_up
from fedsca_pipeline.federation.site.privacy.ledger import Vault
from fedsca_pipeline.federation.site.steps import ignore_step
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import strategy_class, strategy_options
from fedsca_pipeline.files import remove_partial_files, write_bytes, write_json
from fedsca_pipeline.flower.config import SiteConfig, read_site_config
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.site.memory_limit import OUT_OF_MEMORY, is_shortage, lift_limit, limit_memory
from fedsca_pipeline.model.foundation import prepare_foundation
from fedsca_pipeline.model.in_turn import ModelsInTurn

logger = logging.getLogger(__name__)

UNKNOWN_RUN = "unknown run"
"""How a failure begins whose cure is to open the run at the site."""

Row = TypeVar("Row", documents.Means, documents.VolumeMeans)


@dataclass(frozen=True)
class Places:
    """Where a site's files are; ``raw``, ``private``, ``models``, ``checkpoints`` and ``predictions`` are folders."""

    site: str
    raw: Path
    private: Path
    terms: Path
    prepared: Path
    report: Path
    manifest: Path
    arrays: Path
    models: Path
    checkpoints: Path
    scores: Path
    volume_scores: Path
    predictions: Path
    overlays: Path

    @classmethod
    def of(cls, config: SiteConfig) -> Places:
        """Return the places below a site's work folder."""
        root = config.work
        return cls(
            site=config.site,
            raw=root / "01_raw",
            private=root / "private",
            terms=root / "02_intermediate" / "terms.json",
            prepared=root / "02_intermediate" / "prepared.json",
            report=root / "02_intermediate" / "report.json",
            manifest=root / "03_primary" / "manifest.csv",
            arrays=root / "05_model_input" / "arrays.safetensors",
            models=root / "06_models",
            checkpoints=root / "07_model_output" / "checkpoints",
            scores=root / "07_model_output" / "test_scores.csv",
            volume_scores=root / "07_model_output" / "volume_scores.csv",
            predictions=root / "07_model_output" / "predictions",
            overlays=root / "08_reporting" / "overlays.png",
        )

    def load_manifest(self) -> pd.DataFrame | None:
        """Return the manifest, or None where the data have not been prepared yet."""
        if not self.manifest.is_file():
            return None
        return pd.read_csv(self.manifest, dtype=dict(MANIFEST_DTYPES), keep_default_na=False)

    def link_raw(self, data: Path) -> None:
        """Let the data folder be found under the site's name, whatever it is called."""
        link = self.raw / self.site
        self.raw.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.readlink() != data:
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(data)


@dataclass(frozen=True)
class Learner:
    """What a run trains with at this site: its setup, and the worker that holds the setup's model."""

    setup: Setup
    worker: LocalWorker


class SiteWork:
    """One site's answers to the coordinator's tasks, each the same however often it is asked for."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.places = Places.of(config)
        # Of what this process runs, not of what lies on the disk once another version has been installed.
        self._code = code_version()
        self._tasks: Mapping[str, Callable[[Path, int, bytes], bytes]] = {
            "prepare": self._prepare,
            "open": self._open,
            "round": self._round,
            "finish": self._finish,
        }
        self._learner = functools.lru_cache(maxsize=1)(self._build_learner)

    def answer(self, kind: str, round_: int, payload: bytes, begun: str = "") -> bytes:
        """Answer one task; what is kept of one beginning of a run (``documents.Task``) is of no concern to another.

        Raises:
            MessageError: there is no such task, or the payload is not of its form.
            FedscaError: the site cannot do it.
        """
        if kind not in self._tasks:
            raise MessageError(f"there is no task {kind!r}")
        return self._tasks[kind](self.places.checkpoints / begun, round_, payload)

    def _prepare(self, _checkpoints: Path, _round: int, payload: bytes) -> bytes:
        terms = documents.read(documents.Terms, payload)
        self._same_code(terms.code)
        settings = documents.settings(terms.configuration)
        # Whatever this comes to, what was prepared before is no longer what lies here.
        self.places.prepared.unlink(missing_ok=True)
        self.places.link_raw(self.config.data)
        self.places.arrays.parent.mkdir(parents=True, exist_ok=True)
        site = prepare_site(
            self.places.raw,
            self.config.site,
            settings.preprocessing,
            settings.run.seed,
            self.places.load_manifest(),
            scratch=self.places.arrays.parent,
        )
        foundation = prepare_foundation(settings.foundation, self.config.foundation_root, announce=logger.info)
        site.arrays.move_to(self.places.arrays)
        write_bytes(self.places.manifest, site.manifest.to_csv(index=False).encode())
        write_json(self.places.report, site.report)
        counts = site.report["counts"]
        prepared = documents.Prepared(
            site=self.config.site,
            version=data_version(site.report["fingerprint"], site.report),
            foundation=foundation.sha256,
            samples=len(self._data().rows("train")),
            **{split: counts[split] for split in ("train", "validation", "test")},
        )
        write_bytes(self.places.terms, documents.write(terms))
        write_bytes(self.places.prepared, documents.write(prepared))
        logger.info(
            "%s: %d images prepared, %d of them for training", self.config.site, counts["used"], counts["train"]
        )
        return documents.write(prepared)

    def _open(self, checkpoints: Path, _round: int, payload: bytes) -> bytes:
        run = documents.read(documents.Description, payload)
        # States are kept under this name: two runs must not go by one.
        if run.fingerprint != run.worked_out():
            raise MessageError(f"Description: its fingerprint is {run.fingerprint}, that of what it says is another")
        settings = documents.settings(run.configuration)
        name = settings.federation.strategy
        strategy_options(name, settings.strategy_options)
        if strategy_class(name).pools:
            raise ConfigError(f"{name} pools the sites' images, and this site's stay here")
        self._refuse_unfit(run)
        path = _description_file(checkpoints, run.fingerprint)
        if not path.is_file():
            # Of a run that is never finished; of one that goes on it is made again.
            remove_partial_files(self.places.checkpoints)
        write_bytes(path, documents.write(run))
        logger.info("%s: takes part in run %s (%s)", self.config.site, run.fingerprint, name)
        return documents.write(documents.Opened(site=self.config.site, run=run.fingerprint))

    def _round(self, checkpoints: Path, round_: int, payload: bytes) -> bytes:
        run = outline(payload, max_bytes=self.config.resources.most_bytes)["manifest"]["run"]
        description = self._description(checkpoints, run)
        learner, store = self._learner(documents.write(description)), self._store(checkpoints, run)
        with self._computing(description):
            return learner.worker.work(payload, round_, self.config.site, self._data(), store, ignore_step)

    def _finish(self, checkpoints: Path, _round: int, payload: bytes) -> bytes:
        run = documents.read(documents.Finished, payload).run
        description = self._description(checkpoints, run)
        places, manifest = self.places, self.places.load_manifest()
        learner = self._learner(documents.write(description))
        settings, start = learner.setup.settings, learner.worker.initial
        names = settings.preprocessing.names
        with self._computing(description):
            index = write_site_models(
                learner.setup,
                start,
                description.model_dump(),
                [manifest],
                self.config.foundation_root,
                checkpoints,
                places.models,
            )
            in_turn = ModelsInTurn(learner.worker.model, description.foundation, start)
            testing = (in_turn, settings, index, places.models)
            scores = score_test_images(*testing, manifest, places.arrays)
            write_bytes(places.scores, scores.to_csv(index=False).encode())
            volumes = self._score_volumes(testing, manifest)
            figure = draw_examples(in_turn, settings, scores, places.models, manifest, places.arrays)
        places.overlays.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(places.overlays)
        remove_partial_files(checkpoints)
        kept = index["sites"][self.config.site]
        return documents.write(
            documents.Scores(
                site=self.config.site,
                run=run,
                means=rows_of(documents.Means, site_means(scores, names)),
                volumes=rows_of(documents.VolumeMeans, site_volume_means(volumes, names)),
                rounds={name: entry["round"] for name, entry in kept.items()},
                dice_validation={name: entry["dice_validation"] for name, entry in kept.items()},
            )
        )

    def _score_volumes(self, testing: tuple[Any, ...], manifest: pd.DataFrame) -> pd.DataFrame:
        """Score the test volumes and write what the chosen model makes of them; of none where there are only images."""
        if (manifest["volume"] == "").all():
            return volume_table(self.config.site, "before", {})
        places = self.places
        scores = score_test_volumes(*testing, places.raw, places.private, places.predictions, manifest, places.arrays)
        write_bytes(places.volume_scores, scores.to_csv(index=False).encode())
        return scores

    def _same_code(self, theirs: str) -> None:
        if self._code != theirs:
            raise ConfigError(
                f"this site runs code {self._code}, the coordinator {theirs}; install the same version of "
                "fedsca_pipeline, and of the libraries in requirements.lock, at both"
            )

    def _description(self, checkpoints: Path, run: str) -> documents.Description:
        path = _description_file(checkpoints, run)
        # A run's name becomes a path here.
        if not re.fullmatch(documents.RUN_PATTERN, run) or not path.is_file():
            raise SiteError(f"{UNKNOWN_RUN} {run[:16]!r}: this site does not take part in it")
        description = documents.read(documents.Description, path.read_bytes())
        # The site's file, code and data may have changed since the run was opened.
        self._refuse_unfit(description)
        return description

    def _refuse_unfit(self, run: documents.Description) -> None:
        """Do nothing where this site, as it is now, can take part in a run.

        Raises:
            ConfigError: its code, data or foundation are others than the run was made for, or its owner allows less.
        """
        self._same_code(run.code)
        most = self.config.resources.most_threads
        if most is not None and run.threads > most:
            raise ConfigError(f"run.threads: {run.threads}, but resources.most_threads of this site is {most}")
        _private_enough(self.config.privacy, documents.settings(run.configuration).training.privacy)
        if not (self.places.terms.is_file() and self.places.prepared.is_file()):
            raise ConfigError("this site's data are not prepared; run the coordinator's command again")
        terms = documents.read(documents.Terms, self.places.terms.read_bytes())
        if terms.configuration != run.configuration:
            raise ConfigError(
                "this site's data were prepared for another run since; of two coordinators end one, then run the "
                "other's command again"
            )
        prepared = documents.read(documents.Prepared, self.places.prepared.read_bytes())
        _same("data", prepared.version, run.data.get(self.config.site))
        _same("foundation", prepared.foundation, run.foundation)

    def _computing(self, description: documents.Description) -> Any:
        return deterministic(RunConfig(device=self.config.resources.device), description.threads)

    def _data(self) -> SiteArrays:
        return SiteArrays(self.places.arrays, self.places.load_manifest())

    def _store(self, checkpoints: Path, run: str) -> SiteStore:
        vault = Vault(self.places.private / self.config.site, self.config.privacy)
        return SiteStore(RunFolder(checkpoints, run).sites / self.config.site, vault)

    def _build_learner(self, document: bytes) -> Learner:
        description = documents.read(documents.Description, document)
        settings = documents.settings(description.configuration)
        # What is loaded now may not be what the site had when the run was opened.
        foundation = prepare_foundation(settings.foundation, self.config.foundation_root, announce=logger.info)
        _same("foundation", foundation.sha256, description.foundation)
        with self._computing(description) as device:
            setup = set_up(
                settings, self.config.foundation_root, run=description.fingerprint, sites=len(description.data)
            )
            return Learner(setup, setup.worker(device))


def _description_file(checkpoints: Path, run: str) -> Path:
    """Where the description of a run lies that this site takes part in."""
    return checkpoints / run / "run.json"


def _same(what: str, own: str, theirs: str | None) -> None:
    if own != theirs:
        raise ConfigError(f"this site's {what} is {own}, the run was made for {theirs}; start the run anew")


def _private_enough(bound: PrivacyBound | None, offered: PrivacyConfig) -> None:
    """Do nothing where a run keeps to what the site's owner asks for, or nothing is asked.

    Raises:
        ConfigError: it has no differential privacy, or a weaker one.
    """
    if bound is None:
        return
    asked = f"this site's privacy allows epsilon {bound.epsilon:g} at delta {bound.delta:g}"
    if offered.epsilon is None:
        raise ConfigError(f"the run has no differential privacy, and {asked}; set training.privacy.epsilon")
    if offered.epsilon > bound.epsilon or offered.delta > bound.delta:
        raise ConfigError(
            f"training.privacy: the run has epsilon {offered.epsilon:g} at delta {offered.delta:g}, and {asked}; "
            "lower it to that"
        )


def rows_of(kind: type[Row], means: pd.DataFrame) -> list[Row]:
    """Return a table of a site's means as the rows of a document: all of its scores that may leave it."""
    return [kind.model_validate(row) for row in means.drop(columns="site").to_dict("records")]


_TELLABLE = (ConfigError, MessageError, SiteError)
_HELD_BACK = {DataError: "its data were refused", WeightsError: "its weights were refused"}


def outward(error: Exception) -> str:
    """Return what the coordinator may be told of an error: those of data and weights name files, which stay here."""
    if isinstance(error, _TELLABLE):
        return str(error)
    return f"{_HELD_BACK.get(type(error), f'its worker raised {type(error).__name__}')}; the site's own log says more"


def serve(config: SiteConfig, line: socket.socket) -> None:
    """Answer one task after the other until the site's command hangs up, which ends this process at any moment."""
    tasks: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    most = config.resources.most_bytes
    threading.Thread(target=_listen, args=(line, most, tasks), daemon=True).start()
    work = SiteWork(config)
    # A worker that was killed may have left them; no other one is alive.
    remove_partial_files(work.places.checkpoints)
    frames.send(line, {"ready": True})
    while True:
        header, payload = tasks.get()
        try:
            answer, said = work.answer(header["kind"], header["round"], payload, header["begun"]), {}
        except FedscaError as error:
            if is_shortage(error):
                raise
            logger.warning("%s, round %d: %s", header["kind"], header["round"], error)
            answer, said = b"", {"failed": outward(error)}
        except Exception as error:
            if is_shortage(error):
                raise
            # Whatever a library raises must not end a site's part in the federation; what it was is told here only.
            # What it left in memory, and how much, nobody knows: the next task gets a fresh worker.
            logger.exception("%s, round %d", header["kind"], header["round"])
            answer, said = b"", {"failed": outward(error), "spent": True}
        frames.send(line, said, answer)


def _listen(line: socket.socket, most: int, tasks: queue.SimpleQueue) -> None:
    try:
        while True:
            tasks.put(frames.receive(line, most))
    except (EOFError, OSError):
        os._exit(0)
    except frames.FrameError:
        # Nothing that follows on this line can be read; the site's command starts another worker.
        os._exit(1)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def main() -> None:
    """Be a worker: arguments are the site's YAML file and the number of the socket to the site's command."""
    config = read_site_config(Path(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker: %(message)s")
    logging.captureWarnings(capture=True)
    if config.resources.memory is not None:
        limit_memory(config.resources.memory)
    try:
        serve(config, socket.socket(fileno=int(sys.argv[2])))
    except Exception as error:
        if not is_shortage(error):
            raise
        lift_limit()
        # The site's command says what to do about it; an answer might not find the memory for itself.
        logger.exception("out of memory")
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
