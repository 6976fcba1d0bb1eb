"""Tables of image scores, per image, per site and for a whole run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsca_pipeline.evaluation import ALL_CLASSES
from fedsca_pipeline.evaluation.tables import (
    IMAGE_COLUMNS,
    MEAN,
    SITE_COLUMNS,
    WORST,
    final_table,
    image_table,
    site_table,
)


def score(dice: float, label: int = 1, empty: str = "", hd95: float = 4.0) -> dict[str, object]:
    return {"class": label, "dice": dice, "iou": dice / 2, "hd95": hd95, "asd": hd95 / 2, "empty": empty}


def images_of(site: str, dice: Sequence[float], model: str = "chosen") -> pd.DataFrame:
    return image_table(site, [f"image_{number}" for number in range(len(dice))], [score(d) for d in dice], model)


def row(table: pd.DataFrame, site: str, model: str = "chosen") -> Mapping[str, object]:
    (record,) = table[(table["site"] == site) & (table["model"] == model)].to_dict("records")
    return record


def two_sites() -> pd.DataFrame:
    frames = [
        images_of(site, dice, model)
        for model, shift in (("before", -0.4), ("after", 0.0), ("chosen", 0.05))
        for site, dice in (("b_site", [0.9 + shift]), ("a_site", [0.6 + shift, 0.8 + shift]))
    ]
    return site_table(pd.concat(frames))


TRAFFIC = {
    "a_site": {"bytes_up": 1_500_000, "bytes_down": 1_600_001, "best_round": 7},
    "b_site": {"bytes_up": 500_000, "bytes_down": 600_000, "best_round": 0},
}


def test_the_image_table_has_a_row_per_image_and_class_in_order() -> None:
    scores = [score(0.1), score(0.2, 2), score(0.3), score(0.4, 2)]

    table = image_table("a_site", ["x", "y"], scores, "before")

    assert tuple(table.columns) == IMAGE_COLUMNS
    assert table[["image", "class", "dice"]].to_records(index=False).tolist() == [
        ("x", 1, 0.1),
        ("x", 2, 0.2),
        ("y", 1, 0.3),
        ("y", 2, 0.4),
    ]
    assert set(table["site"]) == {"a_site"}
    assert set(table["model"]) == {"before"}


def test_scores_that_do_not_divide_over_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match="site a_site: 3 scores do not divide over 2 images"):
        image_table("a_site", ["x", "y"], [score(0.1)] * 3, "before")


def test_a_site_row_averages_classes_within_images_first() -> None:
    scores = [score(0.2, 1), score(0.6, 2), score(0.8, 1), score(1.0, 2)]

    table = site_table(image_table("a_site", ["x", "y"], scores, "chosen"))

    record = row(table, "a_site")
    assert tuple(table.columns) == SITE_COLUMNS
    assert record["dice"] == pytest.approx((0.4 + 0.9) / 2)
    assert record["dice_std"] == pytest.approx(0.25)
    assert record["images"] == 2


def test_only_masks_with_exactly_one_empty_are_counted() -> None:
    scores = [score(1, 1, "both"), score(0, 2, "truth"), score(0, 1, "prediction"), score(0.5, 2, "")]

    table = site_table(image_table("a_site", ["x", "y"], scores, "chosen"))

    assert row(table, "a_site")["one_empty"] == 2
    assert row(table, MEAN)["one_empty"] == 2


def test_the_mean_row_counts_each_site_once_whatever_its_number_of_images() -> None:
    table = site_table(pd.concat([images_of("small", [1.0]), images_of("large", [0.0, 0.0, 0.0])]))

    mean = row(table, MEAN)

    assert mean["dice"] == pytest.approx(0.5)
    assert mean["dice_std"] == pytest.approx(0.5)
    assert mean["images"] == 4
    assert mean["note"] == "unweighted, over 2 sites"


def test_the_worst_site_has_the_lowest_dice_and_is_named() -> None:
    table = site_table(pd.concat([images_of("good", [0.9]), images_of("bad", [0.2, 0.4]), images_of("fair", [0.5])]))

    worst = row(table, WORST)

    assert worst["note"] == "lowest Dice: bad"
    assert {k: v for k, v in worst.items() if k not in ("site", "note")} == {
        k: v for k, v in row(table, "bad").items() if k not in ("site", "note")
    }


def test_at_a_tie_the_worst_site_is_the_first_by_name() -> None:
    table = site_table(pd.concat([images_of("z", [0.5]), images_of("m", [0.5]), images_of("a", [0.9])]))

    assert row(table, WORST)["note"] == "lowest Dice: m"


def test_one_site_with_one_image_gives_no_missing_value() -> None:
    table = site_table(images_of("alone", [0.7]))

    assert table["site"].tolist() == ["alone", MEAN, WORST]
    assert not table.isna().any(axis=None)
    assert row(table, "alone")["dice_std"] == 0
    assert row(table, MEAN)["note"] == "unweighted, over 1 site"


def test_models_come_in_the_order_of_a_run() -> None:
    models = two_sites()["model"].drop_duplicates().tolist()

    assert models == ["before", "after", "chosen"]


def test_each_model_has_its_own_worst_site() -> None:
    images = [images_of("a", [0.2], "before"), images_of("b", [0.3], "before")]
    images += [images_of("a", [0.9], "after"), images_of("b", [0.8], "after")]

    table = site_table(pd.concat(images))

    assert row(table, WORST, "before")["note"] == "lowest Dice: a"
    assert row(table, WORST, "after")["note"] == "lowest Dice: b"


def test_tables_without_images_are_empty() -> None:
    images = image_table("a_site", [], [], "chosen")

    sites = site_table(images)
    final = final_table(sites, {})

    assert tuple(images.columns) == IMAGE_COLUMNS
    assert tuple(sites.columns) == SITE_COLUMNS
    assert images.empty
    assert sites.empty
    assert final.empty


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]), st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_rows_does_not_matter_and_the_worst_is_at_most_the_mean(dice, random) -> None:
    images = pd.concat([images_of(site, values) for site, values in dice.items()], ignore_index=True)
    order = list(range(len(images)))
    random.shuffle(order)

    table, shuffled = site_table(images), site_table(images.iloc[order])

    pd.testing.assert_frame_equal(table, shuffled)
    assert row(table, WORST)["dice"] <= row(table, MEAN)["dice"] + 1e-12


def test_the_final_table_joins_dice_of_the_three_models_and_traffic() -> None:
    table = final_table(two_sites(), TRAFFIC)

    assert table.columns.tolist() == [
        "site", "Dice before", "Dice after", "Dice chosen", "HD95", "bytes up", "bytes down", "best round",
    ]  # fmt: skip
    assert table["site"].tolist() == ["a_site", "b_site", MEAN]
    assert table["Dice before"].tolist() == pytest.approx([0.3, 0.5, 0.4])
    assert table["Dice chosen"].tolist() == pytest.approx([0.75, 0.95, 0.85])
    assert table["bytes up"].tolist() == [1_500_000, 500_000, 1_000_000]
    assert table["best round"].tolist()[:2] == [7, 0]
    assert table["best round"].isna().tolist() == [False, False, True]


def test_the_final_table_has_the_privacy_spent_if_any_site_has_it() -> None:
    spent = {"a_site": {**TRAFFIC["a_site"], "epsilon": 2.5, "privacy": "image-level"}, "b_site": TRAFFIC["b_site"]}

    table = final_table(two_sites(), spent)

    assert table["epsilon"].tolist()[0] == 2.5
    assert table["epsilon"].isna().tolist() == [False, True, True]
    assert json.loads(table.to_json(orient="records"))[2]["privacy"] is None


def test_hd95_of_the_final_table_is_the_chosen_models() -> None:
    before = image_table("a", ["x"], [score(0.1, hd95=90.0)], "before")
    chosen = image_table("a", ["x"], [score(0.9, hd95=3.0)], "chosen")

    table = final_table(site_table(pd.concat([before, chosen])), {})

    assert table["HD95"].tolist() == [3.0, 3.0]


def test_a_site_without_traffic_has_sent_nothing() -> None:
    table = final_table(two_sites(), {"a_site": TRAFFIC["a_site"]})

    b_site = row(table.assign(model="chosen"), "b_site")
    assert (b_site["bytes up"], b_site["bytes down"]) == (0, 0)
    assert pd.isna(b_site["best round"])


def test_the_final_table_survives_csv_and_json(tmp_path) -> None:
    table = final_table(two_sites(), TRAFFIC)

    table.to_csv(tmp_path / "final.csv", index=False)

    read = pd.read_csv(tmp_path / "final.csv", dtype={"best round": "Int64"})
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert json.loads(table.to_json(orient="records"))[2]["best round"] is None


def test_a_model_evaluated_at_some_sites_only_has_no_mean() -> None:
    images = pd.concat([images_of("a", [0.2], "before"), images_of("b", [0.3], "chosen"), images_of("a", [0.4])])

    table = final_table(site_table(images), {})

    assert table["Dice before"].isna().tolist() == [False, True, True]


CLASSES = ("tumour", "cyst", "vessel")


Classes = Mapping[int, Sequence[float]]


def several_classes(dice: Mapping[str, Classes], models: Sequence[str] = ("before", "chosen")) -> pd.DataFrame:
    """Return an image table from Dice by site and class, one value per image."""
    return pd.concat([image_table(*_of_site(site, dice[site]), model) for site in dice for model in models])


def _of_site(site: str, classes: Classes) -> tuple[str, list[str], list[dict[str, object]]]:
    images = range(len(next(iter(classes.values()))))
    scores = [score(values[image], label) for image in images for label, values in classes.items()]
    return site, [f"image_{image}" for image in images], scores


TWO_AND_THREE = {"a": {1: [0.2, 0.4], 2: [0.6, 0.6], 3: [1.0, 1.0]}, "b": {1: [0.5], 3: [0.7]}}


def class_row(table: pd.DataFrame, site: str, name: str) -> Mapping[str, object]:
    wanted = (table["site"] == site) & (table["class"] == name) & (table["model"] == "chosen")
    (record,) = table[wanted].to_dict("records")
    return record


def test_a_class_is_averaged_over_the_sites_that_have_it_which_the_note_says() -> None:
    table = site_table(several_classes(TWO_AND_THREE), CLASSES)

    assert class_row(table, "a", ALL_CLASSES)["dice"] == pytest.approx((0.3 + 0.6 + 1.0) / 3)
    assert class_row(table, "b", ALL_CLASSES)["dice"] == pytest.approx((0.5 + 0.7) / 2)
    assert class_row(table, "b", ALL_CLASSES)["note"] == "without cyst"
    assert class_row(table, MEAN, "tumour")["dice"] == pytest.approx((0.3 + 0.5) / 2)
    assert class_row(table, MEAN, "cyst")["dice"] == pytest.approx(0.6)
    assert class_row(table, MEAN, "cyst")["note"] == "unweighted, over 1 of 2 sites: not at b"
    assert class_row(table, MEAN, "vessel")["note"] == "unweighted, over 2 sites"
    assert class_row(table, WORST, "vessel")["note"] == "lowest Dice: b"
    assert not ((table["site"] == "b") & (table["class"] == "cyst")).any()
    assert not table.drop(columns="note").isna().any().any()


def test_the_final_table_has_every_class_and_no_dice_at_sites_without_it() -> None:
    final = final_table(site_table(several_classes(TWO_AND_THREE), CLASSES), {}).set_index("site")

    assert list(final.columns)[:6] == [
        "Dice before", "Dice after", "Dice chosen", "Dice chosen tumour", "Dice chosen cyst", "Dice chosen vessel",
    ]  # fmt: skip
    assert final.loc["b", "Dice chosen"] == pytest.approx(0.6)
    assert pd.isna(final.loc["b", "Dice chosen cyst"])
    assert final.loc[MEAN, ["Dice chosen tumour", "Dice chosen cyst"]].tolist() == pytest.approx([0.4, 0.6])


def test_the_mean_of_a_class_is_missing_if_a_site_that_has_it_has_no_model() -> None:
    images = several_classes(TWO_AND_THREE)
    images = images[(images["site"] != "a") | (images["model"] != "chosen")]

    final = final_table(site_table(images, CLASSES), {}).set_index("site")

    assert final.loc[MEAN, ["Dice chosen tumour", "Dice chosen cyst", "Dice chosen vessel"]].isna().all()
    assert final.loc["b", "Dice chosen vessel"] == pytest.approx(0.7)


two_images = st.lists(st.floats(0, 1), min_size=2, max_size=2)
owned = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.sets(st.integers(1, 3), min_size=1).flatmap(
        lambda labels: st.fixed_dictionaries(dict.fromkeys(sorted(labels), two_images))
    ),
    min_size=1,
)


@settings(max_examples=40)
@given(dice=owned)
def test_means_cover_exactly_the_classes_that_each_site_has(dice) -> None:
    table = site_table(several_classes(dice), CLASSES)
    final = final_table(table, {}).set_index("site")

    assert not table.drop(columns="note").isna().any().any()
    for label, name in enumerate(CLASSES, start=1):
        means = [sum(classes[label]) / 2 for classes in dice.values() if label in classes]
        if means:
            assert final.loc[MEAN, f"Dice chosen {name}"] == pytest.approx(sum(means) / len(means))
        else:
            assert f"Dice chosen {name}" not in final
    means = [sum(sum(values) / 2 for values in classes.values()) / len(classes) for classes in dice.values()]
    assert final.loc[MEAN, "Dice chosen"] == pytest.approx(sum(means) / len(means))
