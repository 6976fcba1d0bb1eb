"""The deletion of a site's MLflow runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedsca_pipeline.errors import TrackingError
from fedsca_pipeline.tracking.comparison import EXPERIMENT
from fedsca_pipeline.tracking.writer import DATA_TAG, PARENT_TAG, SITE_TAG, MlflowWriter

if TYPE_CHECKING:
    from mlflow.entities import Run

# Artifacts of a parent run that have rows, curves or matrices of every site.
_OF_ALL_SITES = ("rounds", "tables", "figures", "comparison", "run_description.json")


class ForgettingWriter(MlflowWriter):
    """Deletes the runs of one site, and from their parents what shows every site."""

    def out_of_reach(self) -> list[str]:
        """Return what of a site's runs ``forget`` leaves, a phrase each."""
        left = ["means over sites, and parameters, of the runs that it took part in, in MLflow"]
        if not self._config.enabled:
            left.append(f"MLflow at {self.uri}: enabled is false in mlflow.yml, so nothing was deleted there")
        elif self.is_server:
            left.append(f"MLflow at {self.uri} keeps the deleted runs until mlflow gc runs there")
        return left

    @property
    def _is_there(self) -> bool:
        path = self.uri.removeprefix("sqlite:///")
        return self._config.enabled and (path == self.uri or Path(path).exists())

    def runs_of(self, site: str) -> list[Run]:
        """Return the runs of a site, also deleted ones, in this project's experiments; [] without tracking.

        Raises:
            TrackingError: MLflow cannot be reached.
        """
        from mlflow.entities import ViewType

        if not self._is_there:
            return []
        with self._reported():
            client = self._connect()
            names = (self._config.experiment, EXPERIMENT.format(self._config.experiment))
            experiments = [found.experiment_id for name in names if (found := client.get_experiment_by_name(name))]
            return self._search(experiments, SITE_TAG, site, run_view_type=ViewType.ALL) if experiments else []

    def forget(self, site: str) -> int:
        """Delete a site's runs with their artifacts, and return their number.

        Their parents lose the artifacts that show every site, and the site's entry in the tag of the data. A database
        forgets the runs at once; an MLflow server keeps them as deleted until ``mlflow gc`` runs there.

        Raises:
            TrackingError: MLflow cannot be reached or written to.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        runs = self.runs_of(site)
        if not runs:
            return 0
        with self._reported():
            client = self._require()
            for parent in self._ancestors(runs):
                present = {found.path for found in client.list_artifacts(parent.info.run_id)}
                repository = get_artifact_repository(parent.info.artifact_uri, tracking_uri=self.uri)
                for path in present.intersection(_OF_ALL_SITES):
                    repository.delete_artifacts(path)
                data = json.loads(parent.data.tags.get(DATA_TAG, "{}"))
                if data.pop(site, None):
                    client.set_tag(parent.info.run_id, DATA_TAG, json.dumps(data, sort_keys=True))
            for run in runs:
                if run.info.lifecycle_stage == "active":
                    get_artifact_repository(run.info.artifact_uri, tracking_uri=self.uri).delete_artifacts()
                    client.delete_run(run.info.run_id)
        if not self.is_server:
            self._purge([run.info.run_id for run in runs])
        return len(runs)

    def _ancestors(self, runs: list[Run]) -> list[Run]:
        found: dict[str, Run] = {}
        wanted = {run.data.tags[PARENT_TAG] for run in runs if PARENT_TAG in run.data.tags}
        while wanted:
            level = [self._require().get_run(run_id) for run_id in wanted]
            found |= {run.info.run_id: run for run in level}
            wanted = {run.data.tags[PARENT_TAG] for run in level if PARENT_TAG in run.data.tags} - found.keys()
        return list(found.values())

    def _purge(self, run_ids: list[str]) -> None:
        """Remove deleted runs from the database, which otherwise keeps their metrics."""
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", self.uri]
        command += ["--tracking-uri", self.uri, "--run-ids", ",".join(run_ids)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
        if done.returncode:
            raise TrackingError(
                f"MLflow at {self.uri}: the site's runs are marked as deleted, but the database keeps them: "
                f"{done.stderr.strip().splitlines()[-1:]}; run the same command again"
            )
