"""Round records become learning curves and aggregation weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd

from fedsca_pipeline.evaluation.history import aggregation_weights, history_table, records_of
from fedsca_pipeline.federation.server.records import Matrices, RoundRecord, SiteRecord


def record(round_: int, *, final: bool = False, **dice: float | None) -> RoundRecord:
    """Return a round with the given Dice by site; None: the site was absent."""
    sites = {
        site: SiteRecord(absent="not drawn this round")
        if value is None
        else SiteRecord(
            dice_validation=value, loss=None if final else 1.0 / round_, dice_local=value, self_weight=0.5, seconds=1.0
        )
        for site, value in dice.items()
    }
    return RoundRecord(
        round=round_, final=final, sites=sites, accepted=tuple(s for s, v in dice.items() if v is not None)
    )


class TestHistoryTable:
    def test_validation_dice_belongs_to_the_round_before(self) -> None:
        table = history_table([record(1, a=0.1), record(2, a=0.4), record(3, a=0.6, final=True)])

        assert list(table["round"]) == [0, 1, 2]
        assert list(table["dice_validation"]) == [0.1, 0.4, 0.6]

    def test_loss_belongs_to_its_own_round_and_the_foundation_has_none(self) -> None:
        table = history_table([record(1, a=0.1), record(2, a=0.4), record(3, a=0.6, final=True)])

        assert pd.isna(table["loss"].iloc[0])
        assert list(table["loss"].iloc[1:]) == [1.0, 0.5]

    def test_an_absent_site_has_no_loss_in_that_round(self) -> None:
        table = history_table([record(1, a=0.1, b=None), record(2, a=0.4, b=0.3), record(3, a=0.5, b=0.5, final=True)])

        rounds_of_b = table.loc[table["site"] == "b", "round"]
        assert list(rounds_of_b) == [1, 2]
        assert table.loc[(table["site"] == "b") & (table["round"] == 1), "loss"].isna().all()

    def test_rows_come_by_round_and_site(self) -> None:
        table = history_table([record(1, b=0.1, a=0.2), record(2, b=0.3, a=0.4)])

        rows = list(zip(table["round"], table["site"], strict=True))
        assert rows == sorted(rows)

    def test_no_record_gives_no_row(self) -> None:
        assert history_table([]).empty


class TestRecordsOf:
    def test_only_this_run_s_records_are_read_in_order(self) -> None:
        stored = {
            "mine/round_00002": record(2, a=0.2),
            "mine/round_00001": record(1, a=0.1),
            "other/round_00001": record(1, a=0.9),
        }
        partitions = {key: partial(dict, value.as_json()) for key, value in stored.items()}

        found = records_of({"fingerprint": "mine"}, partitions)

        assert found == [stored["mine/round_00001"], stored["mine/round_00002"]]

    def test_partitions_of_other_runs_are_not_loaded(self) -> None:
        def refuse() -> None:
            raise AssertionError("loaded")

        assert records_of({"fingerprint": "mine"}, {"other/round_00001": refuse}) == []


class TestAggregationWeights:
    def test_weights_are_averaged_over_groups_and_rounds_without_weights_are_left_out(self) -> None:
        groups = Matrices.of([[[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.0, 1.0]]])

        weights = aggregation_weights([record(1, a=0.1, b=0.2), replace(record(2, a=0.3, b=0.4), weights=groups)])

        assert list(weights) == [2]
        expected = pd.DataFrame([[0.75, 0.25], [0.25, 0.75]], index=["a", "b"], columns=["a", "b"])
        pd.testing.assert_frame_equal(weights[2], expected)
