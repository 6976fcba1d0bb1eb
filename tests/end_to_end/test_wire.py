from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file


@pytest.mark.slow
def test_compression_changes_what_is_sent_and_nothing_else(finished, sites, rounds) -> None:
    plain = sites.run("federated_training", f"federation.rounds={rounds},federation.compression=none")

    assert plain.code == 0, plain.output
    for path in sorted(finished.models.rglob("*.safetensors")):
        packed, unpacked = load_file(path), load_file(sites.models / path.relative_to(finished.models))
        assert packed.keys() == unpacked.keys()
        assert all(packed[name].equal(unpacked[name]) for name in packed), path
    tables = [json.loads((place.reporting / "final_table.json").read_text()) for place in (finished, sites)]
    for packed_row, plain_row in zip(*(table.values() for table in tables), strict=True):
        assert packed_row["bytes up"] < plain_row["bytes up"]
        assert packed_row["bytes down"] < plain_row["bytes down"]
