"""Wiring of the import."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.import_sites.nodes import build_sites, place_sites


def create_pipeline() -> Pipeline:
    """A published data set to raw sites."""
    return pipeline(
        [
            node(
                build_sites,
                inputs=[
                    "raw_sites",
                    "private_sites",
                    "params:importer",
                    "params:source",
                    "params:import_options",
                    "params:hide_names",
                    "params:preprocessing",
                ],
                outputs="import_summary",
                name="build_sites",
            ),
            node(place_sites, inputs=["raw_sites", "import_summary"], outputs=None, name="place_sites"),
        ]
    )
