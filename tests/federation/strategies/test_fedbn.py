"""FedBN: norms train and stay at the site; everything else is averaged."""

from __future__ import annotations

import torch
from torch import nn

from fedsca_pipeline.config import AdaptersConfig
from fedsca_pipeline.federation.strategies import build_strategy


def test_norms_train_and_stay_at_the_site(make_layout):
    layout = make_layout()
    fedbn = build_strategy("fedbn", {}, layout)
    in_decoder = set(layout.norms) & set(layout.decoder)
    in_encoder = set(layout.norms) - in_decoder

    assert in_decoder
    assert in_encoder
    assert set(fedbn.trained()) == {*layout.efficient, *in_encoder}
    assert set(fedbn.shared()) == set(layout.efficient) - in_decoder


def test_the_layout_lists_every_norm_of_the_model(make_worker, make_layout):
    norms = {
        f"{path}.{name}"
        for path, module in make_worker("fedbn").model.named_modules()
        if "norm" in type(module).__name__.lower() and not isinstance(module, nn.ModuleList)
        for name, _ in module.named_parameters(recurse=False)
    }

    assert norms
    assert set(make_layout().norms) == norms


def test_norms_among_the_adapters_are_trained_once_and_stay_at_the_site(make_layout):
    layout = make_layout(AdaptersConfig(method="lora", options={"r": 2, "modules_to_save": ["norm"]}))
    fedbn = build_strategy("fedbn", {}, layout)
    trained, shared = fedbn.trained(), fedbn.shared()

    assert set(layout.norms) & set(layout.adapters)
    assert len(trained) == len(set(trained))
    assert not set(shared) & set(layout.norms)


def test_after_a_run_norms_differ_between_sites_and_shared_tensors_are_equal(federate):
    run = federate("fedbn")
    one, other = run.last("a"), run.last("b")
    shared, norms = run.worker.strategy.shared(), set(run.layout.norms)

    assert one.keys() == {*shared, *norms}
    assert all(torch.equal(one[name], other[name]) for name in shared)
    differ = {name for name in norms if not torch.equal(one[name], other[name])}
    assert differ & set(run.layout.encoder)
    assert differ & set(run.layout.decoder)
    assert all(not torch.equal(one[name], run.worker.initial[name]) for name in differ)


def test_the_frozen_prefix_ends_before_the_first_norm_that_trains(make_worker):
    adapters = AdaptersConfig(method="lora", options={"r": 2, "target_modules": ["layers.3.blocks.0.attn.qkv"]})
    plain, norms = (make_worker(name, adapters=adapters) for name in ("fedavg", "fedbn"))

    before = [name for module in norms.split._before for name, _ in module.named_parameters()]
    assert len(norms.split._before) < len(plain.split._before)
    assert not any("norm" in name for name in before)
