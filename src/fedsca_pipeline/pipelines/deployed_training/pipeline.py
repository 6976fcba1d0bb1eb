"""Wiring of the coordinator of a deployed federation; preprocessing and evaluation are at the sites."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.deployed_training.nodes import describe, finish, join, tabulate, tabulate_volumes, train


def create_pipeline() -> Pipeline:
    """Sites that join, checkpointed rounds with them, and the table of what they say their models reached."""
    return pipeline(
        [
            node(
                join,
                inputs=[
                    "settings", "foundation_provenance", "params:force", "params:flower", "foundations",
                    "checkpoints",
                ],
                outputs="joined_sites",
                name="join",
                namespace="federated_training",
            ),
            node(
                describe,
                inputs=["settings", "foundation_provenance", "joined_sites"],
                outputs="run_description",
                name="describe",
                namespace="federated_training",
            ),
            node(
                train,
                inputs=[
                    "settings", "run_description", "joined_sites", "params:force", "params:flower", "foundations",
                    "checkpoints",
                ],
                outputs="round_metrics",
                name="train",
                namespace="federated_training",
            ),
            node(
                finish,
                inputs=[
                    "settings", "run_description", "round_metrics", "params:flower", "foundations", "checkpoints",
                    "models",
                ],
                outputs=["site_models", "deployed_scores"],
                name="finish",
                namespace="federated_training",
            ),
            node(
                tabulate,
                inputs=[
                    "settings", "run_description", "round_metrics", "site_models", "deployed_scores",
                ],
                outputs=["site_scores", "final_table", "final_metrics"],
                name="tabulate",
            ),
            node(
                tabulate_volumes,
                inputs=["settings", "deployed_scores"],
                outputs=["site_volume_scores", "volume_metrics"],
                name="tabulate_volumes",
            ),
        ]
    )  # fmt: skip
