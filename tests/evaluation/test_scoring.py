"""Scores of a model on batches of images."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from fedsca_pipeline.evaluation.scoring import score_batches
from fedsca_pipeline.federation.site.batches import plain_batches
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.inference import image_forward


def test_a_perfect_prediction_has_dice_one_and_an_empty_one_zero(make_worker, make_site) -> None:
    model, site = make_worker().model, make_site("a")

    def truth(batch: Batch) -> torch.Tensor:
        return torch.where(batch.masks[:, None] == 1, 9.0, -9.0)

    perfect = score_batches(model, truth, plain_batches(site, "train", 2), 1, 0.5)
    blind = score_batches(model, lambda batch: -truth(batch).abs(), plain_batches(site, "train", 2), 1, 0.5)

    assert [score["dice"] for score in perfect] == [1.0] * 5
    assert [score["hd95"] for score in perfect] == [0.0] * 5
    assert [score["dice"] for score in blind] == [0.0] * 5


def test_scores_come_image_by_image_whatever_the_size_of_a_batch(make_worker, make_site) -> None:
    model, site = make_worker().model, make_site("a")

    def bright(batch: Batch) -> torch.Tensor:
        return batch.inputs.float().mean(dim=1, keepdim=True) - 70.0

    one, many = (score_batches(model, bright, plain_batches(site, "train", size), 1, 0.5) for size in (1, 4))

    assert len(one) == 5
    assert one == many
    assert len({score["dice"] for score in one}) > 1


def test_a_lower_threshold_predicts_more_pixels(make_worker, make_site) -> None:
    model, site = make_worker().model, make_site("a")
    # Probability 0.3 on the object, 0.1 elsewhere.
    logits = {True: float(np.log(0.3 / 0.7)), False: float(np.log(0.1 / 0.9))}

    def sure(batch: Batch) -> torch.Tensor:
        return torch.where(batch.masks[:, None] == 1, logits[True], logits[False])

    dice = {
        threshold: np.mean(
            [s["dice"] for s in score_batches(model, sure, plain_batches(site, "test", 1), 1, threshold)]
        )
        for threshold in (0.5, 0.2, 0.05)
    }

    assert dice[0.5] == 0.0
    assert dice[0.2] == 1.0
    assert 0.0 < dice[0.05] < 1.0


def test_padding_is_not_scored(make_worker, make_site) -> None:
    model, site = make_worker().model, make_site("a")
    (batch,) = plain_batches(site, "test", 1)
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


def test_no_batch_gives_no_score_and_the_model_returns_to_training_mode(make_worker, make_site) -> None:
    worker = make_worker()
    worker.model.train()

    assert score_batches(worker.model, image_forward(worker.model), [], 1, 0.5) == []
    score_batches(worker.model, image_forward(worker.model), plain_batches(make_site("a"), "test", 1), 1, 0.5)

    assert worker.model.training


def test_only_scored_classes_have_records_under_their_own_numbers(make_worker, make_site) -> None:
    model, site = make_worker(classes=3).model, make_site("a", labels=(1, 3))

    def truth(batch: Batch) -> torch.Tensor:
        return torch.where(batch.masks[:, None] == torch.arange(1, 4)[:, None, None], 9.0, -9.0)

    scores = score_batches(model, truth, plain_batches(site, "train", 2), 3, 0.5, known=(1,), scored=(1, 3))

    assert [score["class"] for score in scores] == [1, 3] * 5
    shown = [batch.masks.max().item() for batch in plain_batches(site, "train", 1)]
    assert [score["dice"] for score in scores if score["class"] == 1] == [1.0] * 5
    assert [score["dice"] for score in scores if score["class"] == 3] == [float(label != 3) for label in shown]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "monai", "pandas", "plotly", "matplotlib", "rich"}
    program = f"import sys, fedsca_pipeline.evaluation; print(sorted({heavy!r} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
