"""A figure of a site's example images, segmented by its chosen model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import EvaluationConfig, Settings
from fedsca_pipeline.evaluation.scoring import reported

if TYPE_CHECKING:
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.model.in_turn import ModelsInTurn


def draw_examples(
    in_turn: ModelsInTurn,
    settings: Settings,
    scores: pd.DataFrame,
    models: Path,
    manifest: pd.DataFrame,
    arrays: Path,
) -> Any:
    """Return a figure of one site's best, median and worst test image, segmented by its chosen model.

    A site without a chosen model shows the foundation.
    """
    from fedsca_pipeline.data.arrays import SiteArrays, scored_classes
    from fedsca_pipeline.evaluation.figures import choose_examples, overlays

    preprocessing, data = settings.preprocessing, SiteArrays(arrays, manifest)
    model = "chosen" if "chosen" in set(scores["model"]) else "before"
    scored = scores[scores["model"] == model]
    with reported(in_turn, model, models / str(manifest["site"].iloc[0])) as network:
        examples = [
            _example(label, name, scored, data, network, preprocessing.classes, settings.evaluation)
            for label, name in choose_examples(scored).items()
        ]
    return overlays(examples, preprocessing.class_names, scored_classes(data, preprocessing.classes))


def _example(
    label: str, name: str, table: pd.DataFrame, data: SiteArrays, network: Any, classes: int, config: EvaluationConfig
) -> Any:
    import torch

    from fedsca_pipeline.data.arrays import known_classes
    from fedsca_pipeline.evaluation.figures import OverlayExample
    from fedsca_pipeline.model.heads import predict_masks, truth_masks

    known = known_classes(data, classes)
    row = data.rows("test")[data.names("test").index(name)]
    images, masks, valid = map(torch.from_numpy, data.batch([row]))
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits = network(network.normalise(images.to(device), valid.unsqueeze(1).to(device))).cpu()
    height, width = int(valid[0].any(1).sum()), int(valid[0].any(0).sum())
    return OverlayExample(
        label=label,
        name=name,
        dice=float(table.loc[table["image"] == name, "dice"].mean()),
        image=images[0, :, :height, :width].numpy(),
        truth=truth_masks(masks, classes)[0, :, :height, :width].numpy(),
        prediction=predict_masks(logits, network.head, config.threshold, known)[0, :, :height, :width].numpy(),
    )
