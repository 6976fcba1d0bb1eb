"""Wiring of the deletion of a site."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.forget_site.nodes import forget_site


def create_pipeline() -> Pipeline:
    """One node, which deletes what other pipelines have made of a site."""
    return pipeline(
        [
            node(
                forget_site,
                inputs=["params:site", "params:delete_raw", "data_root", "comparison_folder", "forgetting"],
                outputs="forgotten",
                name="forget_site",
            )
        ]
    )
