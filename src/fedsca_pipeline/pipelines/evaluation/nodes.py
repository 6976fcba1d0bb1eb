"""Nodes of evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import Settings


def score_site(
    settings: Settings, site_models: dict[str, Any], foundations: Path, models: Path, manifest: Any, arrays: Path
) -> Any:
    """Score one site's test images with the foundation, its last model and the chosen one."""
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.evaluation.scoring import score_test_images
    from fedsca_pipeline.federation.run import resolve_threads
    from fedsca_pipeline.model.in_turn import ModelsInTurn

    with deterministic(settings.run, resolve_threads(settings.run.threads)) as device:
        in_turn = ModelsInTurn.load(settings.foundation, foundations, settings.preprocessing, device)
        return score_test_images(in_turn, settings, site_models, models, manifest, arrays)


def score_volumes(
    settings: Settings,
    site_models: dict[str, Any],
    foundations: Path,
    models: Path,
    raw_sites: Path,
    predictions: Path,
    manifest: Any,
    arrays: Path,
) -> Any:
    """Score one site's test volumes on their own grids, and write the chosen model's predictions."""
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.evaluation.volume_scoring import score_test_volumes
    from fedsca_pipeline.federation.run import resolve_threads
    from fedsca_pipeline.model.in_turn import ModelsInTurn

    with deterministic(settings.run, resolve_threads(settings.run.threads)) as device:
        in_turn = ModelsInTurn.load(settings.foundation, foundations, settings.preprocessing, device)
        return score_test_volumes(in_turn, settings, site_models, models, raw_sites, predictions, manifest, arrays)


def draw_overlays(settings: Settings, scores: Any, foundations: Path, models: Path, manifest: Any, arrays: Path) -> Any:
    """Draw the best, median and worst test image of one site, segmented by its chosen model or the foundation."""
    import torch

    from fedsca_pipeline.evaluation.examples import draw_examples
    from fedsca_pipeline.model.in_turn import ModelsInTurn

    in_turn = ModelsInTurn.load(settings.foundation, foundations, settings.preprocessing, torch.device("cpu"))
    return draw_examples(in_turn, settings, scores, models, manifest, arrays)


def tabulate(
    settings: Settings,
    description: dict[str, Any],
    round_metrics: Mapping[str, Any],
    site_models: Mapping[str, Any],
    *scores: Any,
) -> tuple[Any, Any, Any, Any]:
    """Gather the sites' scores: per image, per site, the final table, and that as ``{site: {column: value}}``."""
    import pandas as pd

    from fedsca_pipeline.evaluation.history import records_of, traffic_of
    from fedsca_pipeline.evaluation.tables import final_table, site_table

    images = pd.concat(scores, ignore_index=True)
    sites = site_table(images, settings.preprocessing.names)
    final = final_table(sites, traffic_of(records_of(description, round_metrics), site_models))
    return images, sites, final, json.loads(final.set_index("site").to_json(orient="index"))


def tabulate_volumes(settings: Settings, *scores: Any) -> tuple[Any, Any, Any]:
    """Gather the sites' scores: per volume, per site, and of the chosen models as ``{site: {column: value}}``."""
    import pandas as pd

    from fedsca_pipeline.evaluation.volume_tables import final_volume_table, site_volume_table

    volumes = pd.concat(scores, ignore_index=True)
    sites = site_volume_table(volumes, settings.preprocessing.names)
    final = final_volume_table(sites)
    return volumes, sites, json.loads(final.set_index("site").to_json(orient="index"))


def draw_curves(description: dict[str, Any], round_metrics: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Draw learning curves, and the weights of every round as an interactive and a still heat map."""
    from fedsca_pipeline.evaluation.figures import learning_curves, weight_heatmap, weight_heatmap_image
    from fedsca_pipeline.evaluation.history import aggregation_weights, history_table, records_of

    records = records_of(description, round_metrics)
    weights = aggregation_weights(records)
    return learning_curves(history_table(records)), weight_heatmap(weights), weight_heatmap_image(weights)
