"""Wiring of preprocessing: one node per site, so that a single site can re-run."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.preprocessing.nodes import PreparedSite


def create_pipeline(sites: Sequence[str]) -> Pipeline:
    """Raw site folders to manifest, arrays and report of each site, in namespace ``preprocessing.<site>``."""
    return pipeline(
        [
            node(
                PreparedSite(site).prepare,
                inputs=[
                    "raw_sites",
                    "model_input",
                    "demo_sites_summary",
                    f"{site}.previous_manifest",
                    "params:preprocessing",
                    "params:run",
                ],
                outputs=[f"{site}.manifest", f"{site}.arrays", f"{site}.report"],
                name="prepare",
                namespace=f"preprocessing.{site}",
            )
            for site in sites
        ]
    )
