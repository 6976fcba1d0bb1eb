"""Wiring of federated training."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.federated_training.nodes import describe, export_site_models, train


def create_pipeline(sites: Sequence[str]) -> Pipeline:
    """Cached arrays to one model a site, through checkpointed rounds."""
    return pipeline(
        [
            node(
                describe,
                inputs=["settings", "foundation_provenance", *(f"{site}.report" for site in sites)],
                outputs="run_description",
                name="describe",
                namespace="federated_training",
            ),
            node(
                train,
                inputs=[
                    "settings",
                    "run_description",
                    "params:force",
                    "foundations",
                    "checkpoints",
                    "private_sites",
                    *(name for site in sites for name in (f"{site}.manifest", f"{site}.arrays")),
                ],
                outputs="round_metrics",
                name="train",
                namespace="federated_training",
            ),
            node(
                export_site_models,
                inputs=[
                    "settings",
                    "run_description",
                    "round_metrics",
                    "foundations",
                    "checkpoints",
                    "models",
                    *(f"{site}.manifest" for site in sites),
                ],
                outputs="site_models",
                name="export_site_models",
                namespace="federated_training",
            ),
        ]
    )
