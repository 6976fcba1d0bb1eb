"""Pipeline of the data report: one node per site, in namespace ``data_report.<site>``, then one across sites.

All nodes are in namespace ``data_report``, so that ``dvc.yaml`` can run them without the demonstration sites.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.data_report.nodes import InspectedSite, compare


def create_pipeline(sites: Sequence[str]) -> Pipeline:
    """Return the pipeline from raw site folders, broken or not, to facts and pages."""
    inspections = [
        node(
            InspectedSite(site).inspect,
            inputs=[
                "raw_sites",
                "demo_sites_summary",
                f"{site}.previous_manifest",
                "params:preprocessing",
                "params:run",
                "params:data_report",
            ],
            outputs=[f"{site}.inspection", f"{site}.data_facts", f"{site}.data_sheet"],
            name="inspect",
            namespace=f"data_report.{site}",
        )
        for site in sites
    ]
    across = node(
        compare,
        inputs=[
            "raw_sites",
            "foundations",
            "params:run",
            "params:foundation",
            "params:data_report",
            *(f"{site}.inspection" for site in sites),
        ],
        outputs=[
            "data_report_page",
            "data_report_index",
            "data_report_table",
            "data_report_map",
            *(f"{site}.data_page" for site in sites),
        ],
        name="compare",
        namespace="data_report",
    )
    return pipeline([*inspections, across])
