from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedsca_pipeline.federation.losses import build_loss


def everything(masks: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(masks, dtype=torch.bool)


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 2), ("softmax", 3)])
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_costs_much(head: str, channels: int) -> None:
    masks = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(masks, 3).movedim(-1, 1).float()
    perfect = 40 * (one_hot[:, 3 - channels :] - 0.5)
    loss = build_loss(head, 0.5)

    assert loss(perfect, masks, everything(masks)) < 1e-3
    assert loss(-perfect, masks, everything(masks)) > 1


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 1), ("softmax", 2)])
def test_what_stands_on_the_padding_changes_nothing(head: str, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 8, 8, generator=generator)
    masks = torch.randint(0, 2, (2, 8, 8), generator=generator)
    valid = everything(masks)
    valid[:, 5:] = False
    loss = build_loss(head, 0.5)

    before = loss(logits, masks, valid)
    logits[:, :, 5:], masks[:, 5:] = 9.0, 1

    assert loss(logits, masks, valid) == before


def test_sigmoid_loss_is_half_dice_and_half_binary_cross_entropy() -> None:
    logits = torch.tensor([[[[0.3, -1.0], [2.0, 0.1]]]])
    masks = torch.tensor([[[1, 0], [1, 0]]])
    p, y = logits[0, 0].sigmoid(), masks[0].float()
    dice = 1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5)
    bce = F.binary_cross_entropy(p, y)

    found = build_loss("sigmoid", 0.5)(logits, masks, everything(masks))

    torch.testing.assert_close(found, 0.5 * dice + 0.5 * bce)


def test_an_empty_mask_has_a_finite_loss_and_gradient() -> None:
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    masks = torch.zeros(1, 4, 4, dtype=torch.long)

    build_loss("sigmoid", 0.5)(logits, masks, everything(masks)).backward()

    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0
