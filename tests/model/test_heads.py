"""Masks from logits of the sigmoid and the softmax head, and from label maps."""

from __future__ import annotations

import pytest
import torch

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.model.heads import predict_masks, truth_masks


def test_sigmoid_masks_are_the_pixels_whose_probability_exceeds_the_threshold() -> None:
    logits = torch.linspace(-6, 6, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)

    masks = predict_masks(logits, "sigmoid", 0.7)

    assert masks.dtype == torch.bool
    assert torch.equal(masks, logits.sigmoid() > 0.7)


def test_sigmoid_masks_of_half_precision_logits_keep_a_threshold_near_one() -> None:
    logits = torch.tensor([5.0, 7.0, 12.0], dtype=torch.bfloat16).reshape(1, 1, 1, 3)

    masks = predict_masks(logits, "sigmoid", 0.998)

    assert masks.flatten().tolist() == [False, True, True]


def test_a_logit_of_zero_is_background_at_the_usual_threshold() -> None:
    assert not predict_masks(torch.zeros(1, 1, 2, 2), "sigmoid", 0.5).any()


def test_softmax_masks_are_disjoint_follow_the_largest_channel_and_drop_the_background() -> None:
    logits = torch.randn(3, 4, 6, 7, generator=torch.Generator().manual_seed(0))

    masks = predict_masks(logits, "softmax", 0.5)

    assert masks.shape == (3, 3, 6, 7)
    assert torch.equal(torch.cat([~masks.any(1, keepdim=True), masks], 1).int().argmax(1), logits.argmax(1))
    assert masks.sum(1).max() == 1


def test_a_softmax_tie_is_background() -> None:
    assert not predict_masks(torch.zeros(1, 3, 2, 2), "softmax", 0.5).any()


def test_an_unknown_head_names_the_parameter_and_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"foundation\.head: 'tanh'.*sigmoid, softmax"):
        predict_masks(torch.zeros(1, 1, 2, 2), "tanh", 0.5)


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 3), ("softmax", 4)])
def test_a_class_that_is_not_known_is_never_predicted_and_takes_no_pixel(head: str, channels: int) -> None:
    logits = torch.full((1, channels, 2, 2), -1.0)
    logits[:, channels - 2] = 9.0
    logits[:, channels - 1, 0] = 2.0

    masks = predict_masks(logits, head, 0.5, known=(1, 3))

    assert not masks[:, :2].any()
    assert masks[0, 2].tolist() == [[True, True], [False, False]]
    assert torch.equal(predict_masks(logits, head, 0.5, known=(1, 2, 3)), predict_masks(logits, head, 0.5))


def test_truth_masks_split_the_label_map_by_class() -> None:
    labels = torch.tensor([[[0, 1], [2, 254]]], dtype=torch.uint8)

    masks = truth_masks(labels, 254)

    assert masks.shape == (1, 254, 2, 2)
    assert masks[0, 0].tolist() == [[False, True], [False, False]]
    assert masks[0, 1].tolist() == [[False, False], [True, False]]
    assert masks[0, 253].tolist() == [[False, False], [False, True]]
    assert masks.sum() == 3
