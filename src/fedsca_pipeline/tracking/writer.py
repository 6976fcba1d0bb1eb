"""Shared MLflow writing: connection, experiment, parameters, tags and errors."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.files import LockHeld, interrupts_deferred, open_locked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
FINGERPRINT_TAG, SITE_TAG, DATA_TAG = "fedsca.fingerprint", "fedsca.site", "fedsca.data_fingerprint"

# Runs in one answer of a search.
_PAGE = 1000
# MLflow refuses longer parameter values.
_LONGEST_PARAMETER = 6000
# Time that another command may take to create the database.
_CREATION_SECONDS = 120.0


class TrackingConfig(BaseModel):
    """The settings in ``mlflow.yml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    tracking_uri: str = "sqlite:///mlflow.db"
    experiment: str = "fedsca"
    log_models: bool = True


class MlflowWriter:
    """Base of the MLflow writers: connects to the tracking server, and turns its errors into ``TrackingError``.

    Args:
        config: ``mlflow.yml``; the environment variable ``MLFLOW_TRACKING_URI`` takes precedence over its URI.
        project: the project's root; a relative SQLite path starts there.
        command: the command as typed, logged as a tag.

    ``experiment_id``: that of the experiment in use; empty before a run is open.
    """

    def __init__(self, config: TrackingConfig, project: Path, command: str) -> None:
        self._config, self._project, self._command = config, project, command
        self._client: MlflowClient | None = None
        self.experiment_id = ""

    @property
    def uri(self) -> str:
        """The tracking URI in use, with an absolute path."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self._config.tracking_uri
        path = uri.removeprefix("sqlite:///")
        if path == uri or Path(path).is_absolute():
            return uri
        return f"sqlite:///{self._project / path}"

    @property
    def is_server(self) -> bool:
        """Whether the tracking URI is that of a server, not of a database."""
        return self.uri.partition("://")[0] in {"http", "https", "databricks"}

    def _connect(self) -> MlflowClient:
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # This logger prints a traceback of errors that MLflow raises as well.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self._create_database()
        self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _create_database(self) -> None:
        """Create a missing SQLite database atomically, and remove what killed commands left of theirs.

        MLflow takes seconds to create its tables; if it is killed meanwhile, it refuses that database forever.
        """
        from sqlalchemy.engine import make_url

        name = make_url(self.uri).database if self.uri.startswith("sqlite:///") else None
        if name is None or not (path := Path(name)).parent.is_dir():
            return
        partial = f".{path.name}.*.partial"
        if path.exists() and not any(path.parent.glob(partial)):
            return
        # A partial folder that is there while this process has the lock is that of a killed command.
        with open_locked(path.with_name(f".{path.name}.lock"), _CREATION_SECONDS):
            for left in path.parent.glob(partial):
                shutil.rmtree(left)
            if not path.exists():
                self._create_beside(path)

    def _create_beside(self, path: Path) -> None:
        from mlflow import MlflowClient

        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as folder:
            made = Path(folder) / path.name
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
            try:
                path.hardlink_to(made)
            except OSError:
                # Either another program created the database, and may have written to it, or this disk has no links.
                if not path.exists():
                    made.replace(path)

    def _search(self, experiments: Sequence[str], tag: str, value: str, **options: Any) -> list[Run]:
        """Return every run whose tag has a value. MLflow gives them page by page, a thousand at most."""
        client, token = self._require(), None
        runs: list[Run] = []
        while True:
            page = client.search_runs(
                list(experiments), f"tags.`{tag}` = '{value}'", max_results=_PAGE, page_token=token, **options
            )
            runs += page
            if not (token := page.token):
                return runs

    def _require(self) -> MlflowClient:
        if self._client is None:
            raise RuntimeError("the tracker was used before open()")
        return self._client

    def _source_tags(self) -> dict[str, str]:
        return {
            "fedsca.command": self._command,
            "mlflow.source.name": self._command,
            "mlflow.source.type": "PROJECT",
            "mlflow.source.git.commit": _git_commit(self._project),
        }

    @contextmanager
    def _reported(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            # An interrupt within a transaction would leave SQLite locked: the run could not be marked as killed.
            with interrupts_deferred():
                yield
        except LockHeld as error:
            raise TrackingError(f"MLflow at {self.uri}: another command is still creating it; stop that one") from error
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise TrackingError(
                f"MLflow at {self.uri}: {error}. Correct the address (MLFLOW_TRACKING_URI or conf/base/mlflow.yml), "
                "make room there, or set enabled: false in mlflow.yml; then run the same command again to resume."
            ) from error

    def _open_experiment(self, client: MlflowClient, name: str) -> None:
        """Find or create the experiment, and remember its id."""
        found = client.get_experiment_by_name(name)
        if found is not None:
            self.experiment_id = str(found.experiment_id)
            return
        # Artifacts go beside a SQLite database; MLflow's default is the working directory.
        path = self.uri.removeprefix("sqlite:///")
        location = (Path(path).parent / "mlartifacts").as_uri() if path != self.uri else None
        self.experiment_id = str(client.create_experiment(name, artifact_location=location))

    def _log_parameters(self, run: Run, configuration: Mapping[str, Any]) -> None:
        """Log the parameters that the run lacks: MLflow writes 100 at a time, and a command may be killed between."""
        from mlflow.entities import Param

        values = {key: value for key, value in flat(configuration).items() if key not in run.data.params}
        parameters = [Param(key, value[:_LONGEST_PARAMETER]) for key, value in values.items()]
        self._require().log_batch(run.info.run_id, params=parameters)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested mappings as dotted keys with text values; an empty mapping becomes ``{}``."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _git_commit(project: Path) -> str:
    command = ["git", "rev-parse", "HEAD"]  # no shell, no user input
    try:
        found = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
