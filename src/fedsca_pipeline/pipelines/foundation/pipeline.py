"""Pipeline of the foundation."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.foundation.nodes import fetch_foundation


def create_pipeline() -> Pipeline:
    """Return the pipeline that fetches the weights and records their provenance."""
    return pipeline(
        [
            node(
                fetch_foundation,
                inputs=["foundations", "params:foundation"],
                outputs="foundation_provenance",
                name="fetch_foundation",
            )
        ]
    )
