"""The worker of a site: prepares data, trains, exports and tests models, in one long-lived process.

The foundation of a run is loaded once, by the first task that needs it, and serves as each of the run's models in turn.

The work folder has the layout of ``data/``. The worker calls the functions that the pipelines call, so a site gets the
same results as in ``kedro run`` in process. The command of the site starts the worker (``worker_process``).
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
from fedsca_pipeline.config import PrivacyBound, PrivacyConfig, RunConfig, Settings
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.errors import ConfigError, DataError, FedscaError, MessageError, SiteError, WeightsError, counted
from fedsca_pipeline.evaluation.examples import draw_examples
from fedsca_pipeline.evaluation.scoring import score_test_images
from fedsca_pipeline.evaluation.tables import site_means
from fedsca_pipeline.evaluation.volume_scoring import score_test_volumes
from fedsca_pipeline.evaluation.volume_tables import site_volume_means, volume_table
from fedsca_pipeline.federation.export import write_site_models
from fedsca_pipeline.federation.messages.manifest import outline
from fedsca_pipeline.federation.run import RunFolder, code_version, data_version
from fedsca_pipeline.federation.setup import Setup, set_up
from fedsca_pipeline.federation.site.privacy.ledger import PrivacyLedger
from fedsca_pipeline.federation.site.steps import ignore_step
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import strategy_class, strategy_options
from fedsca_pipeline.files import as_cells, remove_partial_files, write_bytes, write_json
from fedsca_pipeline.flower.config import SiteConfig, read_site_config
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.site.memory_limit import OUT_OF_MEMORY, is_out_of_memory, lift_memory_limit, limit_memory
from fedsca_pipeline.flower.site.work_folder import WorkFolder
from fedsca_pipeline.model.foundation import prepare_foundation
from fedsca_pipeline.model.in_turn import ModelsInTurn

logger = logging.getLogger(__name__)

Row = TypeVar("Row", documents.Means, documents.VolumeMeans)

_Testing = tuple[ModelsInTurn, Settings, Mapping[str, Any], Path]


@dataclass(frozen=True)
class Learner:
    """The setup of a run at this site, and the local worker that holds its model."""

    setup: Setup
    worker: LocalWorker


class SiteWork:
    """Answers the tasks of the coordinator for one site. A repeated task gets the same answer."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.folder = WorkFolder.of(config)
        # The code that this process runs, which differs from the files once another version is installed.
        self._code = code_version()
        self._tasks: Mapping[str, Callable[[Path, int, bytes], bytes]] = {
            "prepare": self._prepare,
            "open": self._open,
            "round": self._round,
            "finish": self._finish,
        }
        self._learner = functools.lru_cache(maxsize=1)(self._build_learner)

    def answer(self, kind: str, round_: int, payload: bytes, begun: str = "") -> bytes:
        """Return the answer to one task. Each start of a run (``documents.Task.begun``) has separate checkpoints.

        Raises:
            MessageError: the task is unknown, or the payload does not have its form.
            FedscaError: the site cannot do the task.
        """
        if kind not in self._tasks:
            raise MessageError(f"there is no task {kind!r}")
        return self._tasks[kind](self.folder.checkpoints / begun, round_, payload)

    def _prepare(self, _checkpoints: Path, _round: int, payload: bytes) -> bytes:
        terms = documents.read(documents.PrepareRequest, payload)
        self._check_code(terms.code)
        settings = documents.settings(terms.configuration)
        # Even if this fails, the earlier preparation is no longer valid.
        self.folder.prepared.unlink(missing_ok=True)
        self.folder.link_raw(self.config.data)
        self.folder.arrays.parent.mkdir(parents=True, exist_ok=True)
        site = prepare_site(
            self.folder.raw,
            self.config.site,
            settings.preprocessing,
            settings.run.seed,
            self.folder.load_manifest(),
            scratch=self.folder.arrays.parent,
        )
        foundation = prepare_foundation(settings.foundation, self.config.foundation_root, announce=logger.info)
        site.arrays.move_to(self.folder.arrays)
        write_bytes(self.folder.manifest, as_cells(site.manifest).to_csv(index=False).encode())
        write_json(self.folder.report, site.report)
        counts = site.report["counts"]
        prepared = documents.Prepared(
            site=self.config.site,
            version=data_version(site.report["fingerprint"], site.report),
            foundation=foundation.sha256,
            samples=len(self._data().rows("train")),
            **{split: counts[split] for split in ("train", "validation", "test")},
        )
        write_bytes(self.folder.terms, documents.write(terms))
        write_bytes(self.folder.prepared, documents.write(prepared))
        logger.info(
            "%s: %s prepared, %d for training", self.config.site, counted(counts["used"], "image"), counts["train"]
        )
        return documents.write(prepared)

    def _open(self, checkpoints: Path, _round: int, payload: bytes) -> bytes:
        run = documents.read(documents.Description, payload)
        # States are stored under the fingerprint, so two runs must not share one.
        if run.fingerprint != run.expected_fingerprint():
            raise MessageError(f"Description: its fingerprint is {run.fingerprint}, which does not match its content")
        settings = documents.settings(run.configuration)
        name = settings.federation.strategy
        strategy_options(name, settings.strategy_options)
        if strategy_class(name).pools:
            raise ConfigError(f"{name} pools the images of all sites, and this site's do not leave it")
        self._check_can_join(run)
        path = _description_file(checkpoints, run.fingerprint)
        if not path.is_file():
            # Left by an unfinished run; a resumed run writes them again.
            remove_partial_files(self.folder.checkpoints)
        write_bytes(path, documents.write(run))
        logger.info("%s: takes part in run %s (%s)", self.config.site, run.fingerprint, name)
        return documents.write(documents.Opened(site=self.config.site, run=run.fingerprint))

    def _round(self, checkpoints: Path, round_: int, payload: bytes) -> bytes:
        run = outline(payload, max_bytes=self.config.resources.max_message_bytes)["manifest"]["run"]
        description = self._description(checkpoints, run)
        learner, store = self._learner(documents.write(description)), self._store(checkpoints, run)
        with self._computing(description):
            return learner.worker.work(payload, round_, self.config.site, self._data(), store, ignore_step)

    def _finish(self, checkpoints: Path, _round: int, payload: bytes) -> bytes:
        run = documents.read(documents.FinishRequest, payload).run
        description = self._description(checkpoints, run)
        folder, manifest = self.folder, self._manifest()
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
                folder.models,
            )
            in_turn = ModelsInTurn(learner.worker.model, description.foundation, start)
            testing = (in_turn, settings, index, folder.models)
            scores = score_test_images(*testing, manifest, folder.arrays)
            write_bytes(folder.scores, as_cells(scores).to_csv(index=False).encode())
            volumes = self._score_volumes(testing, manifest)
            figure = draw_examples(in_turn, settings, scores, folder.models, manifest, folder.arrays)
        folder.overlays.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder.overlays)
        remove_partial_files(checkpoints)
        saved = index["sites"][self.config.site]
        return documents.write(
            documents.Scores(
                site=self.config.site,
                run=run,
                means=rows_of(documents.Means, site_means(scores, names)),
                volumes=rows_of(documents.VolumeMeans, site_volume_means(volumes, names)),
                rounds={name: entry["round"] for name, entry in saved.items()},
                dice_validation={name: entry["dice_validation"] for name, entry in saved.items()},
            )
        )

    def _score_volumes(self, testing: _Testing, manifest: pd.DataFrame) -> pd.DataFrame:
        """Score the test volumes and write their predictions; return an empty table for a site without volumes."""
        if (manifest["volume"] == "").all():
            return volume_table(self.config.site, "before", {})
        folder = self.folder
        scores = score_test_volumes(*testing, folder.raw, folder.predictions, manifest, folder.arrays)
        write_bytes(folder.volume_scores, as_cells(scores).to_csv(index=False).encode())
        return scores

    def _check_code(self, theirs: str) -> None:
        if self._code != theirs:
            raise ConfigError(
                f"this site runs code {self._code}, the coordinator {theirs}; install the same versions of "
                "fedsca_pipeline and of the libraries in requirements.lock at both"
            )

    def _description(self, checkpoints: Path, run: str) -> documents.Description:
        path = _description_file(checkpoints, run)
        # The name of the run becomes part of a path.
        if not re.fullmatch(documents.RUN_PATTERN, run) or not path.is_file():
            raise SiteError(f"{documents.UNKNOWN_RUN} {run[:16]!r}: this site does not take part in it")
        description = documents.read(documents.Description, path.read_bytes())
        # Settings, code and data of the site may have changed since the run was opened.
        self._check_can_join(description)
        return description

    def _check_can_join(self, run: documents.Description) -> None:
        """Check that this site can take part in a run now.

        Raises:
            ConfigError: code, data or foundation differ from those of the run, or the site's settings do not allow it.
        """
        self._check_code(run.code)
        most = self.config.resources.most_threads
        if most is not None and run.threads > most:
            raise ConfigError(f"run.threads: {run.threads}, but resources.most_threads of this site is {most}")
        _check_privacy(self.config.privacy, documents.settings(run.configuration).training.privacy)
        if not (self.folder.terms.is_file() and self.folder.prepared.is_file()):
            raise ConfigError("this site's data are not prepared; run the coordinator's command again")
        terms = documents.read(documents.PrepareRequest, self.folder.terms.read_bytes())
        if terms.configuration != run.configuration:
            raise ConfigError(
                "this site's data have since been prepared for another run; if two coordinators run, stop one and "
                "run the command of the other again"
            )
        prepared = documents.read(documents.Prepared, self.folder.prepared.read_bytes())
        _check_same("data", prepared.version, run.data.get(self.config.site))
        _check_same("foundation", prepared.foundation, run.foundation)

    def _computing(self, description: documents.Description) -> Any:
        return deterministic(RunConfig(device=self.config.resources.device), description.threads)

    def _manifest(self) -> pd.DataFrame:
        manifest = self.folder.load_manifest()
        if manifest is None:
            raise ConfigError("this site's data are not prepared; run the coordinator's command again")
        return manifest

    def _data(self) -> SiteArrays:
        return SiteArrays(self.folder.arrays, self._manifest())

    def _store(self, checkpoints: Path, run: str) -> SiteStore:
        ledger = PrivacyLedger(self.folder.private / self.config.site, self.config.privacy)
        return SiteStore(RunFolder(checkpoints, run).sites / self.config.site, run, ledger)

    def _build_learner(self, document: bytes) -> Learner:
        description = documents.read(documents.Description, document)
        settings = documents.settings(description.configuration)
        # The foundation may have changed since the run was opened.
        foundation = prepare_foundation(settings.foundation, self.config.foundation_root, announce=logger.info)
        _check_same("foundation", foundation.sha256, description.foundation)
        with self._computing(description) as device:
            setup = set_up(
                settings, self.config.foundation_root, run=description.fingerprint, sites=len(description.data)
            )
            return Learner(setup, setup.worker(device))


def _description_file(checkpoints: Path, run: str) -> Path:
    """Return the path of the description of a run that this site takes part in."""
    return checkpoints / run / "run.json"


def _check_same(what: str, own: str, theirs: str | None) -> None:
    if own != theirs:
        raise ConfigError(f"this site's {what} is {own}, but the run needs {theirs}; restart the run")


def _check_privacy(bound: PrivacyBound | None, offered: PrivacyConfig) -> None:
    """Check that a run satisfies the privacy bound of the site, if the site has one.

    Raises:
        ConfigError: the run has no differential privacy, or a weaker bound.
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
    """Return a table of means of a site as rows of a document, the only scores that may leave the site."""
    return [kind.model_validate(row) for row in means.drop(columns="site").to_dict("records")]


_PUBLIC = (ConfigError, MessageError, SiteError)
_PRIVATE: Mapping[type[Exception], str] = {DataError: "its data were refused", WeightsError: "its weights were refused"}


def public_reason(error: Exception) -> str:
    """Return the reason to send to the coordinator. Errors about data and weights name files; their text is omitted."""
    if isinstance(error, _PUBLIC):
        return str(error)
    return f"{_PRIVATE.get(type(error), f'its worker raised {type(error).__name__}')}; the site's own log says more"


def serve(config: SiteConfig, connection: socket.socket) -> None:
    """Answer tasks one by one until the command of the site disconnects, which ends this process at once."""
    tasks: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    most = config.resources.max_message_bytes
    threading.Thread(target=_listen, args=(connection, most, tasks), daemon=True).start()
    work = SiteWork(config)
    # Left by a worker that was killed; no other worker runs now.
    remove_partial_files(work.folder.checkpoints)
    frames.send(connection, {"ready": True})
    while True:
        header, payload = tasks.get()
        try:
            answer = work.answer(header["kind"], header["round"], payload, header["begun"])
            reply: dict[str, Any] = {}
        except FedscaError as error:
            if is_out_of_memory(error):
                raise
            logger.warning("%s, round %d: %s", header["kind"], header["round"], error)
            answer, reply = b"", {"failed": public_reason(error)}
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # An unexpected error must not end the site's part in the federation. Its text stays in the log of the site.
            # The state of this process is unknown, so the next task gets a new worker.
            logger.exception("%s, round %d", header["kind"], header["round"])
            answer, reply = b"", {"failed": public_reason(error), "spent": True}
        frames.send(connection, reply, answer)


def _listen(connection: socket.socket, most: int, tasks: queue.SimpleQueue) -> None:
    try:
        while True:
            tasks.put(frames.receive(connection, most))
    except (EOFError, OSError):
        os._exit(0)
    except frames.FrameError:
        # Nothing more can be read from this connection; the command of the site starts another worker.
        os._exit(1)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def main() -> None:
    """Run a worker. Arguments: the site's YAML file, and the number of the socket to the command of the site."""
    config = read_site_config(Path(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker: %(message)s")
    logging.captureWarnings(capture=True)
    if config.resources.memory is not None:
        limit_memory(config.resources.memory)
    try:
        serve(config, socket.socket(fileno=int(sys.argv[2])))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lift_memory_limit()
        # The command of the site reports the fix; sending an answer from here could run out of memory, too.
        logger.exception("out of memory")
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
