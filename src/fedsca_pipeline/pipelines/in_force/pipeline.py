"""Wiring of the parameters in force."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.in_force.nodes import write_in_force


def create_pipeline() -> Pipeline:
    """The merged parameters as one file, which DVC's stages depend on."""
    return pipeline(
        [
            node(
                write_in_force,
                inputs=["settings", "params:demo_sites", "params:data_report", "raw_sites", "dvc_stages"],
                outputs="in_force",
                name="write_in_force",
            )
        ]
    )
