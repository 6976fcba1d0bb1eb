from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss
from torch.nn import functional as F

from fedsca_pipeline.federation.site.losses import build_loss, over_known_classes

K = 4
heads = st.sampled_from(("sigmoid", "softmax"))
some = st.sets(st.integers(1, K), min_size=1).map(sorted)


def drawn(head: str, known: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits of K classes, masks of the known classes and background, and a valid area."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, K + (head == "softmax"), 6, 6, generator=generator)
    masks = torch.tensor([0, *known])[torch.randint(0, len(known) + 1, (2, 6, 6), generator=generator)]
    return logits, masks.to(torch.uint8), torch.rand(2, 6, 6, generator=generator) > 0.2


def everything(masks: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(masks, dtype=torch.bool)


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 2), ("softmax", 3)])
def test_the_loss_of_a_perfect_prediction_is_near_zero_and_of_a_wrong_one_is_large(head: str, channels: int) -> None:
    masks = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(masks, 3).movedim(-1, 1).float()
    perfect = 40 * (one_hot[:, 3 - channels :] - 0.5)
    loss = build_loss(head, 0.5)

    assert loss(perfect, masks, everything(masks)) < 1e-3
    assert loss(-perfect, masks, everything(masks)) > 1


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_dice_and_its_gradient_are_those_of_monai(head: str) -> None:
    for seed in range(5):
        logits, masks, valid = drawn(head, [1, 2, 3, 4], seed)
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        area, classes = valid.unsqueeze(1), F.one_hot(masks.long(), K + 1).movedim(-1, 1).float()
        probabilities, truth = (theirs.sigmoid(), classes[:, 1:]) if head == "sigmoid" else (theirs.softmax(1), classes)
        monai = DiceLoss(include_background=head == "sigmoid", batch=True)(probabilities * area, truth * area)

        loss = build_loss(head, 1.0)(ours, masks, valid)

        loss.backward()
        monai.backward()
        assert torch.equal(loss, monai)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(("head", "channels"), [("sigmoid", 1), ("softmax", 2)])
def test_the_padding_does_not_change_the_loss(head: str, channels: int) -> None:
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


@settings(max_examples=40)
@given(head=heads, known=some, seed=st.integers(0, 99), weight=st.sampled_from((0.0, 0.5, 1.0)))
def test_classes_that_a_site_lacks_have_no_gradient_and_do_not_change_the_loss(
    head: str, known, seed: int, weight: float
) -> None:
    logits, masks, valid = drawn(head, known, seed)
    logits.requires_grad_()
    first = int(head == "softmax")
    absent = [first + label - 1 for label in range(1, K + 1) if label not in known]
    loss = over_known_classes(build_loss(head, weight), head, known, K)

    value = loss(logits, masks, valid)
    value.backward()

    assert torch.isfinite(value)
    assert logits.grad is not None
    assert not logits.grad[:, absent].any()
    present = [channel for channel in range(logits.shape[1]) if channel not in absent]
    assert logits.grad[:, present].any()
    moved = logits.detach().clone()
    moved[:, absent] = 50.0
    assert loss(moved, masks, valid) == value


@settings(max_examples=40)
@given(head=heads, known=some, seed=st.integers(0, 99))
def test_the_loss_is_that_of_a_model_without_the_absent_classes(head: str, known, seed: int) -> None:
    logits, masks, valid = drawn(head, known, seed)
    first = int(head == "softmax")
    present = [*range(first), *(first + label - 1 for label in known)]
    numbered = sum((position * (masks == label) for position, label in enumerate(known, 1)), torch.zeros_like(masks))

    found = over_known_classes(build_loss(head, 0.5), head, known, K)(logits, masks, valid)

    assert found == build_loss(head, 0.5)(logits[:, present], numbered, valid)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_a_site_that_has_all_classes_has_the_unchanged_loss(head: str) -> None:
    loss = build_loss(head, 0.5)

    assert over_known_classes(loss, head, (1, 2, 3), 3) is loss
    assert over_known_classes(loss, head, (1,), 1) is loss


def test_softmax_probabilities_of_known_classes_sum_to_one() -> None:
    """With one known class of three, cross-entropy is that of two channels, however large the other logits."""
    logits = torch.tensor([0.3, 1.2, 90.0, 80.0]).view(1, 4, 1, 1)
    masks = torch.ones(1, 1, 1, dtype=torch.uint8)

    found = over_known_classes(build_loss("softmax", 0.0), "softmax", (1,), 3)(logits, masks, everything(masks))

    torch.testing.assert_close(found, F.softplus(torch.tensor(0.3 - 1.2)))
