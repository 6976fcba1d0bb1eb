"""Properties of every registered strategy: consistent answers, and runs that finish and repeat bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fedsca_pipeline.config import AdaptersConfig
from fedsca_pipeline.federation.fleets.data import POOLED, PooledData
from fedsca_pipeline.federation.strategies import STRATEGIES, build_strategy, strategy_class, strategy_options

LORA = AdaptersConfig(method="lora", options={"r": 2})
OPTIONS = {"centralised": {"allow_pooling": True}}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def adapters_of(name: str) -> AdaptersConfig | None:
    return LORA if "lora" in strategy_class(name).adapter_methods else None


@every_strategy
def test_its_answers_are_consistent(name, make_layout):
    layout = make_layout(adapters_of(name))
    strategy = build_strategy(name, OPTIONS.get(name, {}), layout)
    shared, trained = strategy.shared(), strategy.trained()
    phases, wire, groups = strategy.phases(), strategy.wire_shapes(), strategy.groups()

    strategy.check_use(strategy.options, "lora" if adapters_of(name) else "fel")
    assert len(set(trained)) == len(trained)
    assert set(shared) <= set(trained) <= set(layout.shapes)
    assert tuple(wire) == (*shared, *strategy.extra_shapes())
    assert not set(strategy.extra_shapes()) & set(layout.shapes)
    assert {n for phase in phases if not phase.personal for n in phase.trained} == set(trained)
    assert all(phase.share > 0 for phase in phases)
    ends = [0, *(group.stop for group in groups)]
    assert [(group.start, group.stop) for group in groups] == list(pairwise(ends))
    assert ends[-1] == sum(torch.Size(shape).numel() for shape in wire.values())


@every_strategy
def test_options_read_back_from_a_result_are_the_same(name):
    options = strategy_options(name, OPTIONS.get(name, {}))

    again = strategy_options(name, options.model_dump(mode="json", exclude_defaults=True))

    assert again == options


# Parts of the layout that train, and parts that cross the wire.
TRAINED_AND_SHARED = {
    "fedsca": ("adapters decoder", "low"),
    "local": ("adapters decoder", ""),
    "local_full": ("encoder decoder", ""),
    "centralised": ("adapters decoder", ""),
    "fedavg_full": ("encoder decoder", "encoder decoder"),
    "fedavg": ("adapters decoder", "adapters decoder"),
    "fedavg_low": ("adapters decoder", "low"),
    "fedprox": ("adapters decoder", "adapters decoder"),
    "scaffold": ("adapters decoder", "adapters decoder"),
    "fednova": ("adapters decoder", "adapters decoder"),
    "fedbn": ("adapters decoder encoder_norms", "adapters decoder_but_norms"),
    "fedper": ("adapters decoder", "adapters"),
    "fedrep": ("adapters decoder", "adapters"),
    "ditto": ("adapters decoder", "adapters decoder"),
    "fedamp": ("adapters decoder", "adapters decoder"),
    "pfedgraph": ("adapters decoder", "adapters decoder"),
    "fedsa_lora": ("adapters decoder", "lora_A"),
    "ffa_lora": ("lora_B decoder", "lora_B"),
    "flap_sam": ("adapters decoder", "adapters"),
    "median": ("adapters decoder", "adapters decoder"),
    "trimmed_mean": ("adapters decoder", "adapters decoder"),
    "krum": ("adapters decoder", "adapters decoder"),
}


@every_strategy
def test_the_default_parts_train_and_cross_the_wire(name, make_layout):
    layout = make_layout(adapters_of(name))
    strategy = build_strategy(name, {}, layout)
    parts = {
        "adapters": layout.adapters,
        "decoder": layout.decoder,
        "encoder": layout.encoder,
        "low": tuple(n for block in layout.blocks[: (len(layout.blocks) + 1) // 2] for n in block),
        "encoder_norms": tuple(n for n in layout.norms if n in layout.encoder),
        "decoder_but_norms": tuple(n for n in layout.decoder if n not in layout.norms),
        "lora_A": tuple(n for n in layout.adapters if ".lora_A." in n),
        "lora_B": tuple(n for n in layout.adapters if ".lora_B." in n),
    }

    found = strategy.trained(), strategy.shared()

    for names, expected in zip(found, TRAINED_AND_SHARED[name], strict=True):
        assert set(names) == {n for part in expected.split() for n in parts[part]}
        assert len(names) == len(set(names))


@every_strategy
@pytest.mark.parametrize("wire_dtype", ["fp16", "int8"])
def test_two_rounds_with_an_absent_site_finish_and_repeat_bit_for_bit(name, wire_dtype, federate, three_sites):
    data, absent = {site: three_sites[site] for site in "ab"}, {"b": [2]}
    if strategy_class(name).pools:
        data, absent = PooledData(data), {}

    one, other = (
        federate(
            name,
            OPTIONS.get(name, {}),
            wire_dtype=wire_dtype,
            data=data,
            absent=absent,
            adapters=adapters_of(name),
            # In the first step a penalty on the distance to what was received is zero.
            steps_per_round=2,
        )
        for _ in range(2)
    )

    sites = (POOLED,) if POOLED in data else ("a", "b")
    assert [record.accepted for record in one.records[:2]] == [sites, tuple(s for s in sites if s not in absent)]
    assert [record.final for record in one.records] == [False, False, True]
    assert one.records[-1].sites[sites[-1]].dice_validation is not None
    for site in sites:
        last = one.last(site)
        assert all(tensor.isfinite().all() for tensor in last.values())
        moved = {n for n, tensor in last.items() if not torch.equal(tensor, one.worker.initial[n])}
        assert moved & set(one.worker.strategy.trained())
    mine, theirs = one.bits(), other.bits()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
