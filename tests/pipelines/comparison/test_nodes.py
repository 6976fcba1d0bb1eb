"""The comparison's nodes: which results they use, which cells they run, and what they refuse."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedsca_pipeline.comparison import grid as grids
from fedsca_pipeline.comparison import report, results
from fedsca_pipeline.comparison.plan import Cell, cells, check_comparison, resolve_methods, setting_of
from fedsca_pipeline.comparison.results import rates_of, read_known
from fedsca_pipeline.config import ComparisonConfig, Settings
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.pipelines.comparison import nodes
from fedsca_pipeline.pipelines.comparison.nodes import plan_comparison, report_comparison, run_cells

SITES = ("a", "b")


@pytest.fixture(autouse=True)
def code_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (report, results):
        monkeypatch.setattr(module, "code_at_work", lambda: "now")


SETTINGS = Settings(strategies={"fedsca": {"rho": 0.5}, "fedavg": None})


def config(**comparison: Any) -> ComparisonConfig:
    given = {"methods": {"fedsca": {}, "local": {}}, "seeds": [0, 1], "jobs": 1, **comparison}
    return ComparisonConfig.model_validate(given)


def planned(**comparison: Any) -> dict[str, Any]:
    reports = [{"site": site, "fingerprint": f"raw {site}", "images": 4} for site in SITES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "data_version", lambda raw, report: f"version of {raw}")
        return plan_comparison(SETTINGS, config(**comparison), {"sha256": "f"}, *reports)


def result(cell: Cell, code: str = "now", dice: float = 0.5) -> dict[str, Any]:
    scores = {"round": 1, "dice_validation": dice, "images": ["x", "y"], "dice": [dice, dice], "hd95": [1.0, 1.0]}
    return {
        "fingerprint": cell.fingerprint,
        "code": code,
        "description": dict(cell.description),
        "method": cell.method,
        "left_out": cell.left_out,
        "sites": dict.fromkeys(cell.sites, scores),
        "rounds": [],
        "traffic": {"bytes_up": 1.0, "bytes_down": 1.0, "bytes_to_95": None},
        "unseen": {},
        "seconds": 1.0,
        "peak_memory": None,
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the cells that ran. A cell's Dice is its learning rate; it fails if the file ``failing`` names it."""
    ran: list[str] = []

    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

    def answer(pool: Pool, todo: Iterable[Cell]) -> Iterator[tuple[Cell, Any]]:
        for cell in todo:
            ran.append(str(cell))
            failed = (tmp_path / "failing").is_file() and (tmp_path / "failing").read_text() in str(cell)
            yield cell, grids.Failed("no luck") if failed else result(cell, dice=cell.learning_rate)

    monkeypatch.setattr(grids, "open_grid", lambda *_: Pool())
    monkeypatch.setattr(grids, "run_grid", answer)
    return ran


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "cells"
    folder.mkdir()
    return folder


@pytest.fixture
def compute(finished: Path, tmp_path: Path, computed: list[str]) -> Callable[..., list[str]]:
    """Run the cells of a plan, store their results, and return the names of the cells that ran."""

    def run(plan: Mapping[str, Any], *, force: bool = False) -> list[str]:
        del computed[:]
        inputs = [part for site in SITES for part in (pd.DataFrame({"site": [site]}), Path(site))]
        for chunk in run_cells(dict(plan), force, Path("foundations"), tmp_path / "scratch", finished, *inputs):
            for name, found in chunk.items():
                (finished / f"{name}.json").write_text(json.dumps(found))
        return list(computed)

    return run


ALL = [f"{method}, seed {seed}, all images, rate 0.001" for seed in (0, 1) for method in ("fedsca", "local")]


class TestPlan:
    def test_a_setting_survives_json(self) -> None:
        plan = json.loads(json.dumps(planned()))

        setting = setting_of(plan)

        assert dict(setting.data) == {"a": "version of raw a", "b": "version of raw b"}
        assert setting.foundation == "f"
        assert setting.strategies == {"fedsca": {"rho": 0.5}, "fedavg": {}}
        assert setting.config.seeds == [0, 1]

    @pytest.mark.parametrize(
        ("comparison", "said"),
        [
            ({"methods": {"fedsca": {}, "x": {"strategy": "fedprx"}}}, r"comparison\.methods\.x\.strategy"),
            ({"unseen_sites": ["c"]}, r"comparison\.unseen_sites: no such site: c; there are a, b"),
            ({"methods": {"fedsca": {}, "fedsa_lora": {}}}, r"comparison\.methods\.fedsa_lora: .*adapters\.method"),
        ],
    )
    def test_the_early_check_refuses_what_the_plan_refuses(self, comparison, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            check_comparison(SETTINGS, config(**comparison), SITES)
        with pytest.raises(ConfigError, match=said):
            planned(**comparison)

    def test_a_valid_comparison_is_accepted(self) -> None:
        check_comparison(SETTINGS, config(unseen_sites=["b"]), SITES)


class TestRunCells:
    def test_a_second_call_runs_no_cell(self, compute) -> None:
        assert sorted(compute(planned())) == sorted(ALL)
        assert compute(planned()) == []

    def test_a_result_is_yielded_before_the_next_cell_runs(self, compute, computed, finished, tmp_path) -> None:
        inputs = [part for site in SITES for part in (pd.DataFrame({"site": [site]}), Path(site))]
        chunks = run_cells(planned(), False, Path("foundations"), tmp_path / "scratch", finished, *inputs)

        assert len(next(chunks)) == 1
        assert len(computed) == 1
        chunks.close()

    def test_only_the_best_rate_enters_the_grid(self, compute) -> None:
        found = compute(planned(learning_rates=[0.1, 0.3, 0.2], methods={"fedsca": {}}))

        assert found == [f"fedsca, seed 0, all images, rate {rate}" for rate in (0.1, 0.3, 0.2)] + [
            "fedsca, seed 1, all images, rate 0.3"
        ]

    def test_rows_with_the_same_parameters_run_once(self, compute) -> None:
        plan = planned(methods={"fedsca": {}, "again": {"strategy": "fedsca", "ablation": "nothing"}})

        assert len(compute(plan)) == 2

    def test_force_runs_all_cells_again_and_removes_their_checkpoints(self, compute, tmp_path) -> None:
        compute(planned())
        setting = setting_of(planned())
        cell = cells(resolve_methods(setting), setting, {"fedsca": 0.001, "local": 0.001})[0]
        for name in (cell.fingerprint, "another"):
            (tmp_path / "scratch" / name / "now").mkdir(parents=True)

        assert sorted(compute(planned(), force=True)) == sorted(ALL)
        assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["another"]

    def test_a_failed_cell_is_named_skipped_and_tried_again_by_the_next_command(
        self, compute, tmp_path, caplog
    ) -> None:
        (tmp_path / "failing").write_text("local, seed 1")

        assert len(compute(planned())) == 4
        assert "local, seed 1, all images, rate 0.001: failed and is left out: no luck" in caplog.text
        assert "1 cell failed; the same command tries again" in caplog.text
        (tmp_path / "failing").unlink()
        assert compute(planned()) == ["local, seed 1, all images, rate 0.001"]

    def test_a_method_whose_rate_failed_is_not_tried_on_other_seeds(self, compute, tmp_path) -> None:
        (tmp_path / "failing").write_text("local, seed 0, all images, rate 0.1")

        found = compute(planned(learning_rates=[0.1, 0.2]))

        assert [name for name in found if name.startswith("local")] == [
            "local, seed 0, all images, rate 0.1",
            "local, seed 0, all images, rate 0.2",
        ]

    def test_without_any_result_an_error_says_so(self, compute, tmp_path) -> None:
        (tmp_path / "failing").write_text("seed")

        with pytest.raises(ConfigError, match="no cell of the comparison has a result; see the errors above"):
            compute(planned())

    def test_a_cell_with_a_damaged_result_runs_again(self, compute, finished, caplog) -> None:
        compute(planned())
        torn = sorted(finished.iterdir())[0]
        torn.write_text(torn.read_text()[:-9])

        assert len(compute(planned())) == 1
        assert f"{torn}: the result of" in caplog.text
        json.loads(torn.read_text())

    def test_results_of_other_data_are_not_used(self, compute) -> None:
        compute(planned())
        plan = planned()

        assert len(compute({**plan, "data": {**plan["data"], "a": "changed"}})) == 4


class TestOtherCode:
    @pytest.fixture
    def old(self, compute, finished: Path) -> Path:
        """The result that another code version made, in a finished grid."""
        compute(planned())
        path = next(
            path for path in finished.iterdir()
            if (found := json.loads(path.read_text()))["method"] == "local" and found["description"]["seed"] == 1
        )  # fmt: skip
        path.write_text(json.dumps({**json.loads(path.read_text()), "code": "old"}))
        return path

    def test_the_cell_runs_again_with_a_warning(self, old, compute, caplog) -> None:
        assert compute(planned()) == ["local, seed 1, all images, rate 0.001"]
        assert "another version of the code made 1 result; the cells run again" in caplog.text
        assert json.loads(old.read_text())["code"] == "now"

    def test_the_result_is_used_and_marked_if_same_code_is_false(self, old, compute, finished) -> None:
        plan = planned(same_code=False)

        assert compute(plan) == []
        page = report_comparison(plan, finished, None)[4]
        assert "| local † |" in page
        assert "| fedsca |" in page

    def test_if_the_cell_then_fails_its_result_is_missing(self, old, compute, finished, tmp_path) -> None:
        (tmp_path / "failing").write_text("local, seed 1")
        compute(planned())

        index, *_, page, _, _ = report_comparison(planned(), finished, None)

        assert old.stem not in index
        assert "†" not in page
        assert "- local, seed 1, all images, rate 0.001" in page


class TestReport:
    def test_a_damaged_result_is_missing_from_the_report(self, compute, finished, tmp_path) -> None:
        compute(planned())
        (torn,) = (
            path for path in finished.iterdir() if '"local"' in path.read_text() and '"seed": 1' in path.read_text()
        )
        torn.write_text("{")

        index, table, *_, page, _, _ = report_comparison(planned(), finished, None)

        assert torn.stem not in index
        assert len(index) == 3
        assert "## Missing" in page
        assert len(table) >= 1

    def test_results_of_other_comparisons_are_ignored(self, compute, finished, caplog) -> None:
        compute(planned(methods={"fedsca": {}, "local": {}, "fedavg": {}}))
        (finished / "0123456789abcdef.json").write_text("no result at all")

        index, table, *_ = report_comparison(planned(), finished, None)

        assert sorted(index.values()) == sorted(ALL)
        assert sorted(table["method"]) == ["fedsca", "local"]
        assert caplog.records == [] or all(record.levelno < logging.WARNING for record in caplog.records)


def test_rates_are_chosen_from_the_known_results() -> None:
    plan = planned(learning_rates=[0.1, 0.2])
    setting = setting_of(plan)
    methods = resolve_methods(setting)
    tuned = [cell for rate in (0.1, 0.2) for cell in cells(methods, setting, dict.fromkeys(methods, rate))]

    known = {cell.fingerprint: result(cell, dice=1 - cell.learning_rate) for cell in tuned if cell.method == "local"}

    assert rates_of(plan, known) == {"local": 0.1}


def test_only_usable_results_are_read(finished) -> None:
    setting = setting_of(planned())
    found = cells(resolve_methods(setting), setting, {"fedsca": 0.1, "local": 0.1})
    for cell, code in zip(found, ("now", "old", "now", "now"), strict=True):
        (finished / f"{cell.fingerprint}.json").write_text(json.dumps(result(cell, code)))

    strict, others = read_known(found[:3], finished, same_code=True)
    all_of_them, none = read_known([*found[:3], found[0]], finished, same_code=False)

    assert (list(strict), others) == ([found[0].fingerprint, found[2].fingerprint], 1)
    assert (list(all_of_them), none) == ([cell.fingerprint for cell in found[:3]], 0)
