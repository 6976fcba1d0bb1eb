"""MLflow: one parent run for a federated run, one nested run a site, whatever number of commands made it.

A run is found again by its fingerprint: training that was killed and resumed, and an evaluation that comes as a command
of its own, write into the same MLflow run. mlflow is imported when the first thing is logged, not before.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.files import interrupts_deferred

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

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


class Tracker(MlflowWriter):
    """Writes one federated run to MLflow as its datasets are saved."""

    def __init__(self, config: TrackingConfig, project: Path, command: str) -> None:
        super().__init__(config, project, command)
        self._runs: dict[str, str] = {}
        # (run, metric, step) to value: what a killed command has logged already.
        self._logged: dict[tuple[str, str, int], float] = {}
        self._handlers: dict[str, Callable[[Any], None]] = {
            "round_metrics": self._log_round,
            "site_models": self._log_models,
            "final_metrics": self._log_final,
            "volume_metrics": self._log_final,
        }

    @property
    def run_id(self) -> str | None:
        """Id of the parent run, or None while nothing is tracked."""
        return self._runs.get("")

    def open(self, description: Mapping[str, Any]) -> None:
        """Go on with the newest run of this fingerprint, or start one.

        Raises:
            TrackingError: MLflow cannot be reached or written to (so do the other methods).
        """
        if not self._config.enabled or self._runs:
            return
        with self._reported():
            self._find_or_start(description)

    def _find_or_start(self, description: Mapping[str, Any]) -> None:
        client = self._connect()
        experiment = self._experiment(client, self._config.experiment)
        found = client.search_runs(
            [experiment],
            f"tags.`{FINGERPRINT_TAG}` = '{description['fingerprint']}'",
            order_by=["attributes.start_time DESC"],
        )
        parents = [run for run in found if SITE_TAG not in run.data.tags]
        if parents:
            parent = parents[0]
            client.update_run(parent.info.run_id, status="RUNNING")
            self._remember(parent)
        else:
            parent = self._start(experiment, description)
        self._log_parameters(parent, description["configuration"])
        self._runs = {"": parent.info.run_id}
        self._sites(experiment, description)

    def saved(self, dataset: str, data: Any, filepath: Path | None) -> None:
        """Log what a node has just saved, if it is of a kind that belongs to the run."""
        if self._client is None:
            return
        with self._reported():
            if handler := self._handlers.get(dataset):
                handler(data)
            if filepath is not None:
                self._log_file(dataset, filepath)

    def close(self, status: str) -> None:
        """End the run and its nested runs with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        if self._client is None:
            return
        with self._reported():
            for run_id in reversed(self._runs.values()):
                self._client.set_terminated(run_id, status)
        self._client, self._runs, self._logged = None, {}, {}

    def log_models(self, models: Path) -> None:
        """Log every site's folder of models to its nested run."""
        if self._client is None or not self._config.log_models:
            return
        with self._reported():
            for site, run_id in self._runs.items():
                if site and (models / site).is_dir():
                    self._client.log_artifacts(run_id, str(models / site), "model")

    def _start(self, experiment: str, description: Mapping[str, Any]) -> Any:
        client = self._require()
        configuration = description["configuration"]
        federation, foundation = configuration["federation"], configuration["foundation"]
        name = f"{federation['strategy']}-{foundation['name']}-{description['fingerprint'][:6]}"
        tags = {
            FINGERPRINT_TAG: description["fingerprint"],
            "fedsca.strategy": federation["strategy"],
            "fedsca.foundation": foundation["name"],
            "fedsca.foundation_sha256": description["foundation"],
            "fedsca.data_fingerprint": json.dumps(description["data"], sort_keys=True),
            "fedsca.code": description["code"],
            "fedsca.threads": str(description["threads"]),
            "fedsca.seed": str(configuration["run"]["seed"]),
            **self._source_tags(),
        }
        return client.create_run(experiment, run_name=name, tags=tags)

    def _sites(self, experiment: str, description: Mapping[str, Any]) -> None:
        client = self._require()
        children = {
            run.data.tags[SITE_TAG]: run
            for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{self._runs['']}'")
        }
        for site, data in description["data"].items():
            if site in children:
                self._runs[site] = children[site].info.run_id
                client.update_run(self._runs[site], status="RUNNING")
                self._remember(children[site])
            else:
                tags = {
                    "mlflow.parentRunId": self._runs[""],
                    FINGERPRINT_TAG: description["fingerprint"],
                    SITE_TAG: site,
                    "fedsca.data_fingerprint": data,
                }
                self._runs[site] = client.create_run(experiment, run_name=site, tags=tags).info.run_id

    def _remember(self, run: Run) -> None:
        for key in run.data.metrics:
            for metric in self._require().get_metric_history(run.info.run_id, key):
                self._logged[run.info.run_id, key, metric.step] = metric.value

    def _log_steps(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Log what has not been logged; MLflow would keep a step that came twice as two points."""
        new = [metric for metric in metrics if (run_id, metric.key, metric.step) not in self._logged]
        if new:
            self._require().log_batch(run_id, metrics=new)
        self._logged |= {(run_id, metric.key, metric.step): metric.value for metric in new}

    def _log_round(self, chunk: Any) -> None:
        """Log one round; what an earlier command logged of it already is left alone."""
        if not isinstance(chunk, Mapping):
            return
        from mlflow.entities import Metric

        client = self._require()
        for record in chunk.values():
            step, now = record["round"], int(time.time() * 1000)
            # What was sent to a site that then failed crossed the wire all the same.
            everyone = record["sites"].values()
            present = [entry for entry in everyone if entry["absent"] is None]
            for site, entry in record["sites"].items():
                metrics = {key: value for key, value in entry.items() if isinstance(value, int | float)}
                validation = metrics.pop("dice_validation", None)
                batch = [] if record["final"] else [Metric(key, value, now, step) for key, value in metrics.items()]
                if validation is not None:
                    # The model a site had when the round began is that of the round before.
                    batch.append(Metric("dice_validation", validation, now, step - 1))
                # Sites whose data are pooled train as one that has no run of its own.
                self._log_steps(self._runs.get(site, self._runs[""]), batch)
                if level := entry.get("privacy_level"):
                    client.set_tag(self._runs.get(site, self._runs[""]), "fedsca.privacy", level)
            totals = [
                Metric(f"{key}_{name}", value, now, step - 1 if key == "dice_validation" else step)
                for key, name, reduce in _OVER_SITES
                if key == "dice_validation" or not record["final"]
                if (
                    values := [
                        e[key] for e in (everyone if key.startswith("bytes") else present) if e.get(key) is not None
                    ]
                )
                for value in [reduce(values)]
            ]
            self._log_steps(self._runs[""], totals)
            if record["weights"]:
                client.log_dict(self._runs[""], record, f"rounds/round_{step:05d}.json")

    def _log_models(self, index: Mapping[str, Any]) -> None:
        client = self._require()
        for site, kept in index["sites"].items():
            for name, entry in kept.items():
                client.set_tag(self._runs[site], f"fedsca.{name}_round", str(entry["round"]))

    def _log_final(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        client = self._require()
        for row, columns in table.items():
            run_id = self._runs.get(row, self._runs[""])
            for key, value in columns.items():
                name = f"test {key}" if row in self._runs else f"test {key} {row}"
                if isinstance(value, int | float) and self._logged.get((run_id, name, 0)) != value:
                    client.log_metric(run_id, name, value)
                    self._logged[run_id, name, 0] = value

    def _log_file(self, dataset: str, filepath: Path) -> None:
        site, _, name = dataset.rpartition(".")
        if name in _FILES and filepath.is_file():
            self._require().log_artifact(self._runs.get(site, self._runs[""]), str(filepath), _FILES[name])


_OVER_SITES: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("loss", "mean", lambda values: sum(values) / len(values)),
    ("dice_validation", "mean", lambda values: sum(values) / len(values)),
    ("dice_validation", "worst", min),
    ("self_weight", "mean", lambda values: sum(values) / len(values)),
    ("epsilon", "largest", max),
    ("bytes_up", "total", sum),
    ("bytes_down", "total", sum),
)

# Data sets (by the last part of their name) whose files are artifacts, and the folder they go to.
_FILES = {
    "report": "data",
    "test_scores": "tables",
    "image_scores": "tables",
    "site_scores": "tables",
    "volume_scores": "tables",
    "site_volume_scores": "tables",
    "volume_metrics": "tables",
    "final_table": "tables",
    "final_metrics": "tables",
    "overlays": "figures",
    "learning_curves": "figures",
    "weight_heatmap": "figures",
    "weight_heatmap_image": "figures",
    "run_description": "",
}


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
