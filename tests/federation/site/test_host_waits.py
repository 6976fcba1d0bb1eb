"""A training step on a GPU never waits for the host, nor the host for it, but at the points where a value is needed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from host_waits import HostWaits
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionAttention

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, AugmentConfig, FoundationConfig, PrivacyConfig, RunConfig
from fedsca_pipeline.federation.site.batches import SiteBatches, plain_batches
from fedsca_pipeline.federation.site.losses import build_loss, over_known_classes
from fedsca_pipeline.federation.site.prefix import FeatureCache
from fedsca_pipeline.federation.site.privacy import optimizer as noisy
from fedsca_pipeline.federation.site.privacy.ledger import PrivacyLedger
from fedsca_pipeline.federation.site.privacy.steps import PrivateSteps, RoundPlan
from fedsca_pipeline.federation.site.steps import PlainSteps
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.model import batch as batches
from fedsca_pipeline.model.adapters.attach import attach_adapters
from fedsca_pipeline.model.foundation import load_foundation
from fedsca_pipeline.model.inference import image_forward

META, CPU = torch.device("meta"), torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
heads = pytest.mark.parametrize("head", ["sigmoid", "softmax"])


def test_waits_are_counted() -> None:
    """The counter itself: a value that is read, a search for true values, copies in both directions."""
    there, here = torch.zeros(3, device=META), torch.ones(3)

    with HostWaits() as waits:
        here.sum().item()
        here.nonzero()
        bool(here.isfinite().all())
        here.to(META)
        there[torch.tensor([0, 2])]
        there.add(1).mul(torch.tensor(2.0))

    assert waits.found == {"_local_scalar_dense": 2, "nonzero": 1, "_to_copy": 1, "index": 1}


@heads
@pytest.mark.parametrize("architecture", ["tiny_vit", "sam_vit"])
@pytest.mark.parametrize("known", [(1, 2, 3), (1, 3)], ids=["all classes", "two of three classes"])
def test_forward_and_backward_pass_stay_on_the_device(architecture: str, head: str, known: tuple[int, ...]) -> None:
    foundation = FoundationConfig(name="random", architecture=architecture, head=head)
    model = load_foundation(foundation, Path("unused"), image_size=64, classes=3)
    attach_adapters(model, AdaptersConfig(width=4)).to(META).train()
    loss_of = over_known_classes(build_loss(head, 0.5), head, known, 3, META)
    images, masks = torch.zeros(2, 3, 64, 64, device=META), torch.zeros(2, 64, 64, dtype=torch.uint8, device=META)
    valid = masks == 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    with HostWaits() as waits:
        loss_of(model(model.normalise(images, valid.unsqueeze(1))), masks, valid).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)

    assert not waits.found


@heads
@pytest.mark.parametrize("strategy", ["fedsca", "fedprox", "scaffold", "ditto", "fedrep"])
def test_a_plain_step_reads_no_value(strategy: str, head: str, make_worker, make_site) -> None:
    worker: LocalWorker = make_worker(strategy, head=head)
    steps = PlainSteps(worker.settings, "a", 1, CPU)
    received = {name: torch.zeros(shape) for name, shape in worker.shapes.items()}
    rule, phase = worker.strategy.local_rule(received, {}), worker.phases[-1]
    step = steps.stepper(worker._optimiser(phase, {}))
    trained = {name: worker.parameters[name] for name in phase.trained}
    forward = image_forward(worker.model)

    for batch in islice(plain_batches(make_site("a"), "train", 2), 2):
        with HostWaits() as waits:
            step(
                forward, batch, worker.loss, lambda: rule.penalty(trained, phase), lambda: rule.correct(trained, phase)
            )

        assert not waits.found


@pytest.fixture
def private_steps(make_site, tmp_path: Path) -> PrivateSteps:
    plan = RoundPlan(site="a", run="run", round=1, steps=1, rounds=1, batch_size=5)
    return PrivateSteps(PrivacyConfig(epsilon=8.0), make_site("a"), PrivacyLedger(tmp_path), plan, {}, CPU)


@pytest.mark.parametrize("images", [0, 3])
def test_a_private_step_reads_no_value(images: int, private_steps, make_worker, make_site) -> None:
    worker = make_worker()
    step = private_steps.stepper(torch.optim.AdamW(list(worker.parameters.values()), lr=1e-3, fused=True))
    drawn = list(islice(plain_batches(make_site("a"), "train", 1), images))

    with HostWaits() as waits:
        step(image_forward(worker.model), drawn, worker.loss, lambda: None, lambda: None)

    assert not waits.found


def test_the_noise_of_a_private_step_is_one_copy(private_steps, make_worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, copies = make_worker(), []
    parameters = list(worker.parameters.values())
    monkeypatch.setattr(noisy, "to_device", lambda tensor, device: copies.append(tensor.numel()) or tensor)

    step = private_steps.stepper(torch.optim.SGD(parameters, lr=1.0))
    step(image_forward(worker.model), [], worker.loss, lambda: None, lambda: None)

    assert copies == [sum(parameter.numel() for parameter in parameters)]


@pytest.mark.parametrize("shapes", [[(3,), (5, 1), (), (7, 3)], [(1,)] * 5])
def test_the_noise_is_that_of_one_draw_per_parameter(shapes: list[tuple[int, ...]]) -> None:
    """As in earlier versions, bit for bit: odd numbers of values too, of which Philox makes two at a time."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimiser = noisy.NoisyOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        np.random.Generator(np.random.Philox(key=7)),
        noise_multiplier=0.7,
        max_grad_norm=0.3,
        expected_batch_size=1,
    )
    for parameter in parameters:
        parameter.summed_grad = torch.ones_like(parameter)
    draws = np.random.Generator(np.random.Philox(key=7))
    one_by_one = [
        torch.from_numpy(np.asarray(draws.standard_normal(shape, dtype=np.float32) * np.float32(0.7 * 0.3)))
        for shape in shapes
    ]

    optimiser.add_noise()

    for parameter, noise in zip(parameters, one_by_one, strict=True):
        assert torch.equal(parameter.grad, 1 + noise)


def test_features_that_are_not_cached_stay_on_the_device() -> None:
    features = torch.zeros(2, 3, device=META)

    assert FeatureCache(Path("unused"), [], (2, 3), 0).store((0, 0), features) is features


def test_a_batch_of_cached_and_other_features_is_whole_on_the_device(make_site, tmp_path: Path) -> None:
    data, still = make_site("a"), AugmentConfig(flip=0, rotate90=0, intensity=0)
    rows = [int(row) for row in data.rows("train")]
    cache = FeatureCache(tmp_path / "features", [(rows[0], 0)], (3, 32, 32), 10**6)
    cache.store((rows[0], 0), torch.zeros(3, 32, 32))
    mixed = SiteBatches(data, lambda images, _: images.float().to(META), still, cache, META)

    (batch,) = mixed.training(len(rows), seed=0, site="a", round_=1, epoch=0)

    assert {batch.inputs.device, batch.masks.device, batch.valid.device} == {META}
    assert batch.inputs.shape == (len(rows), 3, 32, 32)


def test_copies_to_cuda_go_through_pinned_memory_and_do_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(
        Tensor, "to", lambda tensor, device, non_blocking=False: done.append(f"{device}, {non_blocking}") or tensor
    )

    for device in ("cuda", "cpu", "mps"):
        batches.to_device(torch.zeros(2), torch.device(device))

    # Elsewhere a copy that does not block would read memory that may be free again.
    assert done == ["pinned", "cuda, True", "cpu, False", "mps, False"]


@pytest.mark.parametrize(("size", "window"), [(5, 0), (3, 3)])
def test_relative_positions_are_those_of_transformers_to_the_bit(size: int, window: int) -> None:
    foundation = FoundationConfig(name="random", architecture="sam_vit")
    model = load_foundation(foundation, Path("unused"), image_size=80, classes=1)
    layer = next(layer for layer in model.backbone.layers if layer.window_size == window)
    table = torch.randn(2 * size - 1, 4)

    found = layer.attn.get_rel_pos(size, size, table)

    assert torch.equal(found, SamVisionAttention.get_rel_pos(layer.attn, size, size, table))


@heads
@pytest.mark.parametrize("known", [(1, 2, 3), (2,), (1, 3)])
def test_loss_and_gradient_are_those_of_one_hot_masks_to_the_bit(head: str, known, monkeypatch) -> None:
    """One-hot masks and lists as indices, which earlier versions used, make the host wait."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3 + (head == "softmax"), 16, 16, generator=draw, requires_grad=True)
    masks = torch.tensor([0, *known])[torch.randint(0, len(known) + 1, (2, 16, 16), generator=draw)]
    valid = torch.rand(2, 16, 16, generator=draw) > 0.2
    background = [0] if head == "softmax" else []
    channels = [*background, *(label - 1 + len(background) for label in known)]
    numbered = sum((position * (masks == label) for position, label in enumerate(known, 1)), torch.zeros_like(masks))

    found = over_known_classes(build_loss(head, 0.5), head, known, 3)(logits, masks.to(torch.uint8), valid)
    wanted = _loss_of_one_hot_masks(head, logits[:, channels].float(), numbered, valid)

    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)))


def _loss_of_one_hot_masks(head: str, logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
    foreground = logits.shape[1] - (head == "softmax")
    truth = F.one_hot(masks, foreground + 1).movedim(-1, 1).float()
    area = valid.unsqueeze(1)
    if head == "softmax":
        probabilities = logits.softmax(dim=1)
        per_pixel = F.cross_entropy(logits, masks, reduction="none")
        cross_entropy = (per_pixel * valid).sum() / valid.sum()
        p, y = (probabilities * area)[:, 1:], (truth * area)[:, 1:]
    else:
        truth = (masks.unsqueeze(1) == torch.arange(1, foreground + 1).view(1, -1, 1, 1)).float()
        per_pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        cross_entropy = (per_pixel * area).sum() / area.expand_as(truth).sum()
        p, y = logits.sigmoid() * area, truth * area
    overlap = (p * y).sum(dim=(0, 2, 3))
    fp, fn = p.sum(dim=(0, 2, 3)) - overlap, y.sum(dim=(0, 2, 3)) - overlap
    dice = (2 * overlap + 1e-5) / (2 * (overlap + 0.5 * fp + 0.5 * fn) + 1e-5)
    return 0.5 * (1 - dice).mean() + 0.5 * cross_entropy


@on_cuda
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_step_on_cuda_does_not_synchronise(private: bool, make_worker, make_site, tmp_path: Path) -> None:
    data, worker = make_site("a"), make_worker()
    with deterministic(RunConfig(device="cuda"), 1) as device:
        moved = LocalWorker(worker.model.to(device), worker.strategy, worker.settings)
        plan = RoundPlan(site="a", run="run", round=1, steps=1, rounds=1, batch_size=5)
        ledger = PrivacyLedger(tmp_path)
        steps = (
            PrivateSteps(PrivacyConfig(epsilon=8.0), data, ledger, plan, {}, device)
            if private
            else PlainSteps(moved.settings, "a", 1, device)
        )
        none = FeatureCache(Path("unused"), (), (), 0)
        stream = steps.batches(SiteBatches(data, moved._embed, moved.settings.training.augment, none, device))
        step = steps.stepper(moved._optimiser(moved.phases[-1], {}))
        # The first step also starts libraries.
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                step(moved._forward, next(stream), moved.loss, lambda: None, lambda: None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
