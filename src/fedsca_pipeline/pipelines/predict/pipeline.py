"""Wiring of the prediction."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from fedsca_pipeline.pipelines.predict.nodes import predict_images


def create_pipeline() -> Pipeline:
    """One node, from a model and a folder of images to masks and a table."""
    return pipeline(
        [
            node(
                predict_images,
                inputs=["settings", "params:predict", "models", "foundations", "predicted"],
                outputs="predictions_table",
                name="predict",
            )
        ]
    )
