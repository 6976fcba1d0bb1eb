"""Tables of volume scores, per volume, per site and for the chosen models."""

from __future__ import annotations

import pandas as pd
import pytest

from fedsca_pipeline.evaluation.volume_tables import (
    VOLUME_COLUMNS,
    final_volume_table,
    site_volume_table,
    volume_table,
)


def record(label: int, dice: float, distance: float = 1.0, empty: str = "") -> dict[str, object]:
    return {"class": label, "dice": dice, "hd95_mm": 2 * distance, "asd_mm": distance, "nsd": dice, "empty": empty}


def scores(site: str, model: str, **dice: float) -> pd.DataFrame:
    return volume_table(site, model, {name: [record(1, value)] for name, value in dice.items()})


def test_there_is_one_row_per_volume_and_class() -> None:
    table = volume_table("north", "chosen", {name: [record(1, 0.5), record(2, 0.7)] for name in ("a", "b")})
    assert list(table.columns) == list(VOLUME_COLUMNS)
    assert table[["volume", "class"]].to_numpy().tolist() == [["a", 1], ["a", 2], ["b", 1], ["b", 2]]


def test_sites_are_means_over_volumes_and_count_once_in_the_mean() -> None:
    volumes = pd.concat([scores("north", "chosen", a=0.2, b=0.4, c=0.6), scores("south", "chosen", a=0.8)])
    table = site_volume_table(volumes, ["class 1"]).set_index("site")
    assert table["volumes"].to_dict() == {"north": 3, "south": 1, "mean over sites": 4, "worst site": 3}
    assert table.loc["north", "dice"] == pytest.approx(0.4)
    assert table.loc["mean over sites", "dice"] == pytest.approx(0.6)
    assert table.loc["worst site", "note"] == "lowest Dice: north"
    assert {"hd95_mm_std", "asd_mm", "nsd_std"} <= set(table.columns)


def test_the_final_table_has_the_chosen_models_and_no_scores_without_one() -> None:
    parts = [scores(site, model, a=0.5, b=0.7) for site in ("south", "north") for model in ("before", "chosen")]
    final = final_volume_table(site_volume_table(pd.concat(parts), ["class 1"]))
    assert final["site"].tolist() == ["north", "south", "mean over sites"]
    assert final["volumes"].tolist() == [2, 2, 4]
    assert final["volume Dice"].tolist() == pytest.approx([0.6] * 3)
    assert final["volume HD95 mm"].tolist() == pytest.approx([2.0] * 3)

    silent = pd.concat([*parts[2:], scores("south", "before", a=0.1)])
    final = final_volume_table(site_volume_table(silent, ["class 1"])).set_index("site")
    assert final["volume Dice"].isna().to_dict() == {"north": False, "south": True, "mean over sites": True}


def test_classes_are_averaged_in_the_final_table_and_separate_in_the_table_of_sites() -> None:
    volumes = volume_table("north", "chosen", {"a": [record(1, 0.2), record(2, 0.6)]})
    sites = site_volume_table(volumes, ["liver", "tumour"])
    north = sites[sites["site"] == "north"].set_index("class")["dice"]
    assert north.to_dict() == pytest.approx({"mean over classes": 0.4, "liver": 0.2, "tumour": 0.6})
    assert final_volume_table(sites)["volume Dice"].tolist() == pytest.approx([0.4, 0.4])


def test_no_volume_gives_no_row() -> None:
    sites = site_volume_table(volume_table("north", "chosen", {}), ["class 1"])
    assert sites.empty
    assert final_volume_table(sites).empty
