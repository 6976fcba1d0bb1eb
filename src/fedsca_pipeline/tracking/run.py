"""A federated run in MLflow: one parent run and one nested run per site, however many commands the run takes.

The run's fingerprint identifies the MLflow run: a resumed training and a separate evaluation command write into the
same one. MLflow is imported with the first logging call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.tracking.writer import (
    DATA_TAG,
    FINGERPRINT_TAG,
    PARENT_TAG,
    SITE_TAG,
    MlflowWriter,
    TrackingConfig,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

# MLflow takes no more in one call.
_MOST_METRICS = 1000
# Between two times of logging rounds, in units of what the first took.
_PAUSE = 10


class Tracker(MlflowWriter):
    """Writes one federated run to MLflow, each dataset when it is saved."""

    def __init__(self, config: TrackingConfig, project: Path, command: str) -> None:
        super().__init__(config, project, command)
        self._runs: dict[str, str] = {}
        # The values that are logged already, by run, metric and step: a killed command may have left some.
        self._logged: dict[tuple[str, str, int], float] = {}
        self._waiting: dict[str, list[Metric]] = {}
        # Of time.monotonic: when the waiting metrics are logged.
        self._next = 0.0
        self._levels: dict[str, str] = {}
        self._handlers: dict[str, Callable[[Any], None]] = {
            "round_metrics": self._log_round,
            "site_models": self._log_models,
            "final_metrics": self._log_final,
            "volume_metrics": self._log_final,
        }

    @property
    def run_id(self) -> str | None:
        """Id of the parent run; None if no run is open."""
        return self._runs.get("")

    def open(self, description: Mapping[str, Any]) -> None:
        """Resume the newest run with this fingerprint, or start a run.

        Raises:
            TrackingError: MLflow cannot be reached or written to. The other methods raise it, too.
        """
        if not self._config.enabled or self._runs:
            return
        with self._reported():
            self._find_or_start(description)

    def _find_or_start(self, description: Mapping[str, Any]) -> None:
        client = self._connect()
        self._open_experiment(client, self._config.experiment)
        newest_first = ["attributes.start_time DESC"]
        found = self._search([self.experiment_id], FINGERPRINT_TAG, description["fingerprint"], order_by=newest_first)
        parents = [run for run in found if SITE_TAG not in run.data.tags]
        if parents:
            parent = parents[0]
            client.update_run(parent.info.run_id, status="RUNNING")
            self._remember(parent)
        else:
            parent = self._start(description)
        self._log_parameters(parent, description["configuration"])
        self._runs = {"": parent.info.run_id}
        self._open_site_runs(description)

    def saved(self, dataset: str, data: Any, filepath: Path | None) -> None:
        """Log a dataset that a node has saved, if it belongs to the run."""
        if self._client is None:
            return
        with self._reported():
            if dataset != "round_metrics":
                self._log_waiting()
            if handler := self._handlers.get(dataset):
                handler(data)
            if filepath is not None:
                self._log_file(dataset, filepath)

    def close(self, status: str) -> None:
        """End the parent run and its nested runs with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        if self._client is None:
            return
        with self._reported():
            self._log_waiting()
            for run_id in reversed(self._runs.values()):
                self._client.set_terminated(run_id, status)
        self._client, self._runs, self._logged = None, {}, {}

    def log_models(self, models: Path) -> None:
        """Log each site's folder of models to its nested run."""
        if self._client is None or not self._config.log_models:
            return
        with self._reported():
            for site, run_id in self._runs.items():
                if site and (models / site).is_dir():
                    self._client.log_artifacts(run_id, str(models / site), "model")

    def _start(self, description: Mapping[str, Any]) -> Any:
        client = self._require()
        configuration = description["configuration"]
        federation, foundation = configuration["federation"], configuration["foundation"]
        name = f"{federation['strategy']}-{foundation['name']}-{description['fingerprint'][:6]}"
        tags = {
            FINGERPRINT_TAG: description["fingerprint"],
            "fedsca.strategy": federation["strategy"],
            "fedsca.foundation": foundation["name"],
            "fedsca.foundation_sha256": description["foundation"],
            DATA_TAG: json.dumps(description["data"], sort_keys=True),
            "fedsca.code": description["code"],
            "fedsca.threads": str(description["threads"]),
            "fedsca.seed": str(configuration["run"]["seed"]),
            **self._source_tags(),
        }
        return client.create_run(self.experiment_id, run_name=name, tags=tags)

    def _open_site_runs(self, description: Mapping[str, Any]) -> None:
        client = self._require()
        children = {
            run.data.tags[SITE_TAG]: run for run in self._search([self.experiment_id], PARENT_TAG, self._runs[""])
        }
        for site, data in description["data"].items():
            if site in children:
                self._runs[site] = children[site].info.run_id
                client.update_run(self._runs[site], status="RUNNING")
                self._remember(children[site])
            else:
                tags = {
                    PARENT_TAG: self._runs[""],
                    FINGERPRINT_TAG: description["fingerprint"],
                    SITE_TAG: site,
                    DATA_TAG: data,
                }
                self._runs[site] = client.create_run(self.experiment_id, run_name=site, tags=tags).info.run_id

    def _remember(self, run: Run) -> None:
        for key in run.data.metrics:
            for metric in self._require().get_metric_history(run.info.run_id, key):
                self._logged[run.info.run_id, key, metric.step] = metric.value

    def _log_waiting(self) -> None:
        """Log the metrics that wait, all rounds of a run in one call; then let the next wait ten times as long.

        A call takes some 8 ms. With many sites and short rounds, calls for each site and round would take longer than
        the rounds; so they take a tenth of the time.
        """
        began = time.monotonic()
        for run_id, metrics in self._waiting.items():
            while some := metrics[:_MOST_METRICS]:
                self._require().log_batch(run_id, metrics=some)
                self._logged |= {(run_id, metric.key, metric.step): metric.value for metric in some}
                # At once: if the next call fails, these are not logged again.
                del metrics[:_MOST_METRICS]
        self._waiting.clear()
        ended = time.monotonic()
        self._next = ended + _PAUSE * (ended - began)

    def _wait(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Keep the metrics that are not logged yet: MLflow would store a repeated step as two points."""
        new = [metric for metric in metrics if (run_id, metric.key, metric.step) not in self._logged]
        if new:
            self._waiting.setdefault(run_id, []).extend(new)

    def _log_round(self, chunk: Any) -> None:
        """Log the records of finished rounds; skip what an earlier command logged already."""
        if not isinstance(chunk, Mapping):
            return
        client = self._require()
        for record in chunk.values():
            for site, entry in record["sites"].items():
                # Pooled sites train as one site that has no run: its metrics go to the parent.
                run_id = self._runs.get(site, self._runs[""])
                self._wait(run_id, _site_metrics(record, entry))
                if (level := entry.get("privacy_level")) and self._levels.get(run_id) != level:
                    client.set_tag(run_id, "fedsca.privacy", level)
                    self._levels[run_id] = level
            self._wait(self._runs[""], _metrics_over_sites(record))
            if record["weights"]:
                client.log_dict(self._runs[""], record, f"rounds/round_{record['round']:05d}.json")
        if time.monotonic() >= self._next:
            self._log_waiting()

    def _log_models(self, index: Mapping[str, Any]) -> None:
        client = self._require()
        for site, models in index["sites"].items():
            for name, entry in models.items():
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


def _site_metrics(record: Mapping[str, Any], entry: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics of one site in one round."""
    from mlflow.entities import Metric

    step, now = record["round"], int(time.time() * 1000)
    values = {key: value for key, value in entry.items() if isinstance(value, int | float)}
    validation = values.pop("dice_validation", None)
    metrics = [] if record["final"] else [Metric(key, value, now, step) for key, value in values.items()]
    if validation is not None:
        # A site's model at the beginning of a round is the model of the previous round.
        metrics.append(Metric("dice_validation", validation, now, step - 1))
    return metrics


def _metrics_over_sites(record: Mapping[str, Any]) -> list[Metric]:
    """Return one round's means and totals over sites."""
    from mlflow.entities import Metric

    step, now = record["round"], int(time.time() * 1000)
    everyone = list(record["sites"].values())
    present = [entry for entry in everyone if entry["absent"] is None]
    metrics = []
    for key, name, reduce in _OVER_SITES:
        validation = key == "dice_validation"
        if record["final"] and not validation:
            continue
        # Bytes sent to a site that then failed count, too.
        entries = everyone if key.startswith("bytes") else present
        if values := [entry[key] for entry in entries if entry.get(key) is not None]:
            metrics.append(Metric(f"{key}_{name}", reduce(values), now, step - 1 if validation else step))
    return metrics


_OVER_SITES: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("loss", "mean", lambda values: sum(values) / len(values)),
    ("dice_validation", "mean", lambda values: sum(values) / len(values)),
    ("dice_validation", "worst", min),
    ("self_weight", "mean", lambda values: sum(values) / len(values)),
    ("epsilon", "largest", max),
    ("bytes_up", "total", sum),
    ("bytes_down", "total", sum),
)

# Datasets, by the last part of their name, whose files are artifacts, and their artifact folders.
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
