"""A comparison in MLflow: one parent run, one child run per cell, one grandchild run per site of a cell.

The fingerprint of the comparison's plan identifies the parent, a cell's fingerprint its child: a resumed grid writes
into the same runs. MLflow is imported with the first logging call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.files import fingerprint
from fedsca_pipeline.tracking.writer import PARENT_TAG, SITE_TAG, MlflowWriter, TrackingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run

COMPARISON_TAG, CELL_TAG = "fedsca.comparison", "fedsca.cell"
EXPERIMENT = "{}-comparison"
"""Name of the experiment of comparisons, by the name of the project's experiment."""

# Datasets whose files are artifacts of the parent run.
_FILES = frozenset(
    {
        "comparison_plan",
        "comparison_table",
        "comparison_tests",
        "comparison_unseen",
        "comparison_page",
        "comparison_html",
    }
)


class ComparisonTracker(MlflowWriter):
    """Writes a comparison to MLflow, each cell when it ends."""

    def __init__(self, config: TrackingConfig, project: Path, command: str) -> None:
        super().__init__(config, project, command)
        self.run_id: str | None = None
        self._children: set[str] = set()

    def open(self, plan: Mapping[str, Any]) -> None:
        """Resume the newest run of this plan, or start a run.

        Raises:
            TrackingError: MLflow cannot be reached or written to. The other methods raise it, too.
        """
        if not self._config.enabled or self.run_id:
            return
        with self._reported():
            client = self._connect()
            self._open_experiment(client, EXPERIMENT.format(self._config.experiment))
            # The number of parallel cells changes no result.
            name = fingerprint({**plan, "comparison": {**plan["comparison"], "jobs": None}})
            newest_first = ["attributes.start_time DESC"]
            found = self._search([self.experiment_id], COMPARISON_TAG, name, order_by=newest_first)
            if found:
                run = found[0]
                client.update_run(run.info.run_id, status="RUNNING")
            else:
                tags = {COMPARISON_TAG: name, **self._source_tags()}
                run = client.create_run(self.experiment_id, run_name=f"comparison-{name[:6]}", tags=tags)
            self.run_id = run.info.run_id
            self._log_parameters(run, {"base": plan["base"], "comparison": plan["comparison"]})
            self._children = self._logged_cells()

    def cell(self, result: Mapping[str, Any]) -> None:
        """Log a finished cell, unless it is logged already: a child run, and a run below it for each site."""
        if self._client is None or result["fingerprint"] in self._children:
            return
        with self._reported():
            tags, parameters = _tags(result), _parameters(result)
            name = f"{result['method']}-seed{tags['fedsca.seed']}-{tags['fedsca.train_images']}"
            name += f"-rate{parameters['training']['learning_rate']:g}"
            if result["left_out"]:
                name += f"-without-{result['left_out']}"
            run = self._start(name, self.run_id, tags)
            child = run.info.run_id
            self._log_parameters(run, parameters)
            self._log_metrics(child, _summary(result))
            for record in result["rounds"]:
                self._log_metrics(child, _means(record.get("sites", {}).values()), step=record["round"])
            for site in result["sites"]:
                grandchild = self._start(f"{name}-{site}", child, {**tags, SITE_TAG: site})
                self._log_site(grandchild.info.run_id, result, site)
            # The tag comes last: a child without it is incomplete, and the next command writes the cell again.
            self._require().set_tag(child, CELL_TAG, result["fingerprint"])
            self._require().set_terminated(child, "FINISHED")
            self._children.add(result["fingerprint"])

    def saved(self, dataset: str, filepath: Path | None) -> None:
        """Log a file that a node has saved, if it belongs to the comparison."""
        if self._client is None or filepath is None or dataset not in _FILES:
            return
        with self._reported():
            self._client.log_artifact(self.run_id, str(filepath), "comparison")

    def figures(self, figures: Mapping[str, Figure]) -> None:
        """Log figures; the keys are their paths without suffix."""
        if self._client is None or self.run_id is None:
            return
        with self._reported():
            for path, figure in figures.items():
                self._client.log_figure(self.run_id, figure, f"comparison/results_figures/{path}.png")

    def close(self, status: str) -> None:
        """End the parent run with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        if self._client is None or self.run_id is None:
            return
        with self._reported():
            self._client.set_terminated(self.run_id, status)
        self._client, self.run_id, self._children = None, None, set()

    def _log_site(self, run_id: str, result: Mapping[str, Any], site: str) -> None:
        """Log a site's test scores, its chosen round and its rounds, and end its run."""
        scores = result["sites"][site]
        by_class = {
            f"test dice class {label}": statistics.fmean(dice)
            for label, dice in scores.get("dice_by_class", {}).items()
        }
        self._log_metrics(
            run_id,
            {
                "test dice": statistics.fmean(scores["dice"]),
                "test hd95": statistics.fmean(scores["hd95"]),
                **by_class,
                "dice_validation_best": scores["dice_validation"],
                "best_round": scores["round"],
            },
        )
        for record in result["rounds"]:
            self._log_metrics(run_id, _before_round(record["sites"].get(site, {})), step=record["round"])
        self._require().set_terminated(run_id, "FINISHED")

    def _logged_cells(self) -> set[str]:
        """Return the fingerprints of the cells whose child runs are complete."""
        children = self._search([self.experiment_id], PARENT_TAG, str(self.run_id))
        return {run.data.tags[CELL_TAG] for run in children if CELL_TAG in run.data.tags}

    def _start(self, name: str, parent: str | None, tags: Mapping[str, str]) -> Run:
        tags = {PARENT_TAG: str(parent), **tags}
        return self._require().create_run(self.experiment_id, run_name=name, tags=tags)

    def _log_metrics(self, run_id: str, values: Mapping[str, float | None], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items() if value is not None]
        if metrics:
            self._require().log_batch(run_id, metrics=metrics)


def _tags(result: Mapping[str, Any]) -> dict[str, str]:
    description = result["description"]
    count = description["train_images"]
    return {
        "fedsca.method": result["method"],
        "fedsca.strategy": next(iter(description["configuration"]["strategies"])),
        "fedsca.seed": str(description["seed"]),
        "fedsca.train_images": "all" if count is None else str(count),
        "fedsca.left_out": result["left_out"] or "",
        "fedsca.code": result["code"],
    }


def _parameters(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of a cell, including defaults: MLflow compares only parameters that both runs have."""
    from fedsca_pipeline.config import GROUPS
    from fedsca_pipeline.federation.strategies import strategy_options

    description = result["description"]
    groups = dict(description["configuration"])
    ((strategy, options),) = groups.pop("strategies").items()
    return {
        "method": result["method"],
        "seed": description["seed"],
        "train_images": "all" if description["train_images"] is None else description["train_images"],
        **{name: GROUPS[name].model_validate(values).model_dump(mode="json") for name, values in groups.items()},
        "strategies": {strategy: strategy_options(strategy, options).model_dump(mode="json")},
    }


def _summary(result: Mapping[str, Any]) -> dict[str, float | None]:
    dice = [statistics.fmean(site["dice"]) for site in result["sites"].values()]
    hd95 = [statistics.fmean(site["hd95"]) for site in result["sites"].values()]
    return {
        "test dice mean": statistics.fmean(dice),
        "test dice worst": min(dice),
        "test dice sd": statistics.pstdev(dice),
        "test hd95 mean": statistics.fmean(hd95),
        **result["traffic"],
        "seconds": result["seconds"],
        "peak_memory": result["peak_memory"],
    }


def _means(sites: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the means over sites of a round's metrics."""
    found: dict[str, list[float]] = {}
    for site in sites:
        for key, value in _before_round(site).items():
            found.setdefault(f"{key}_mean", []).append(value)
    return {key: statistics.fmean(values) for key, values in found.items()}


def _before_round(site: Mapping[str, float]) -> dict[str, float]:
    """Return a site's metrics with the validation Dice renamed: it belongs to the model before the round."""
    return {"dice_before_round" if key == "dice_validation" else key: value for key, value in site.items()}
