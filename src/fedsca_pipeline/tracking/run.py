"""MLflow: one parent run for a federated run, one nested run a site, whatever number of commands made it.

A run is found again by its fingerprint: training that was killed and resumed, and an evaluation that comes as a command
of its own, write into the same MLflow run. mlflow is imported when the first thing is logged, not before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.tracking.writer import FINGERPRINT_TAG, SITE_TAG, MlflowWriter, TrackingConfig

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run


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
