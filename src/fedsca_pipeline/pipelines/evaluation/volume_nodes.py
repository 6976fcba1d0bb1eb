"""Nodes of evaluation by volume: of sites that hold volumes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsca_pipeline.config import EvaluationConfig, FoundationConfig, PreprocessingConfig, RunConfig
from fedsca_pipeline.evaluation.volume_scoring import score_test_volumes


def score_volumes(
    run: RunConfig,
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    evaluation: EvaluationConfig,
    site_models: dict[str, Any],
    foundations: Path,
    models: Path,
    raw_sites: Path,
    private_sites: Path,
    predictions: Path,
    manifest: Any,
    arrays: Path,
) -> Any:
    """Score one site's test volumes on their own grids, with the models that ``score_site`` scores slices with.

    What the chosen model makes of them is written to ``predictions/<site>/<stem>.nii.gz``; nothing else stays there.
    """
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.federation.run import resolve_threads
    from fedsca_pipeline.model.in_turn import ModelsInTurn

    with deterministic(run, resolve_threads(run.threads)) as device:
        in_turn = ModelsInTurn.load(foundation, foundations, preprocessing, device)
        return score_test_volumes(
            in_turn, preprocessing, evaluation, site_models, models, raw_sites, private_sites, predictions, manifest,
            arrays,
        )  # fmt: skip


def tabulate_volumes(preprocessing: PreprocessingConfig, *scores: Any) -> tuple[Any, Any, Any]:
    """Gather the sites' scores: per volume, per site, and of the chosen models as ``{site: {column: value}}``."""
    import json

    import pandas as pd

    from fedsca_pipeline.evaluation.volume_tables import final_volume_table, site_volume_table

    volumes = pd.concat(scores, ignore_index=True)
    sites = site_volume_table(volumes, preprocessing.names)
    final = final_volume_table(sites)
    return volumes, sites, json.loads(final.set_index("site").to_json(orient="index"))
