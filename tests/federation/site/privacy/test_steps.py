from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsca_pipeline.config import PrivacyBound, PrivacyConfig
from fedsca_pipeline.data.arrays import PooledArrays, SiteArrays
from fedsca_pipeline.data.manifest import manifest_digest
from fedsca_pipeline.errors import SiteError
from fedsca_pipeline.federation.messages.codec import Message, decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.site import worker as local
from fedsca_pipeline.federation.site.batches import plain_batches
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.privacy import steps as private
from fedsca_pipeline.federation.site.privacy.accountant import epsilon_of
from fedsca_pipeline.federation.site.privacy.ledger import KEY, LEDGER, Entry, PrivacyLedger
from fedsca_pipeline.federation.site.privacy.optimizer import NoisyOptimizer
from fedsca_pipeline.federation.site.privacy.steps import (
    PrivateSteps,
    RoundPlan,
    Units,
    draw,
    unit_gradient,
)
from fedsca_pipeline.federation.site.steps import ignore_step, phase_lengths
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.inference import image_forward
from fedsca_pipeline.model.layout import hash_tensors

PRIVATE = {"privacy": PrivacyConfig(epsilon=8.0)}
ENTRY = Entry("run", 1, "a" * 64, steps=4, rate=0.5, noise=1.0)
ONE_STEP = RoundPlan(site="a", run="run", round=1, steps=1, rounds=1, batch_size=5)


def payload(worker: LocalWorker, round_: int = 1, *, shift: float = 0.0, site: str = "a") -> bytes:
    tensors = {name: worker.initial.get(name, torch.zeros(shape)) + shift for name, shape in worker.shapes.items()}
    manifest = Manifest("aggregate", "run", round_, site, hash_tensors(tensors), 0, "fp32", False, {}, round_ - 1)
    return encode(manifest, tensors)


@pytest.fixture
def answer(make_site, tmp_path: Path) -> Callable[..., Message]:
    """Return site a's answer to a payload; the state and the ledger are the same each time unless given."""
    data = make_site("a")

    def work(
        worker: LocalWorker,
        message: bytes,
        round_: int = 1,
        *,
        folder: str = "state",
        ledger: PrivacyLedger | None = None,
        arrays: SiteArrays | None = None,
        on_step: Any = ignore_step,
    ) -> Message:
        store = SiteStore(tmp_path / folder, "run", ledger or PrivacyLedger(tmp_path / "private"))
        return decode(worker.work(message, round_, "a", arrays or data, store, on_step))

    return work


def same(first: Message, second: Message) -> bool:
    return all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


# Units and sampling


def with_subjects(path: Path, manifest: pd.DataFrame, subjects: list[str]) -> SiteArrays:
    found = manifest.assign(subject=[*subjects, *manifest["subject"][len(subjects) :]])
    assert np.array_equal(manifest_digest(found), manifest_digest(manifest))
    return SiteArrays(path, found)


def test_images_of_one_patient_are_one_unit_and_the_guarantee_is_patient_level(write_site) -> None:
    data = with_subjects(*write_site("a"), ["p", "q", "p", "r", "p"])

    units = Units.of(data)

    assert units.level == "patient-level"
    assert sorted(units.rows) == [(0, 2, 4), (1,), (3,)]


def test_the_guarantee_is_image_level_if_every_subject_has_one_image(make_site) -> None:
    units = Units.of(make_site("a"))

    assert units.level == "image-level"
    assert sorted(units.rows) == [(row,) for row in range(5)]


def test_slices_of_one_volume_are_one_unit_that_is_an_image(write_site) -> None:
    path, manifest = write_site("a")
    volume = manifest.assign(subject="v", image="images/v.nii.gz").iloc[:5]
    data = SiteArrays(path, manifest)
    data._subjects, data._images_of_rows = [*volume["subject"], "x", "y", "z"], [*volume["image"], "x", "y", "z"]

    units = Units.of(data)

    assert (units.level, units.rows) == ("image-level", ((0, 1, 2, 3, 4),))


def test_pooled_sites_share_no_patient(write_site) -> None:
    sites = [with_subjects(*write_site(name), ["p", "p", "q", "r", "s"]) for name in ("a", "b")]

    units = Units.of(PooledArrays(sites, [len(site) for site in sites]))

    assert len(units.rows) == 8
    assert units.level == "patient-level"


@given(
    units=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=20),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_step_has_at_most_one_image_of_each_patient(units: list[list[int]], rate: float, seed: int) -> None:
    owned = [[(unit, row) for row in rows] for unit, rows in enumerate(units)]

    drawn = draw(owned, rate, np.random.default_rng(seed))

    owners = [unit for unit, _ in drawn]
    assert len(set(owners)) == len(owners)
    assert all(row in units[unit] for unit, row in drawn)


def test_every_patient_is_drawn_at_the_same_rate_whatever_number_of_images_they_have() -> None:
    draws, counts, steps = np.random.default_rng(0), np.zeros(3), 4000
    for _ in range(steps):
        counts[[row // 10 for row in draw([[0, 1, 2, 3], [10], [20, 21]], 0.25, draws)]] += 1

    # Five standard deviations of a binomial.
    assert np.all(abs(counts / steps - 0.25) < 5 * math.sqrt(0.25 * 0.75 / steps))


def test_a_step_can_draw_no_unit_and_rate_one_draws_all() -> None:
    draws = np.random.default_rng(0)

    assert [] in [draw([[0], [1]], 0.1, draws) for _ in range(20)]
    assert draw([[0], [1], [2]], 1.0, draws) == [0, 1, 2]


# Gradients, norms and noise


def gradients_of(worker: LocalWorker, data: SiteArrays) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the gradients of each image, and those of the summed losses from one pass over the whole batch."""
    loss, parameters = build_loss("sigmoid", 0.5), list(worker.parameters.values())
    forward = image_forward(worker.model)
    images = list(plain_batches(data, "train", 1))
    each = [unit_gradient(forward, image, loss, parameters) for image in images]
    (batch,) = plain_batches(data, "train", 99)
    logits = forward(batch)
    total = sum(
        loss(logits[i : i + 1], batch.masks[i : i + 1], batch.valid[i : i + 1]) for i in range(len(batch.masks))
    )
    return each, list(torch.autograd.grad(total, parameters))


def test_gradients_of_single_images_add_up_to_that_of_the_batch(make_worker, make_site) -> None:
    worker = make_worker()
    # At its start an adapter's output is zero, and so is the gradient of what goes into it.
    worker.install({name: start + 0.05 * torch.randn(start.shape) for name, start in worker.initial.items()})

    each, total = gradients_of(worker, make_site("a"))

    assert all(len({float(gradient.norm()) for gradient in parts}) > 1 for parts in zip(*each, strict=True))
    for parts, whole in zip(zip(*each, strict=True), total, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-4, atol=1e-6)


def noisy(parameters: list[Tensor], noise: float, *, clip: float = 1.0, expected: float = 4.0, seed: int = 0):
    plain = torch.optim.SGD(parameters, lr=1.0)
    draws = np.random.Generator(np.random.Philox(key=seed))
    return NoisyOptimizer(
        plain, draws, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=expected
    )  # fmt: skip


@given(st.lists(st.floats(-50, 50), min_size=3, max_size=12), st.floats(0.1, 10))
@settings(deadline=None)
def test_no_unit_moves_the_model_further_than_the_clip_norm(values: list[float], clip: float) -> None:
    parameters = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    optimiser = noisy(parameters, 0.0, clip=clip, expected=1.0)
    first, second = torch.tensor(values[:2]), torch.tensor(values[2:3])
    for parameter, gradient in zip(parameters, (first, second), strict=True):
        parameter.grad_sample = gradient.unsqueeze(0)

    optimiser.step()

    moved = torch.cat([parameter.detach() for parameter in parameters])
    norm = torch.cat([first, second]).norm()
    assert moved.norm() <= clip * (1 + 1e-5)
    torch.testing.assert_close(moved, -torch.cat([first, second]) * (clip / (norm + 1e-6)).clamp(max=1))


def test_the_noise_has_the_accountant_s_deviation_even_if_no_unit_was_drawn() -> None:
    parameter = torch.zeros(100_000, requires_grad=True)
    optimiser = noisy([parameter], 1.5, clip=2.0, expected=4.0)
    parameter.grad_sample = torch.zeros(0, 100_000)

    optimiser.step()

    # Of n values the standard deviation is known to 1 / sqrt(2 n) of itself; five times that.
    assert parameter.detach().std().item() == pytest.approx(1.5 * 2.0 / 4.0, rel=5 / math.sqrt(200_000))
    assert abs(parameter.detach().mean().item()) < 5 * 0.75 / math.sqrt(100_000)


def test_a_tensor_that_does_not_train_is_left_out_of_the_norm() -> None:
    moving, still = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    plain = torch.optim.SGD([{"params": [moving], "lr": 1.0}, {"params": [still], "lr": 0.0}])
    optimiser = NoisyOptimizer(
        plain, np.random.default_rng(0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    moving.grad_sample, still.grad_sample = torch.tensor([[0.6, 0.0]]), torch.tensor([[100.0, 0.0]])

    optimiser.step()

    torch.testing.assert_close(moving.detach(), torch.tensor([-0.6, 0.0]))
    assert not still.any()


def test_an_image_that_overflows_has_a_zero_gradient(make_worker, make_site) -> None:
    worker, (image, *_) = make_worker(), plain_batches(make_site("a"), "train", 1)
    parameters = list(worker.parameters.values())

    def forward(batch: Batch) -> Tensor:
        return worker.model(batch.inputs.float()) * math.inf

    found = unit_gradient(forward, image, build_loss("sigmoid", 0.5), parameters)

    assert not any(gradient.any() for gradient in found)


def test_a_private_step_without_clipping_and_noise_is_the_plain_step(make_worker, make_site, tmp_path: Path) -> None:
    """It checks Opacus' sequence of single images, skipped steps and the empty last one."""
    data, (parameter_name, *_) = make_site("a"), make_worker().parameters
    worker = make_worker(batch_size=5)
    private = PrivateSteps(
        PrivacyConfig(epsilon=8.0, clip=1e9), data, PrivacyLedger(tmp_path), ONE_STEP, {}, torch.device("cpu")
    )
    private.entry = replace(private.entry, noise=0.0)
    images = list(plain_batches(data, "train", 1))
    _, total = gradients_of(worker, data)
    parameters = list(worker.parameters.values())
    before = [parameter.detach().clone() for parameter in parameters]
    step = private.stepper(torch.optim.SGD(parameters, lr=1.0))
    forward = image_forward(worker.model)

    step(forward, images, build_loss("sigmoid", 0.5), lambda: None, lambda: None)

    assert parameter_name in worker.parameters
    for start, parameter, gradient in zip(before, parameters, total, strict=True):
        torch.testing.assert_close(start - parameter.detach(), gradient / 5, rtol=1e-3, atol=1e-6)


def test_a_private_step_clips_an_image_s_gradient_to_the_configured_norm(
    make_worker, make_site, tmp_path: Path
) -> None:
    data, clip = make_site("a"), 1e-3
    worker = make_worker(batch_size=5)
    private = PrivateSteps(
        PrivacyConfig(epsilon=8.0, clip=clip), data, PrivacyLedger(tmp_path), ONE_STEP, {}, torch.device("cpu")
    )
    private.entry = replace(private.entry, noise=0.0)
    parameters = list(worker.parameters.values())
    before = [parameter.detach().clone() for parameter in parameters]
    step = private.stepper(torch.optim.SGD(parameters, lr=1.0))
    forward = image_forward(worker.model)

    step(forward, list(plain_batches(data, "train", 1))[:1], build_loss("sigmoid", 0.5), lambda: None, lambda: None)

    moved = torch.cat([(start - new.detach()).reshape(-1) for start, new in zip(before, parameters, strict=True)])
    expected_images = private.rate * len(private.units.rows)
    assert moved.norm().item() == pytest.approx(clip / expected_images, rel=1e-2)


# The ledger


def test_an_answer_is_recorded_once(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "a")

    for entry in (ENTRY, replace(ENTRY, round=2), ENTRY):
        ledger.record(entry)

    assert ledger.entries() == (ENTRY, replace(ENTRY, round=2))


def test_randomness_is_the_same_for_the_same_start_and_needs_the_secret(tmp_path: Path) -> None:
    one, other = PrivacyLedger(tmp_path / "one"), PrivacyLedger(tmp_path / "other")
    drawn = one.draws("start", "noise").random(4).tolist()

    assert PrivacyLedger(tmp_path / "one").draws("start", "noise").random(4).tolist() == drawn
    for different in (one.draws("another", "noise"), one.draws("start", "sampling"), other.draws("start", "noise")):
        assert different.random(4).tolist() != drawn


def test_only_the_owner_can_read_the_ledger(tmp_path: Path) -> None:
    PrivacyLedger(tmp_path / "a").draws("start", "noise")

    assert (tmp_path / "a").stat().st_mode & 0o077 == 0
    assert (tmp_path / "a" / KEY).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", [KEY, LEDGER])
def test_a_damaged_ledger_or_secret_stops_the_round(answer, make_worker, tmp_path: Path, name: str) -> None:
    worker, ledger = make_worker(**PRIVATE), PrivacyLedger(tmp_path / "damaged")
    ledger.folder.mkdir()
    (ledger.folder / name).write_text('[{"run": 1')

    with pytest.raises(SiteError, match=name):
        answer(worker, payload(worker), ledger=ledger)


# A site's rounds


def test_the_same_payload_gets_the_same_bits_and_counts_once(answer, make_worker, tmp_path: Path) -> None:
    worker = make_worker(**PRIVATE)

    first, second = answer(worker, payload(worker)), answer(worker, payload(worker))

    assert same(first, second)
    assert first.manifest.privacy == second.manifest.privacy
    assert len(PrivacyLedger(tmp_path / "private").entries()) == 1


def test_another_base_in_the_same_round_gets_other_noise_and_counts(answer, make_worker, tmp_path: Path) -> None:
    """With equal noise, the difference of two answers would have none."""
    worker = make_worker(settings={"rounds": 9}, **PRIVATE)

    first, second = answer(worker, payload(worker)), answer(worker, payload(worker, shift=1e-6))

    entries = PrivacyLedger(tmp_path / "private").entries()
    assert len({entry.start for entry in entries}) == 2
    change = max((first.tensors[name] - second.tensors[name]).abs().max().item() for name in first.tensors)
    assert change > 1e-4
    assert second.manifest.privacy.epsilon > first.manifest.privacy.epsilon


def test_a_round_answered_again_with_another_secret_counts_again(answer, make_worker, tmp_path: Path) -> None:
    """Two answers with independent noise reveal more than one."""
    worker, ledger = make_worker(settings={"rounds": 9}, **PRIVATE), PrivacyLedger(tmp_path / "private")
    first = answer(worker, payload(worker))
    (ledger.folder / KEY).unlink()

    second = answer(worker, payload(worker))

    assert not same(first, second)
    assert [entry.round for entry in ledger.entries()] == [1, 1]
    assert second.manifest.privacy.epsilon > first.manifest.privacy.epsilon


@pytest.mark.parametrize("changed", ["seed", "clip", "secret", "data", "private tensors", "processor", "noise"])
def test_any_other_difference_gets_other_noise(
    answer, make_worker, make_site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A coordinator that renames a run, or repeats a round after a change, must not get the same noise."""
    options: dict[str, Any] = {"ledger": PrivacyLedger(tmp_path / "x")}
    training: dict[str, Any] = dict(PRIVATE)
    worker = make_worker(settings={"rounds": 9}, **PRIVATE)
    answer(worker, payload(worker, 2), 2, ledger=options["ledger"])
    match changed:
        case "secret":
            options["ledger"] = PrivacyLedger(tmp_path / "y")
        case "data":
            options["arrays"] = make_site("b", seed=3)
        case "clip":
            training = {"privacy": PrivacyConfig(epsilon=8.0, clip=1.0001)}
        case "processor":
            monkeypatch.setattr(local, "get_cpu_capability", lambda: "another")
        case "noise":
            monkeypatch.setattr(private, "noise_multiplier", lambda *_: 3.0)
        case "private tensors":
            answer(worker, payload(worker, 1), 1, ledger=options["ledger"])
    other = make_worker(settings={"rounds": 9}, **training)
    if changed == "seed":
        other.settings = replace(other.settings, seed=1)

    answer(other, payload(other, 2), 2, **options)

    *_, first, last = [entry for path in "xy" for entry in PrivacyLedger(tmp_path / path).entries() if entry.round == 2]
    assert first.start != last.start


def test_a_round_beyond_the_run_s_epsilon_is_refused_before_it_trains(answer, make_worker, tmp_path: Path) -> None:
    worker, steps = make_worker(**PRIVATE), []
    answer(worker, payload(worker))

    with pytest.raises(SiteError, match=r"a: round 1 was refused: .* training.privacy.epsilon is 8"):
        answer(worker, payload(worker, shift=0.1), on_step=lambda *step: steps.append(step))

    assert not steps
    assert len(PrivacyLedger(tmp_path / "private").entries()) == 1


@pytest.mark.parametrize(
    ("bound", "budget", "named"),
    [
        (None, 8.0, "training.privacy.budget is 8"),
        (PrivacyBound(epsilon=8.0), None, "the site's own privacy.epsilon is 8"),
        (PrivacyBound(epsilon=8.0, delta=1e-12), 40.0, "at delta 1e-12, and the site's own"),
    ],
)
def test_a_site_spends_no_more_over_all_runs_than_its_owner_allows(
    answer, make_worker, tmp_path: Path, bound: PrivacyBound | None, budget: float | None, named: str
) -> None:
    ledger = PrivacyLedger(tmp_path / "bounded", bound)
    ledger.record(replace(ENTRY, run="earlier", noise=0.7))
    worker = make_worker(privacy=PrivacyConfig(epsilon=8.0, budget=budget))

    with pytest.raises(SiteError, match=named):
        answer(worker, payload(worker), ledger=ledger)


def test_a_message_includes_the_privacy_spent_in_earlier_runs(answer, make_worker, tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "used")
    ledger.record(replace(ENTRY, run="earlier"))
    worker = make_worker(**PRIVATE)

    spent = answer(worker, payload(worker), ledger=ledger).manifest.privacy

    assert spent.epsilon == pytest.approx(epsilon_of(ledger.entries(), 1e-5))
    assert spent.epsilon > 8
    assert (spent.level, spent.delta) == ("image-level", 1e-5)
    assert spent.noise_multiplier == ledger.entries()[-1].noise


def test_a_round_counts_from_its_first_step_and_once_if_it_is_repeated(answer, make_worker, tmp_path: Path) -> None:
    """A round that fails reveals, by failing, something about the images."""
    worker = make_worker(**PRIVATE)

    def break_off(*_: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        answer(worker, payload(worker), on_step=break_off)
    broken = PrivacyLedger(tmp_path / "private").entries()
    answer(worker, payload(worker))

    assert len(broken) == 1
    assert PrivacyLedger(tmp_path / "private").entries() == broken


def test_no_metric_of_the_training_images_is_sent(answer, make_worker) -> None:
    worker, reported = make_worker(**PRIVATE), []

    reply = answer(worker, payload(worker), on_step=lambda *step: reported.append(step))

    assert set(reply.manifest.metrics) == {"dice_validation", "dice_local", "steps", "seconds"}
    assert {loss for *_, loss in reported} == {None}


def test_without_privacy_a_message_has_no_privacy_field(answer, make_worker, tmp_path: Path) -> None:
    reply = answer(make_worker(), payload(make_worker()))

    assert "loss" in reply.manifest.metrics
    assert "privacy" not in reply.manifest.as_json()
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize("strategy", ["fedsca", "fedprox", "scaffold", "ditto", "fedrep", "fedavg"])
def test_every_strategy_gives_its_optimiser_noised_gradients_only(
    make_worker, make_site, tmp_path: Path, strategy: str
) -> None:
    """With large noise and almost no gradient, every tensor that trains still moves."""
    worker = make_worker(strategy, settings={"rounds": 1}, privacy=PrivacyConfig(epsilon=0.5, clip=1e-3))
    store = SiteStore(tmp_path / "a", "run", PrivacyLedger(tmp_path / "private"))

    reply = decode(worker.work(payload(worker), 1, "a", make_site("a"), store, ignore_step))

    (entry,) = store.ledger.entries()
    assert reply.manifest.privacy.epsilon <= 0.5
    assert entry.steps == sum(phase_lengths(worker.phases, 3))
    state = store.state_at(1)
    ends = {**state.private, **state.personal, **{n: t for n, t in reply.tensors.items() if n in worker.initial}}
    trained = {name for phase in worker.phases for name in phase.trained}
    assert trained <= set(ends)
    for name in trained - set(reply.tensors):
        assert not torch.equal(ends[name], worker.initial[name]), name


def test_a_penalty_is_added_after_the_noise_and_is_not_clipped(make_worker, make_site, tmp_path: Path) -> None:
    """One step far from the received tensors has the whole gradient of FedProx, mu times the distance."""
    parameter = torch.full((3,), 2.0, requires_grad=True)
    private = PrivateSteps(
        PrivacyConfig(epsilon=8.0, clip=0.5), make_site("a"), PrivacyLedger(tmp_path), ONE_STEP, {}, torch.device("cpu")
    )
    private.entry = replace(private.entry, noise=0.0)
    corrected: list[Tensor] = []
    step = private.stepper(torch.optim.SGD([parameter], lr=1.0))

    step(None, [], None, lambda: 50 * parameter.square().sum(), lambda: corrected.append(parameter.grad.clone()))

    torch.testing.assert_close(corrected, [torch.full((3,), 200.0)])
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -198.0))
