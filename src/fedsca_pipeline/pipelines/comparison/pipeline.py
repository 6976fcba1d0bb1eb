"""Pipeline of the comparison."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.comparison.nodes import plan_comparison, report_comparison, run_cells


def create_pipeline(sites: Sequence[str]) -> Pipeline:
    """Return the pipeline from cached arrays through a grid of trainings to a report."""
    return pipeline(
        [
            node(
                plan_comparison,
                inputs=[
                    "settings",
                    "params:comparison",
                    "foundation_provenance",
                    *(f"{site}.report" for site in sites),
                ],
                outputs="comparison_plan",
                name="plan_comparison",
                namespace="comparison",
            ),
            node(
                run_cells,
                inputs=[
                    "comparison_plan",
                    "params:force",
                    "foundations",
                    "comparison_scratch",
                    "comparison_folder",
                    *(name for site in sites for name in (f"{site}.manifest", f"{site}.arrays")),
                ],
                outputs="comparison_cells",
                name="run_cells",
                namespace="comparison",
            ),
            node(
                report_comparison,
                inputs=["comparison_plan", "comparison_folder", "comparison_cells"],
                outputs=[
                    "comparison_index",
                    "comparison_table",
                    "comparison_tests",
                    "comparison_unseen",
                    "comparison_page",
                    "comparison_html",
                    "comparison_figures",
                ],
                name="report_comparison",
                namespace="comparison",
            ),
        ]
    )
