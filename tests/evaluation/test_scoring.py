"""Scores of a model on batches of images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.evaluation.scoring import score_batches
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation import SegmentationModel, load_foundation
from fedsca_pipeline.model.inference import image_forward

SIDE = 32


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    """A tiny random foundation; most tests give its logits themselves."""
    return load_foundation(FoundationConfig(name="random"), Path("unused"), image_size=SIDE, classes=1)


def squares(count: int, batch_size: int, labels: Sequence[int] = (1,)) -> list[Batch]:
    """Return batches of bright squares on noise, whose classes are ``labels`` in turn."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 100, (count, 3, SIDE, SIDE), dtype=np.uint8)
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for index in range(count):
        top, left = draw.integers(0, SIDE // 2, 2)
        masks[index, top : top + 10, left : left + 10] = labels[index % len(labels)]
        images[index, :, masks[index] > 0] += 120
    parts = (torch.from_numpy(images), torch.from_numpy(masks), torch.ones(count, SIDE, SIDE, dtype=torch.bool))
    return [Batch(*batch) for batch in zip(*(part.split(batch_size) for part in parts), strict=True)]


def test_a_perfect_prediction_has_dice_one_and_an_empty_one_zero(model: SegmentationModel) -> None:
    def truth(batch: Batch) -> torch.Tensor:
        return torch.where(batch.masks[:, None] == 1, 9.0, -9.0)

    perfect = score_batches(model, truth, squares(5, 2), 1, 0.5)
    blind = score_batches(model, lambda batch: -truth(batch).abs(), squares(5, 2), 1, 0.5)

    assert [score["dice"] for score in perfect] == [1.0] * 5
    assert [score["hd95"] for score in perfect] == [0.0] * 5
    assert [score["dice"] for score in blind] == [0.0] * 5


def test_scores_come_image_by_image_whatever_the_size_of_a_batch(model: SegmentationModel) -> None:
    def bright(batch: Batch) -> torch.Tensor:
        return batch.inputs.float().mean(dim=1, keepdim=True) - 70.0

    one, many = (score_batches(model, bright, squares(5, size), 1, 0.5) for size in (1, 4))

    assert len(one) == 5
    assert one == many
    assert len({score["dice"] for score in one}) > 1


def test_a_lower_threshold_predicts_more_pixels(model: SegmentationModel) -> None:
    # Probability 0.3 on the object, 0.1 elsewhere.
    logits = {True: float(np.log(0.3 / 0.7)), False: float(np.log(0.1 / 0.9))}

    def sure(batch: Batch) -> torch.Tensor:
        return torch.where(batch.masks[:, None] == 1, logits[True], logits[False])

    dice = {
        threshold: np.mean([s["dice"] for s in score_batches(model, sure, squares(1, 1), 1, threshold)])
        for threshold in (0.5, 0.2, 0.05)
    }

    assert dice[0.5] == 0.0
    assert dice[0.2] == 1.0
    assert 0.0 < dice[0.05] < 1.0


def test_padding_is_not_scored(model: SegmentationModel) -> None:
    (batch,) = squares(1, 1)
    valid = batch.valid.clone()
    valid[:, 16:] = False
    masks = torch.zeros_like(batch.masks)
    masks[:, 2:12, 2:12] = 1
    padded = Batch(batch.inputs, masks, valid)

    def drawn(batch: Batch) -> torch.Tensor:
        logits = torch.where(masks[:, None] == 1, 9.0, -9.0)
        logits[:, :, 16:] = 9.0
        return logits

    (score,) = score_batches(model, drawn, [padded], 1, 0.5)

    assert score["dice"] == 1.0


def test_no_batch_gives_no_score_and_the_model_returns_to_training_mode(model: SegmentationModel) -> None:
    model.train()

    assert score_batches(model, image_forward(model), [], 1, 0.5) == []
    score_batches(model, image_forward(model), squares(1, 1), 1, 0.5)

    assert model.training


def test_only_scored_classes_have_records_under_their_own_numbers(model: SegmentationModel) -> None:
    def truth(batch: Batch) -> torch.Tensor:
        return torch.where(batch.masks[:, None] == torch.arange(1, 4)[:, None, None], 9.0, -9.0)

    scores = score_batches(model, truth, squares(5, 2, (1, 3)), 3, 0.5, known=(1,), scored=(1, 3))

    assert [score["class"] for score in scores] == [1, 3] * 5
    shown = [batch.masks.max().item() for batch in squares(5, 1, (1, 3))]
    assert [score["dice"] for score in scores if score["class"] == 1] == [1.0] * 5
    assert [score["dice"] for score in scores if score["class"] == 3] == [float(label != 3) for label in shown]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "monai", "pandas", "plotly", "matplotlib", "rich"}
    program = f"import sys, fedsca_pipeline.evaluation; print(sorted({heavy!r} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
