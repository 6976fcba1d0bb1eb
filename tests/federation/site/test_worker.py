from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard

from fedsca_pipeline.config import AdaptersConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.errors import MessageError, SiteError
from fedsca_pipeline.federation.messages.codec import TRAVELLING, decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.site.batches import SiteBatches, plain_batches
from fedsca_pipeline.federation.site.prefix import FeatureCache
from fedsca_pipeline.federation.site.steps import ignore_step, warm_up
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker, mean_dice
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.layout import hash_tensors


def payload(worker: LocalWorker, round_: int = 1, *, kind: str = "aggregate", site: str = "a", tensors=None) -> bytes:
    """Return a round's message to a site whose previous update was accepted."""
    tensors = tensors or {name: worker.initial[name] for name in worker.shared}
    manifest = Manifest(
        kind=kind,
        run="run",
        round=round_,
        site=site,
        base_hash=hash_tensors(tensors),
        samples=0,
        dtype=TRAVELLING[worker.settings.wire_dtype][-1],
        relative=False,
        answered=round_ - 1,
    )
    return encode(manifest, tensors)


def test_an_update_is_what_training_added_to_the_shared_tensors(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(), make_site("a"), SiteStore(tmp_path / "a", "run")

    reply = decode(worker.work(payload(worker), 1, "a", data, store, ignore_step))

    assert reply.manifest.kind == "update"
    assert reply.manifest.samples == 5
    assert set(reply.tensors) == set(worker.shared)
    assert sum(t.abs().sum() for t in reply.tensors.values()) > 0
    for name, update in reply.tensors.items():
        torch.testing.assert_close(update, worker.parameters[name].detach() - worker.initial[name])


def test_the_same_payload_twice_gets_the_same_answer(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(), make_site("a"), SiteStore(tmp_path / "a", "run")
    worker.work(payload(worker), 1, "a", data, store, ignore_step)

    first, second = (decode(worker.work(payload(worker, 2), 2, "a", data, store, ignore_step)) for _ in range(2))

    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert first.manifest.metrics["loss"] == second.manifest.metrics["loss"]


def test_sites_on_the_same_model_do_not_influence_each_other(make_worker, make_site, tmp_path: Path) -> None:
    worker, first, other = make_worker(), make_site("a", seed=1), make_site("b", seed=2)
    alone = decode(worker.work(payload(worker), 1, "a", first, SiteStore(tmp_path / "alone", "run"), ignore_step))

    worker.work(payload(worker, site="b"), 1, "b", other, SiteStore(tmp_path / "b", "run"), ignore_step)
    after = decode(worker.work(payload(worker), 1, "a", first, SiteStore(tmp_path / "a", "run"), ignore_step))

    assert all(torch.equal(alone.tensors[name], after.tensors[name]) for name in alone.tensors)


def test_the_foundation_stays_frozen(make_worker, make_site, tmp_path: Path) -> None:
    worker, data = make_worker(), make_site("a")
    frozen = {n: p.clone() for n, p in worker.model.named_parameters() if n not in worker.parameters}

    worker.work(payload(worker), 1, "a", data, SiteStore(tmp_path / "a", "run"), ignore_step)

    assert frozen
    assert all(torch.equal(p, frozen[n]) for n, p in worker.model.named_parameters() if n in frozen)


def test_private_tensors_come_from_the_last_round_and_shared_ones_from_the_aggregate(
    make_worker, make_site, tmp_path: Path
) -> None:
    worker, data, store = make_worker(learning_rate=1e-12), make_site("a"), SiteStore(tmp_path / "a", "run")
    worker.work(payload(worker), 1, "a", data, store, ignore_step)
    private = store.state_at(1).private
    aggregate = {name: worker.initial[name] + 1 for name in worker.shared}

    worker.work(payload(worker, 2, kind="final", tensors=aggregate), 2, "a", data, store, ignore_step)

    last = store.snapshot("last").tensors
    assert all(torch.equal(last[name], tensor) for name, tensor in private.items())
    assert all(torch.equal(last[name], tensor) for name, tensor in aggregate.items())


def test_a_final_payload_trains_nothing_and_sends_no_tensor(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(), make_site("a"), SiteStore(tmp_path / "a", "run")
    worker.work(payload(worker), 1, "a", data, store, ignore_step)

    reply = decode(worker.work(payload(worker, 2, kind="final"), 2, "a", data, store, ignore_step))

    assert reply.manifest.kind == "report"
    assert reply.tensors == {}
    assert store.state_at(8).round == 1
    assert store.snapshot("best").round == 1


def test_the_best_model_is_stored_and_a_worse_one_does_not_replace_it(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(), make_site("a"), SiteStore(tmp_path / "a", "run")
    for round_ in (1, 2, 3):
        worker.work(payload(worker, round_), round_, "a", data, store, ignore_step)
    best = store.snapshot("best")
    ruined = {name: worker.initial[name] + 1e4 for name in worker.shared}

    worker.work(payload(worker, 4, kind="final", tensors=ruined), 4, "a", data, store, ignore_step)

    assert store.snapshot("best").round == best.round
    assert store.snapshot("last").round == 3


def test_stored_moments_change_the_next_round_and_belong_to_private_tensors_only(
    make_worker, make_site, tmp_path: Path
) -> None:
    data, replies = make_site("a"), []
    for keep in (False, True):
        worker, store = make_worker(keep_optimizer=keep), SiteStore(tmp_path / str(keep), "run")
        replies += [decode(worker.work(payload(worker, r), r, "a", data, store, ignore_step)) for r in (1, 2)]

    moments = store.state_at(8).moments
    assert moments
    assert not any(name.rpartition("/")[0] in worker.shared for name in moments)
    assert all(torch.equal(replies[0].tensors[n], replies[2].tensors[n]) for n in replies[0].tensors)
    assert not all(torch.equal(replies[1].tensors[n], replies[3].tensors[n]) for n in replies[1].tensors)


def test_int8_stores_the_rounding_error_for_the_next_update(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(wire_dtype="int8"), make_site("a"), SiteStore(tmp_path / "a", "run")

    reply = decode(worker.work(payload(worker), 1, "a", data, store, ignore_step))

    state = store.state_at(1)
    for name in worker.shared:
        exact = worker.parameters[name].detach() - state.base[name]
        torch.testing.assert_close(reply.tensors[name] + state.residual[name], exact, rtol=0, atol=1e-6)


def test_a_site_without_a_base_refuses_a_difference(make_worker, make_site, tmp_path: Path) -> None:
    worker, data = make_worker(), make_site("a")
    tensors = {name: worker.initial[name] for name in worker.shared}
    manifest = Manifest(
        kind="aggregate", run="run", round=1, site="a", base_hash="0" * 16, samples=0, dtype="fp32", relative=True,
        metrics={},
    )  # fmt: skip

    with pytest.raises(SiteError, match="no base to add it to"):
        worker.work(encode(manifest, tensors), 1, "a", data, SiteStore(tmp_path / "a", "run"), ignore_step)


def test_a_payload_larger_than_the_shared_tensors_can_be_is_refused(make_worker, make_site, tmp_path: Path) -> None:
    worker, data = make_worker(), make_site("a")
    bomb = zstandard.compress(bytes(2**26))

    with pytest.raises(MessageError, match="larger than"):
        worker.work(bomb, 1, "a", data, SiteStore(tmp_path / "a", "run"), ignore_step)


def test_a_payload_for_another_site_is_refused(make_worker, make_site, tmp_path: Path) -> None:
    worker, data = make_worker(), make_site("a")

    with pytest.raises(MessageError, match="site"):
        worker.work(payload(worker, site="b"), 1, "a", data, SiteStore(tmp_path / "a", "run"), ignore_step)


def test_a_loss_that_is_not_finite_fails_the_site_and_stores_no_state(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(), make_site("a"), SiteStore(tmp_path / "a", "run")
    ruined = {name: torch.full_like(worker.initial[name], 1e38) for name in worker.shared}

    with pytest.raises(SiteError, match="not finite in round 1"):
        worker.work(payload(worker, tensors=ruined), 1, "a", data, store, ignore_step)

    assert store.state_at(1) is None


def test_dropout_draws_the_same_again_whatever_was_drawn_in_between(make_worker, make_site, tmp_path: Path) -> None:
    adapters = AdaptersConfig(method="lora", options={"r": 2, "lora_dropout": 0.5})
    worker, data, store = make_worker(adapters=adapters), make_site("a"), SiteStore(tmp_path / "a", "run")

    first = decode(worker.work(payload(worker), 1, "a", data, store, ignore_step))
    torch.rand(7)
    second = decode(worker.work(payload(worker), 1, "a", data, store, ignore_step))

    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_tensors_that_are_not_finite_after_the_last_step_fail_the_site_and_are_not_stored(
    make_worker, make_site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, data, store = make_worker(batch_size=5), make_site("a"), SiteStore(tmp_path / "a", "run")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: parameters[0].grad.fill_(torch.nan))

    with pytest.raises(SiteError, match="the trained tensors are not finite in round 1"):
        worker.work(payload(worker), 1, "a", data, store, ignore_step)

    assert store.state_at(1) is None


def test_an_update_that_does_not_fit_the_wire_dtype_is_not_stored(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = (
        make_worker(wire_dtype="fp16", learning_rate=1.0),
        make_site("a"),
        SiteStore(tmp_path / "a", "run"),
    )
    far = {name: torch.full_like(worker.initial[name], 1e30) for name in worker.shared}
    monkey = worker._train

    def overshoot(*arguments):
        result = monkey(*arguments)
        return replace(result, tensors={**result.tensors, **far})

    worker._train = overshoot
    with pytest.raises(MessageError, match="fp16"):
        worker.work(payload(worker), 1, "a", data, store, ignore_step)

    assert store.state_at(1) is None


def test_a_site_without_cached_features_gives_the_same_answer(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(cache_bytes=10**8), make_site("a"), SiteStore(tmp_path / "a", "run")
    worker.work(payload(worker), 1, "a", data, store, ignore_step)

    kept = decode(worker.work(payload(worker, 2), 2, "a", data, store, ignore_step))
    store.feature_cache.unlink()
    computed = decode(worker.work(payload(worker, 2), 2, "a", data, store, ignore_step))

    assert all(torch.equal(kept.tensors[name], computed.tensors[name]) for name in kept.tensors)


def test_features_of_jittered_images_are_not_cached(make_worker, make_site, tmp_path: Path) -> None:
    sizes = {}
    for intensity in (0.0, 0.5):
        worker = make_worker(cache_bytes=10**8, augment={"intensity": intensity})
        store = SiteStore(tmp_path / str(intensity), "run")
        worker.work(payload(worker), 1, "a", make_site("a"), store, ignore_step)
        sizes[intensity] = store.feature_cache.stat().st_size

    validation_images = 2
    assert sizes[0.5] == validation_images * (1 + 2 * 16 * 4 * 4)
    assert sizes[0.0] > sizes[0.5]


def test_training_lowers_the_loss(make_worker, make_site, tmp_path: Path) -> None:
    worker, data, store = make_worker(learning_rate=1e-2), make_site("a"), SiteStore(tmp_path / "a", "run")
    losses = []
    tensors = {name: worker.initial[name] for name in worker.shared}

    for round_ in range(1, 13):
        reply = decode(worker.work(payload(worker, round_, tensors=tensors), round_, "a", data, store, ignore_step))
        tensors = {name: tensors[name] + reply.tensors[name] for name in tensors}
        losses.append(reply.manifest.metrics["loss"])

    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def plain_losses(worker: LocalWorker, data: SiteArrays, tmp_path: Path) -> list[float]:
    """Return the losses of a plain training loop: the whole model for every image, AdamW without options."""
    training, model = worker.settings.training, worker.model
    batches = SiteBatches(data, lambda images, _: images, training.augment, FeatureCache(tmp_path / "no", [], (), 0))
    rates = [
        {"params": [p for n, p in worker.parameters.items() if n not in worker.decoder], "lr": training.learning_rate},
        {"params": [worker.parameters[n] for n in worker.decoder],
         "lr": training.learning_rate * training.decoder_factor},
    ]  # fmt: skip
    optimiser = torch.optim.AdamW(rates, weight_decay=training.weight_decay, fused=False)
    schedule = warm_up(optimiser, training.warmup_steps)
    losses = []
    model.train()
    for epoch in range(training.local_epochs):
        for batch in batches.training(training.batch_size, seed=0, site="a", round_=1, epoch=epoch):
            logits = model(model.normalise(batch.inputs, batch.valid.unsqueeze(1)))
            loss = worker.loss(logits, batch.masks, batch.valid)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(worker.parameters.values()), training.clip_norm)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    return losses


# Cached features are fp16, whose rounding error is 5e-4; without the cache only the order of sums differs.
@pytest.mark.parametrize(("cache_bytes", "tolerance"), [(0, 1e-5), (10**8, 5e-3)])
def test_the_losses_are_those_of_a_plain_loop(cache_bytes, tolerance, make_worker, make_site, tmp_path: Path) -> None:
    training = {"local_epochs": 4, "learning_rate": 1e-3, "warmup_steps": 4}
    worker, data = make_worker(cache_bytes=cache_bytes, **training), make_site("a")

    reply = decode(worker.work(payload(worker), 1, "a", data, SiteStore(tmp_path / "a", "run"), ignore_step))

    losses = plain_losses(make_worker(**training), data, tmp_path)
    assert losses[-1] < losses[0]
    assert reply.manifest.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=tolerance)


@pytest.mark.parametrize(
    ("steps", "rates"), [(0, [1, 1, 1]), (1, [1, 1, 1]), (4, [0.25, 0.5, 0.75, 1, 1]), (2, [0.5, 1, 1])]
)
def test_the_rate_rises_over_the_warm_up_and_then_stays(steps: int, rates: list[float]) -> None:
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warm_up(optimiser, steps)
    found = []

    for _ in rates:
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()

    assert found == pytest.approx(rates)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_round_runs_on_an_accelerator(device: str, make_worker, make_site, tmp_path: Path) -> None:
    from fedsca_pipeline.compute import resolve_device
    from fedsca_pipeline.config import RunConfig
    from fedsca_pipeline.errors import ConfigError

    try:
        resolve_device(RunConfig(device=device).device)
    except ConfigError as error:
        pytest.skip(str(error))  # says which device is not here
    worker = make_worker()
    moved = LocalWorker(worker.model.to(device), worker.strategy, worker.settings)

    reply = decode(moved.work(payload(moved), 1, "a", make_site("a"), SiteStore(tmp_path / "a", "run"), ignore_step))

    assert reply.manifest.metrics["loss"] > 0


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_the_output_of_a_class_that_a_site_lacks_is_not_trained(make_worker, make_site, tmp_path, head) -> None:
    worker = make_worker("fedavg", classes=3, head=head, weight_decay=0.0)
    worker.work(payload(worker), 1, "a", make_site("a", labels=(1, 3)), SiteStore(tmp_path / "a", "run"), ignore_step)
    first = int(head == "softmax")

    changed = {
        channel: any(
            not torch.equal(parameter, worker.initial[name])
            for name, parameter in worker.parameters.items()
            if f"output_hypernetworks_mlps.{channel}." in name
        )
        for channel in range(first + 3)
    }

    assert not changed.pop(first + 1)
    assert all(changed.values())


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_validation_dice_is_over_the_classes_that_the_site_has(make_worker, make_site, head: str) -> None:
    worker, site = make_worker(classes=3, head=head), make_site("a", labels=(1, 3))

    def truth_but_class_2_everywhere(batch: Batch) -> torch.Tensor:
        classes = torch.arange(1 - (head == "softmax"), 4)[:, None, None]
        logits = torch.where(batch.masks[:, None] == classes, 9.0, -9.0)
        logits[:, -2] = 99.0
        return logits

    batches = list(plain_batches(site, "validation", 2))

    assert mean_dice(worker.model, truth_but_class_2_everywhere, batches, (1, 3), 0.5) == 1.0
    assert mean_dice(worker.model, truth_but_class_2_everywhere, batches, (1, 2, 3), 0.5) < 1.0


def test_a_site_with_empty_masks_only_still_trains(make_worker, make_site, tmp_path) -> None:
    worker, data = make_worker(classes=3), make_site("a", labels=(0,))

    reply = decode(worker.work(payload(worker), 1, "a", data, SiteStore(tmp_path / "a", "run"), ignore_step))

    assert sum(float(update.abs().sum()) for update in reply.tensors.values()) > 0
