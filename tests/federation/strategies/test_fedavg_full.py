"""The whole foundation, trained and sent."""

from __future__ import annotations

import pytest
import torch

from fedsca_pipeline import load_site_model
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, NormaliseConfig
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.foundation import prepare_foundation
from fedsca_pipeline.model.site_model import ENCODER, discard_site_model, save_site_model

SIDE = 32
LORA = AdaptersConfig(method="lora", options={"r": 2})


def save(run, folder, tensors, foundation_names):
    config, root = FoundationConfig(name="random"), folder.parent / "foundations"
    card = {
        "site": "a", "strategy": "fedavg_full", "round": 2, "dice_validation": 0.5, "run": "0" * 16,
        "foundation": config, "foundation_sha256": prepare_foundation(config, root).sha256, "foundation_root": root,
        "image_size": SIDE, "classes": 1, "normalise": NormaliseConfig(), "threshold": 0.5,
    }  # fmt: skip
    save_site_model(folder, run.worker.model, tensors, card, foundation_names)


def test_the_whole_foundation_trains_and_crosses_the_wire(make_layout):
    layout = make_layout()
    strategy = build_strategy("fedavg_full", {}, layout)

    assert strategy.trained() == strategy.shared() == layout.encoder + layout.decoder
    assert not set(strategy.trained()) & set(layout.adapters)
    assert set(layout.encoder) | set(layout.decoder) | set(layout.adapters) == set(layout.shapes)


@pytest.mark.parametrize("adapters", [None, LORA], ids=["fel", "lora"])
def test_after_a_run_the_foundation_has_moved_and_adapters_have_no_effect(adapters, federate, make_worker):
    run = federate("fedavg_full", rounds=1, adapters=adapters)
    fresh = dict(make_worker("fedavg", adapters=adapters).model.named_parameters())
    now = dict(run.worker.model.named_parameters())

    assert all(torch.equal(now[name], fresh[name]) for name in run.layout.adapters)
    assert not [name for name in run.layout.encoder if torch.equal(run.last("a")[name], fresh[name])]
    assert all(torch.equal(tensor, run.last("b")[name]) for name, tensor in run.last("a").items())
    with torch.no_grad():
        pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        run.worker.model.eval()
        adapted = run.worker.model(pixels)
        with run.worker.model.encoder.disable_adapter():
            plain = run.worker.model(pixels)
    assert torch.equal(adapted, plain)


def test_without_a_frozen_prefix_features_are_pixels_and_are_not_stored(federate):
    run = federate("fedavg_full", rounds=1, cache_bytes=10**8)
    split, model = run.worker.split, run.worker.model
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    pixels = model.normalise(images, valid.unsqueeze(1))

    assert not split.has_prefix
    assert split.feature_shape == (3, SIDE, SIDE)
    assert torch.equal(split.features(images, valid), pixels)
    torch.testing.assert_close(split.logits(pixels), model(pixels))
    assert not run.store("a").feature_cache.exists()


def test_gradients_reach_the_first_tensor_of_the_encoder(make_worker, make_layout):
    worker = make_worker("fedavg_full")

    worker.split.logits(torch.randn(1, 3, SIDE, SIDE)).square().sum().backward()

    assert worker.parameters[make_layout().encoder[0]].grad.any()


def test_a_saved_site_model_holds_the_trained_encoder(federate, tmp_path):
    run = federate("fedavg_full")
    last = run.last("a")

    save(run, tmp_path / "a", last, run.layout.encoder)
    loaded = load_site_model(tmp_path / "a")

    found = dict(loaded.network.named_parameters())
    assert (tmp_path / "a" / ENCODER).is_file()
    assert set(run.layout.encoder) <= last.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in last.items())


def test_a_saved_site_model_holds_the_norms_that_fedbn_trains(federate, tmp_path):
    run = federate("fedbn", rounds=1)

    save(run, tmp_path / "a", run.last("a"), run.layout.encoder)
    found = dict(load_site_model(tmp_path / "a").network.named_parameters())

    assert all(torch.equal(found[name], tensor) for name, tensor in run.last("a").items())


def test_without_a_trained_encoder_its_file_is_removed(federate, tmp_path):
    run = federate("fedavg_full", rounds=1)
    save(run, tmp_path / "a", run.last("a"), run.layout.encoder)

    save(run, tmp_path / "a", {name: run.last("a")[name] for name in run.layout.decoder}, run.layout.encoder)

    assert not (tmp_path / "a" / ENCODER).exists()
    save(run, tmp_path / "a", run.last("a"), run.layout.encoder)
    discard_site_model(tmp_path / "a")
    assert not (tmp_path / "a" / ENCODER).exists()
