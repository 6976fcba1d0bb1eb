"""Nodes of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import EvaluationConfig, FoundationConfig, PreprocessingConfig, RunConfig
from fedsca_pipeline.evaluation.examples import draw_examples
from fedsca_pipeline.evaluation.history import _mean_over_groups, history_table, records_of, traffic_of
from fedsca_pipeline.evaluation.scoring import score_test_images


def score_site(
    run: RunConfig,
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    evaluation: EvaluationConfig,
    site_models: dict[str, Any],
    foundations: Path,
    models: Path,
    manifest: Any,
    arrays: Path,
) -> Any:
    """Score one site's test images with the foundation (``before``), its last model (``after``) and the chosen one.

    A site that never answered has no model, and only its ``before``.
    """
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.federation.run import resolve_threads
    from fedsca_pipeline.model.in_turn import ModelsInTurn

    with deterministic(run, resolve_threads(run.threads)) as device:
        in_turn = ModelsInTurn.load(foundation, foundations, preprocessing, device)
        return score_test_images(in_turn, preprocessing, evaluation, site_models, models, manifest, arrays)


def draw_overlays(
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    evaluation: EvaluationConfig,
    scores: Any,
    foundations: Path,
    models: Path,
    manifest: Any,
    arrays: Path,
) -> Any:
    """Draw the best, median and worst test image of one site, as the chosen model (or the foundation) segments them."""
    import torch

    from fedsca_pipeline.model.in_turn import ModelsInTurn

    in_turn = ModelsInTurn.load(foundation, foundations, preprocessing, torch.device("cpu"))
    return draw_examples(in_turn, preprocessing, evaluation, scores, models, manifest, arrays)


def tabulate(
    preprocessing: PreprocessingConfig,
    description: dict[str, Any],
    round_metrics: Mapping[str, Any],
    site_models: Mapping[str, Any],
    *scores: Any,
) -> tuple[Any, Any, Any, Any]:
    """Gather the sites' scores: per image, per site, the final table, and that as ``{site: {column: value}}``."""
    import json

    import pandas as pd

    from fedsca_pipeline.evaluation.tables import final_table, site_table

    images = pd.concat(scores, ignore_index=True)
    sites = site_table(images, preprocessing.names)
    final = final_table(sites, traffic_of(records_of(description, round_metrics), site_models))
    return images, sites, final, json.loads(final.set_index("site").to_json(orient="index"))


def draw_curves(description: dict[str, Any], round_metrics: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Draw learning curves, and the weights of every round as an interactive and a still heat map."""
    import pandas as pd

    from fedsca_pipeline.evaluation.figures import learning_curves, weight_heatmap, weight_heatmap_image

    records = records_of(description, round_metrics)
    weights = {
        record.round: pd.DataFrame(_mean_over_groups(record.weights), index=record.accepted, columns=record.accepted)
        for record in records
        if record.weights
    }
    return learning_curves(history_table(records)), weight_heatmap(weights), weight_heatmap_image(weights)
