"""Wiring of evaluation: scores of each site in namespace ``evaluation.<site>``, then tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.evaluation.nodes import (
    draw_curves,
    draw_overlays,
    score_site,
    score_volumes,
    tabulate,
    tabulate_volumes,
)


def create_scores(sites: Sequence[str], volume_sites: Sequence[str] = ()) -> Pipeline:
    """Test scores of each site and the tables over all sites; of ``volume_sites``, which hold volumes, by these too."""
    scores = [
        node(
            score_site,
            inputs=[
                "settings",
                "site_models",
                "foundations",
                "models",
                f"{site}.manifest",
                f"{site}.arrays",
            ],
            outputs=f"{site}.test_scores",
            name="score",
            namespace=f"evaluation.{site}",
        )
        for site in sites
    ]
    tables = node(
        tabulate,
        inputs=[
            "settings",
            "run_description",
            "round_metrics",
            "site_models",
            *(f"{site}.test_scores" for site in sites),
        ],
        outputs=["image_scores", "site_scores", "final_table", "final_metrics"],
        name="tabulate",
    )
    return pipeline([*scores, tables]) + _create_volume_scores(volume_sites)


def _create_volume_scores(sites: Sequence[str]) -> Pipeline:
    if not sites:
        return pipeline([])
    scores = [
        node(
            score_volumes,
            inputs=[
                "settings",
                "site_models",
                "foundations",
                "models",
                "raw_sites",
                "predictions",
                f"{site}.manifest",
                f"{site}.arrays",
            ],
            outputs=f"{site}.volume_scores",
            name="score_volumes",
            namespace=f"evaluation.{site}",
        )
        for site in sites
    ]
    tables = node(
        tabulate_volumes,
        inputs=["settings", *(f"{site}.volume_scores" for site in sites)],
        outputs=["volume_scores", "site_volume_scores", "volume_metrics"],
        name="tabulate_volumes",
    )
    return pipeline([*scores, tables])


def create_figures(sites: Sequence[str]) -> Pipeline:
    """Overlays of each site, learning curves and weight heat maps."""
    drawings = [
        node(
            draw_overlays,
            inputs=[
                "settings",
                f"{site}.test_scores",
                "foundations",
                "models",
                f"{site}.manifest",
                f"{site}.arrays",
            ],
            outputs=f"{site}.overlays",
            name="draw_overlays",
            namespace=f"evaluation.{site}",
        )
        for site in sites
    ]
    return pipeline(drawings) + create_curves()


def create_curves() -> Pipeline:
    """Learning curves and weight heat maps, which need the rounds' records only."""
    curves = node(
        draw_curves,
        inputs=["run_description", "round_metrics"],
        outputs=["learning_curves", "weight_heatmap", "weight_heatmap_image"],
        name="draw_curves",
    )
    return pipeline([curves])
