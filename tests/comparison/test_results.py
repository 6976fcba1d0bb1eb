"""Finished cells on disk, and their tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsca_pipeline.comparison.results import frames, read_result, validation_dice


@pytest.fixture
def cell(make_setting, grid):
    return grid(make_setting({"fedsca": {}}))[0]


@pytest.fixture
def store(tmp_path: Path, cell) -> Callable[[Any], Path]:
    """Write a content to the path of the cell's result."""

    def write(content: Any) -> Path:
        path = tmp_path / f"{cell.fingerprint}.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


class TestReadResult:
    def test_a_valid_result_is_read_without_a_warning(self, tmp_path, cell, store, result_of, caplog) -> None:
        store(result_of(cell))

        assert read_result(tmp_path, cell) == result_of(cell)
        assert caplog.text == ""

    def test_a_missing_result_is_none_without_a_warning(self, tmp_path, cell, caplog) -> None:
        assert read_result(tmp_path, cell) is None
        assert caplog.text == ""

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:-20],
            lambda text: b"",
            lambda text: b"\xff\xfe" + text,
            lambda text: b"[]",
            lambda text: b"null",
            lambda text: b"{}",
        ],
    )
    def test_a_damaged_file_is_named_and_not_used(self, tmp_path, cell, store, result_of, caplog, damage) -> None:
        path = store(damage(json.dumps(result_of(cell)).encode()))

        assert read_result(tmp_path, cell) is None
        assert (
            f"{path}: the result of fedsca, seed 0, all images, rate 0.01 is damaged; the cell runs again"
            in caplog.text
        )

    def test_a_result_with_a_changed_description_is_not_used(self, tmp_path, cell, store, result_of, caplog) -> None:
        changed = result_of(cell)
        changed["description"] = {**changed["description"], "seed": 1}
        store(changed)

        assert read_result(tmp_path, cell) is None
        assert "damaged" in caplog.text

    def test_another_cell_s_content_is_not_used(
        self, tmp_path, make_setting, grid, cell, store, result_of, caplog
    ) -> None:
        (other,) = grid(make_setting({"fedsca": {}}, seeds=[1]))
        store({**result_of(other), "fingerprint": cell.fingerprint})

        assert read_result(tmp_path, cell) is None
        assert "damaged" in caplog.text

    def test_a_result_of_other_data_is_not_read(
        self, tmp_path, make_setting, grid, cell, store, result_of, caplog
    ) -> None:
        store(result_of(cell))
        (now,) = grid(make_setting({"fedsca": {}}, data={"a": "new", "b": "data of b", "c": "data of c"}))

        assert read_result(tmp_path, now) is None
        assert caplog.text == ""

    @pytest.mark.parametrize(
        "part",
        ["fingerprint", "code", "description", "method", "left_out", "sites", "rounds", "traffic", "unseen", "seconds"],
    )
    def test_a_result_that_lacks_a_part_is_not_used(self, tmp_path, cell, store, result_of, part: str) -> None:
        result = result_of(cell)
        del result[part]
        store(result)

        assert read_result(tmp_path, cell) is None


def test_validation_dice_is_the_mean_over_sites(cell, result_of) -> None:
    result = result_of(cell)
    for value, site in enumerate(result["sites"].values()):
        site["dice_validation"] = 0.25 * value

    assert validation_dice(result) == pytest.approx(0.25)


class TestFrames:
    def test_every_image_has_a_row_and_every_cell_has_its_costs(self, cell, result_of) -> None:
        found = frames([(cell, result_of(cell, {"a": 0.1, "b": 0.2, "c": 0.3}, images=2))])

        assert found.scores.to_dict("list") == {
            "method": ["fedsca"] * 6,
            "seed": [0] * 6,
            "site": ["a", "a", "b", "b", "c", "c"],
            "image": ["a0", "a1", "b0", "b1", "c0", "c1"],
            "dice": [0.1, 0.11, 0.2, 0.21, 0.3, 0.31],
            "hd95": [4.0] * 6,
        }
        assert found.costs.to_dict("records") == [
            {"method": "fedsca", "seed": 0, "bytes_up": 10.0, "bytes_down": 20.0, "bytes_to_95": 120.0, "seconds": 3.0,
             "peak_memory": 2**20}
        ]  # fmt: skip
        assert found.unseen.empty

    def test_a_curve_s_dice_belongs_to_the_previous_round_and_the_bytes_until_then(self, cell, result_of) -> None:
        curve = frames([(cell, result_of(cell))]).curves

        assert list(curve["round"]) == [0, 1, 2]
        assert list(curve["dice_validation"]) == pytest.approx([0.1, 0.2, 0.3])
        assert list(curve["bytes"]) == [0, 100, 200]

    def test_a_round_without_validation_has_no_point_but_its_bytes_count(self, cell, result_of) -> None:
        result = result_of(cell)
        for site in result["rounds"][1]["sites"].values():
            del site["dice_validation"]

        curve = frames([(cell, result)]).curves

        assert list(curve["round"]) == [0, 2]
        assert list(curve["bytes"]) == [0, 200]

    def test_a_left_out_site_has_rows_of_its_own_cell_only(self, make_setting, grid, result_of) -> None:
        cells = grid(make_setting({"fedsca": {}}, unseen_sites=["c"], leave_one_out=True))

        found = frames([(cell, result_of(cell)) for cell in cells])

        assert set(found.scores["site"]) == {"a", "b"}
        assert len(found.costs) == 1
        assert not found.scores.duplicated(["method", "seed", "site", "image"]).any()
        assert not found.unseen.duplicated(["method", "seed", "site", "received", "image"]).any()
        assert set(found.unseen["site"]) == {"a", "b", "c"}

    def test_without_results_the_tables_have_columns_and_no_rows(self) -> None:
        found = frames([])

        assert {len(table) for table in (found.scores, found.costs, found.curves, found.unseen)} == {0}
        assert list(found.unseen) == ["method", "seed", "site", "received", "image", "dice", "hd95"]
