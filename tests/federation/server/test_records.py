from __future__ import annotations

import json

import numpy as np
import pytest

from fedsca_pipeline.federation.server.records import Matrices, RoundRecord, SiteRecord


def record(sites: int) -> RoundRecord:
    names = tuple(f"s{number:03d}" for number in range(sites))
    values = np.random.default_rng(0).random((2, sites, sites))
    return RoundRecord(
        round=3,
        final=False,
        sites={name: SiteRecord(bytes_up=1, loss=0.25) for name in names},
        accepted=names,
        similarity=Matrices.of(values),
        weights=Matrices.of(values / values.sum(axis=-1, keepdims=True)),
    )


@pytest.mark.parametrize("sites", [0, 1, 24, 25, 200])
def test_a_record_is_the_same_after_json(sites: int) -> None:
    before = record(sites)

    after = RoundRecord.from_json(json.loads(json.dumps(before.as_json())))

    assert after == before
    assert after.weights.array.shape == ((2, sites, sites) if sites else (0, 0, 0))


def test_json_of_few_sites_can_be_read_and_that_of_many_is_small() -> None:
    few, many = record(3), record(200)

    assert few.as_json()["weights"] == few.weights.array.tolist()
    # A float32 is four bytes, and base64 takes four letters for three of them.
    assert len(json.dumps(many.as_json()["weights"])) < 1.34 * 2 * 4 * 200**2


@pytest.mark.parametrize(
    "value",
    [{"shape": [1, 2, 2], "float32": "AAAA"}, {"shape": [1, 1, 1], "float32": "#"}, {"shape": [1]}, ["a"], [[1.0], []]],
)
def test_what_is_no_matrix_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Matrices.from_json(value)
