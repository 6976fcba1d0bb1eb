"""Wiring of the demonstration sites."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.demo_sites.nodes import write_demo_sites


def create_pipeline() -> Pipeline:
    """Raw sites, written if missing."""
    return pipeline(
        [
            node(
                write_demo_sites,
                inputs=["raw_sites", "params:demo_sites"],
                outputs="demo_sites_summary",
                name="write_demo_sites",
            )
        ]
    )
