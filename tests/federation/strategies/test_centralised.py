"""Centralised training: permission, and the pooled data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsca_pipeline.config import TrainingConfig
from fedsca_pipeline.data.arrays import PooledArrays, SiteArrays
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.fleets.data import POOLED, PooledData
from fedsca_pipeline.federation.strategies import STRATEGIES, strategy_class
from fedsca_pipeline.federation.strategies.centralised import Centralised, CentralisedOptions

ALLOWED = {"allow_pooling": True}


@pytest.fixture
def sites(write_site):
    return {name: SiteArrays(*write_site(name, seed, count)) for seed, (name, count) in enumerate((("a", 3), ("b", 4)))}


def test_it_is_refused_unless_pooling_is_allowed():
    with pytest.raises(ConfigError, match=r"strategies\.centralised\.allow_pooling is false"):
        Centralised.check_use(CentralisedOptions(), "fel")
    Centralised.check_use(CentralisedOptions(**ALLOWED), "fel")


def test_no_other_strategy_pools():
    assert {name for name in STRATEGIES if strategy_class(name).pools} == {"centralised"}


def test_pooled_rows_number_the_images_of_all_sites(sites):
    pooled = PooledData(sites)[POOLED]

    assert pooled.rows("train").tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert pooled.rows("validation").tolist() == [3, 4, 10, 11]
    assert pooled.rows("test").tolist() == [5, 12]
    assert pooled.rows("nothing").tolist() == []
    assert pooled.rows("train").dtype == np.int64


def test_pooled_names_match_the_rows(sites):
    pooled = PooledData(sites)[POOLED]

    for split in ("train", "validation", "test"):
        assert pooled.names(split) == sites["a"].names(split) + sites["b"].names(split)
        assert len(pooled.names(split)) == len(pooled.rows(split))


def test_pooled_batches_hold_the_images_of_the_sites_in_any_order(sites):
    pooled = PooledData(sites)[POOLED]

    found = pooled.batch([12, 0, 5, 6, 0])

    own = [sites["b"].batch([6]), sites["a"].batch([0, 5]), sites["b"].batch([0]), sites["a"].batch([0])]
    for array, parts in zip(found, zip(*own, strict=True), strict=True):
        assert array.dtype == parts[0].dtype
        assert np.array_equal(array, np.concatenate(parts))


@pytest.mark.parametrize("rows", [[], [13], [-1], [0, 99]])
def test_rows_that_no_site_has_are_refused(rows, sites):
    with pytest.raises(IndexError):
        PooledData(sites)[POOLED].batch(rows)


def test_a_pool_without_sites_is_empty():
    assert PooledArrays([], []).rows("train").tolist() == []


def test_the_pooled_site_is_the_only_one(sites):
    pooled = PooledData(sites)

    assert (list(pooled), len(pooled)) == ([POOLED], 1)
    with pytest.raises(KeyError):
        pooled["a"]


def test_sites_are_pooled_in_the_order_of_their_names(sites):
    backwards = PooledData(dict(reversed(sites.items())))[POOLED]

    assert backwards.rows("train").tolist() == PooledData(sites)[POOLED].rows("train").tolist()


def test_new_splits_hold_exactly_the_named_rows(sites):
    site = sites["a"]

    found = site.with_splits({"train": [4], "test": [0, 5]})

    assert [found.rows(split).tolist() for split in ("train", "validation", "test")] == [[4], [], [0, 5]]
    assert found.names("test") == ["000", "005"]
    assert found.subjects("train") == ["004"]
    assert np.array_equal(found.batch([4])[0], site.batch([4])[0])
    assert site.rows("train").tolist() == [0, 1, 2]


@pytest.mark.parametrize(("steps", "expected"), [(None, None), (5, 15)])
def test_a_pooled_site_does_the_steps_of_all_sites(steps, expected):
    found = TrainingConfig(steps_per_round=steps, local_epochs=2).times(3)

    assert found.steps_per_round == expected
    assert found.local_epochs == 2


def test_a_run_trains_one_model_on_every_image_and_sends_nothing(sites, federate):
    run = federate("centralised", ALLOWED, data=PooledData(sites))

    reply = run.replies[1, POOLED].manifest
    assert run.sites() == (POOLED,)
    assert (reply.samples, reply.metrics["steps"]) == (7, 4)
    assert not run.sent[2, POOLED].tensors
    assert not run.replies[2, POOLED].tensors
    assert any(not torch.equal(t, run.worker.initial[n]) for n, t in run.last(POOLED).items())


def test_a_pool_of_one_site_trains_like_that_site_alone(sites, federate):
    def rename(worker):
        local_steps = worker._local_steps
        worker._local_steps = lambda this: local_steps(replace(this, site="a"))

    pooled = federate("centralised", ALLOWED, data=PooledData({"a": sites["a"]}), change=rename)
    alone = federate("local", data={"a": sites["a"]})

    assert all(torch.equal(tensor, alone.last("a")[name]) for name, tensor in pooled.last(POOLED).items())
