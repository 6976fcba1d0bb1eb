"""Writing to MLflow: what training and comparison share."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.files import interrupts_deferred

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


FINGERPRINT_TAG, SITE_TAG, FINISHED = "fedsca.fingerprint", "fedsca.site", "FINISHED"


# MLflow refuses parameter values that are longer.
_LONGEST_PARAMETER = 6000


class TrackingConfig(BaseModel):
    """``mlflow.yml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    tracking_uri: str = "sqlite:///mlflow.db"
    experiment: str = "fedsca"
    log_models: bool = True


class MlflowWriter:
    """What all that writes to MLflow has in common: where that is, and errors that say what to do.

    Args:
        config: ``mlflow.yml``; ``MLFLOW_TRACKING_URI`` in the environment wins over its URI.
        project: root of the project, to which a relative SQLite path refers.
        command: what the user typed, kept as a tag.
    """

    def __init__(self, config: TrackingConfig, project: Path, command: str) -> None:
        self._config, self._project, self._command = config, project, command
        self._client: MlflowClient | None = None

    @property
    def uri(self) -> str:
        """The tracking URI in force, absolute."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self._config.tracking_uri
        path = uri.removeprefix("sqlite:///")
        if path == uri or Path(path).is_absolute():
            return uri
        return f"sqlite:///{self._project / path}"

    def _connect(self) -> MlflowClient:
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # It prints, with a traceback, what it raises too.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self._create_database()
        self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _create_database(self) -> None:
        """Make a SQLite database that is not there yet, whole or not at all.

        MLflow takes seconds to make its tables, and refuses for ever a database in which it was killed meanwhile.
        """
        from mlflow import MlflowClient
        from sqlalchemy.engine import make_url

        name = make_url(self.uri).database if self.uri.startswith("sqlite:///") else None
        if name is None or Path(name).exists() or not Path(name).parent.is_dir():
            return
        path = Path(name)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as folder:
            made = Path(folder) / path.name
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
            try:
                path.hardlink_to(made)
            except OSError:
                # Another command has made one, and may have written to it, or there are no links on this disk.
                if not path.exists():
                    made.replace(path)

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
            # An interrupt within a transaction leaves SQLite locked, and the run could not be marked as killed.
            with interrupts_deferred():
                yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise TrackingError(
                f"MLflow at {self.uri}: {error}. Correct the address (MLFLOW_TRACKING_URI or conf/base/mlflow.yml) or "
                "make room there, or set enabled: false in mlflow.yml; then the same command goes on."
            ) from error

    def _experiment(self, client: MlflowClient, name: str) -> str:
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Beside a SQLite database, not wherever the command happened to be typed.
        path = self.uri.removeprefix("sqlite:///")
        location = (Path(path).parent / "mlartifacts").as_uri() if path != self.uri else None
        return str(client.create_experiment(name, artifact_location=location))

    def _log_parameters(self, run: Run, configuration: Mapping[str, Any]) -> None:
        """Log what the run lacks: MLflow writes a hundred at a time, and a command may have been killed in between."""
        from mlflow.entities import Param

        values = {key: value for key, value in flat(configuration).items() if key not in run.data.params}
        parameters = [Param(key, value[:_LONGEST_PARAMETER]) for key, value in values.items()]
        self._require().log_batch(run.info.run_id, params=parameters)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys and text values; an empty mapping stays as ``{}``."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _git_commit(project: Path) -> str:
    # No shell, and nothing of the user's in the arguments.
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
