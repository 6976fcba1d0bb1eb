"""Learning curves, weight heat maps and overlays show what they are given."""

from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsca_pipeline.evaluation.figures import (
    OverlayExample,
    choose_examples,
    learning_curves,
    overlays,
    weight_heatmap,
    weight_heatmap_image,
)
from fedsca_pipeline.evaluation.tables import image_table

SITES = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]


def history_of(sites: int, rounds: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "round": number,
            "site": site,
            "dice_validation": 0.4 + 0.1 * number,
            "dice_local": 0.45 + 0.1 * number if number else None,
            "loss": 1 / number if number else None,
        }
        for number in range(rounds + 1)
        for site in SITES[:sites]
    )


def weights_of(sites: int, rounds: int = 3) -> dict[int, pd.DataFrame]:
    generator = np.random.default_rng(sites)
    tables = {}
    for number in range(1, rounds + 1):
        values = generator.dirichlet(np.ones(sites), size=sites)
        tables[number] = pd.DataFrame(values, index=SITES[:sites], columns=SITES[:sites])
    return tables


def example_of(classes: int = 1, height: int = 40, width: int = 30, label: str = "best") -> OverlayExample:
    generator = np.random.default_rng(classes)
    grey = generator.integers(0, 256, size=(1, height, width), dtype=np.uint8).repeat(3, axis=0)
    truth = np.zeros((classes, height, width), dtype=bool)
    for number in range(classes):
        truth[number, 8 * number : 8 * number + 6, :10] = True
    return OverlayExample(label, f"scan_{label}", 0.5, grey, truth, np.roll(truth, 3, axis=2))


def table_of(dice: dict[str, float]) -> pd.DataFrame:
    scores = [{"class": 1, "dice": d, "iou": d, "hd95": 0.0, "asd": 0.0, "empty": ""} for d in dice.values()]
    return image_table("a", list(dice), scores, "chosen")


def contours(axes) -> list:
    return [artist for artist in axes.collections if type(artist).__name__ == "QuadContourSet"]


def test_learning_curves_have_three_lines_a_site_and_one_mean() -> None:
    figure = learning_curves(history_of(4))

    assert len(figure.data) == 3 * 4 + 1
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["mean over sites", *"abcd"]
    assert figure.layout.xaxis.title.text == "round (0 = foundation)"
    assert figure.layout.yaxis.title.text == "Dice (0 to 1)"
    assert figure.layout.yaxis2.title.text == "loss"


@pytest.mark.parametrize("sites", [2, 6, 10])
def test_every_site_has_its_own_look_and_keeps_it_in_both_panels(sites: int) -> None:
    figure = learning_curves(history_of(sites))

    looks = {}
    for trace in figure.data[1:]:
        looks.setdefault(trace.name, set()).add((trace.line.color, trace.marker.symbol))
    assert all(len(look) == 1 for look in looks.values())
    assert len({look for looks_of_site in looks.values() for look in looks_of_site}) == sites


def test_the_loss_starts_at_round_one_and_the_dice_at_the_foundation() -> None:
    figure = learning_curves(history_of(1))

    dice, loss, _ = figure.data
    assert tuple(dice.x) == (0, 1, 2, 3)
    assert tuple(loss.x) == (1, 2, 3)
    assert loss.xaxis == "x2"


def test_dice_after_local_training_is_hidden_until_the_button_shows_it() -> None:
    figure = learning_curves(history_of(2))

    hidden = [trace.meta == "dice_local" for trace in figure.data]
    off, on = figure.layout.updatemenus[0].buttons
    assert [trace.visible is False for trace in figure.data] == hidden
    assert off.args[0]["visible"] == [not flag for flag in hidden]
    assert all(on.args[0]["visible"])


def test_without_dice_after_local_training_there_is_no_button() -> None:
    figure = learning_curves(history_of(2).drop(columns="dice_local"))

    assert len(figure.data) == 5
    assert not figure.layout.updatemenus


def test_the_mean_leaves_out_rounds_in_which_a_site_is_missing() -> None:
    history = history_of(3)
    absent = (history["site"] == "b") & (history["round"] == 2)

    figure = learning_curves(history[~absent])

    assert tuple(figure.data[0].x) == (0, 1, 3)


@pytest.mark.parametrize("column", ["loss", "dice_local", "dice_validation"])
def test_a_value_missing_everywhere_draws_an_empty_line(column: str) -> None:
    figure = learning_curves(history_of(1).assign(**{column: None}))

    assert [len(trace.x) for trace in figure.data].count(0) == 1


def test_an_empty_history_gives_empty_panels() -> None:
    assert len(learning_curves(history_of(2).iloc[:0]).data) == 0


def test_learning_curves_save_as_html_and_strict_json(tmp_path) -> None:
    figure = learning_curves(history_of(2))

    figure.write_html(tmp_path / "curves.html", include_plotlyjs=False)

    assert "mean over sites" in (tmp_path / "curves.html").read_text()
    json.loads(figure.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("sites", [2, 10])
def test_the_heat_map_has_a_frame_and_a_slider_step_per_round_and_starts_at_the_last(sites: int) -> None:
    weights = weights_of(sites, rounds=4)

    figure = weight_heatmap(weights)

    (slider,) = figure.layout.sliders
    assert [frame.name for frame in figure.frames] == ["1", "2", "3", "4"]
    assert [tuple(step.args[0]) for step in slider.steps] == [("1",), ("2",), ("3",), ("4",)]
    assert slider.active == 3
    assert figure.layout.title.text == "Aggregation weights · round 4"
    np.testing.assert_array_equal(figure.data[0].z, weights[4].to_numpy())


def test_every_frame_keeps_the_scale_from_zero_to_one_and_prints_its_values() -> None:
    figure = weight_heatmap(weights_of(3))

    assert {(frame.data[0].zmin, frame.data[0].zmax) for frame in figure.frames} == {(0, 1)}
    assert all(f"{z:.2f}" == t for z, t in zip(figure.data[0].z.flat, np.ravel(figure.data[0].text), strict=True))


def test_the_axes_say_who_receives_and_from_whom() -> None:
    figure = weight_heatmap(weights_of(2))

    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("from", "receives")
    assert figure.layout.yaxis.autorange == "reversed"


def test_rounds_are_ordered_by_number_and_absent_sites_stay_blank() -> None:
    weights = weights_of(3, rounds=10)
    weights[10] = weights[10].drop(index="b", columns="b")

    figure = weight_heatmap(dict(reversed(weights.items())))

    assert [frame.name for frame in figure.frames] == [str(number) for number in range(1, 11)]
    assert tuple(figure.data[0].x) == ("a", "b", "c")
    assert np.isnan(figure.data[0].z[1]).all()
    assert set(figure.data[0].text[1]) == {""}
    json.loads(figure.to_json(), parse_constant=pytest.fail)


def many(sites: int, rounds: int) -> dict[int, pd.DataFrame]:
    """Sites of two kinds in turns; those of one kind share with one another."""
    kind = np.arange(sites) % 2
    names = [f"hospital_{number:04}" for number in range(sites)]
    table = pd.DataFrame((kind[:, None] == kind) * (1.5 / sites) + 0.25 / sites, index=names, columns=names)
    return dict.fromkeys(range(1, rounds + 1), table)


def test_the_heat_map_of_very_many_sites_and_rounds_stays_small() -> None:
    figure = weight_heatmap(many(256, 100))

    assert len(figure.to_json()) < 2e6
    assert [frame.name for frame in figure.frames][-1] == figure.layout.sliders[0].steps[-1].label == "100"
    assert len(weight_heatmap(many(1000, 3)).frames) == 1
    assert len(weight_heatmap(many(2, 1000)).frames) == 100


def test_many_sites_have_neighbours_of_their_kind_in_whole_percentages_and_no_labels() -> None:
    weights = many(30, 2)
    weights[2] = weights[2].drop(index="hospital_0003", columns="hospital_0003")

    figure = weight_heatmap(weights)
    still = weight_heatmap_image(weights)

    kinds = [int(name[-1]) % 2 for name in figure.data[0].x if name != "hospital_0003"]
    assert sum(one != other for one, other in itertools.pairwise(kinds)) == 1
    assert {value for row in figure.data[0].z for value in row} == {None, 1, 6}
    assert figure.data[0].text is None
    assert not figure.layout.xaxis.showticklabels
    assert len(still.axes[0].texts) == len(still.axes[0].get_xticks()) == 0
    json.loads(figure.to_json(), parse_constant=pytest.fail)


def test_without_weights_the_figures_say_so() -> None:
    assert "No aggregation weights" in weight_heatmap({}).layout.title.text
    assert "No aggregation weights" in weight_heatmap_image({}).texts[0].get_text()


@pytest.mark.parametrize(("rounds", "panels"), [(1, 1), (4, 4), (9, 9), (50, 9)])
def test_the_printed_heat_map_shows_the_last_round_and_a_strip_with_first_and_last(rounds: int, panels: int) -> None:
    figure = weight_heatmap_image(weights_of(3, rounds))

    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == f"round {rounds}"
    assert len(titles) == 1 + panels
    assert (titles[1], titles[-1]) == ("round 1", f"round {rounds}")


def test_the_printed_heat_map_annotates_every_cell_and_labels_the_axes(tmp_path) -> None:
    weights = weights_of(10)
    weights[3] = weights[3].drop(index="j", columns="j")

    figure = weight_heatmap_image(weights)
    figure.savefig(tmp_path / "weights.png")

    large = figure.axes[0]
    assert (large.get_xlabel(), large.get_ylabel()) == ("from", "receives")
    assert sum(text.get_text() != "" for text in large.texts) == 81
    assert {image.get_clim() for axes in figure.axes for image in axes.get_images()} == {(0, 1)}
    assert Image.open(tmp_path / "weights.png").width > 500


def test_overlays_have_a_row_of_three_panels_per_example_with_dice_and_name(tmp_path) -> None:
    figure = overlays([example_of(label=label) for label in ("best", "median", "worst")])

    figure.savefig(tmp_path / "overlays.png")

    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "prediction"] * 3
    titles = [row.get_suptitle() for row in figure.subfigs]
    assert titles == [f"{label} · Dice 0.500 · scan_{label}" for label in ("best", "median", "worst")]
    assert Image.open(tmp_path / "overlays.png").height > 500


def test_overlays_outline_every_class_that_is_there_in_its_own_colour() -> None:
    figure = overlays([example_of(classes=3)])

    image, truth, prediction = figure.axes
    colours = [tuple(contour.get_edgecolor()[0]) for contour in contours(truth)]
    assert len(contours(image)) == 0
    assert len(set(colours)) == 3
    assert [tuple(contour.get_edgecolor()[0]) for contour in contours(prediction)] == colours
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["class 1", "class 2", "class 3", "missed", "extra"]


def test_an_object_at_the_image_border_has_a_closed_outline() -> None:
    figure = overlays([example_of()])

    (outline,) = contours(figure.axes[1])
    (path,) = outline.get_paths()
    np.testing.assert_array_equal(path.vertices[0], path.vertices[-1])


def test_missed_and_extra_pixels_are_tinted_and_right_ones_are_not() -> None:
    example = example_of()

    figure = overlays([example])

    tint = figure.axes[2].get_images()[1].get_array()
    right = example.truth[0] == example.prediction[0]
    missed, extra = (tint[mask] for mask in (example.truth[0] & ~right, example.prediction[0] & ~right))
    assert not tint[right].any()
    assert len(np.unique(missed, axis=0)) == len(np.unique(extra, axis=0)) == 1
    assert not np.array_equal(missed[0], extra[0])


def test_empty_masks_are_drawn_without_an_outline_or_a_warning(tmp_path) -> None:
    example = example_of()
    empty = np.zeros_like(example.truth)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = overlays([OverlayExample("worst", "x", 1.0, example.image, empty, empty)])
        figure.savefig(tmp_path / "empty.png")

    assert contours(figure.axes[1]) == []


def test_the_unpadded_image_is_shown_whole_whatever_its_shape() -> None:
    figure = overlays([example_of(height=20, width=60), example_of(height=60, width=20)])

    assert [(axes.get_xlim(), axes.get_ylim()) for axes in (figure.axes[2], figure.axes[5])] == [
        ((-0.5, 59.5), (19.5, -0.5)),
        ((-0.5, 19.5), (59.5, -0.5)),
    ]


def test_without_examples_the_overlay_says_so() -> None:
    assert overlays([]).texts[0].get_text() == "No test image"


def test_long_names_are_shortened_in_the_middle() -> None:
    example = example_of()
    name = "start_" + "x" * 200 + "_end"

    title = overlays([OverlayExample("best", name, 0.5, example.image, example.truth, example.truth)]).subfigs[0]

    assert title.get_suptitle().startswith("best · Dice 0.500 · start_")
    assert title.get_suptitle().endswith("_end")
    assert len(title.get_suptitle()) < 90


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ({}, {}),
        ({"x": 0.5}, {"only": "x"}),
        ({"x": 0.5, "y": 0.7}, {"best": "y", "worst": "x"}),
        ({"x": 0.5, "y": 0.7, "z": 0.6}, {"best": "y", "median": "z", "worst": "x"}),
        ({"x": 0.1, "y": 0.2, "z": 0.3, "w": 0.4}, {"best": "w", "median": "z", "worst": "x"}),
        ({"z": 1.0, "y": 1.0, "x": 1.0}, {"best": "x", "median": "y", "worst": "z"}),
    ],
)
def test_examples_are_best_median_and_worst_with_ties_by_name(dice, expected) -> None:
    assert choose_examples(table_of(dice)) == expected


def test_examples_are_ranked_by_the_mean_over_classes() -> None:
    scores = [
        {"class": label, "dice": dice, "iou": dice, "hd95": 0.0, "asd": 0.0, "empty": ""}
        for pair in ((1.0, 0.0), (0.6, 0.6))
        for label, dice in enumerate(pair, start=1)
    ]

    assert choose_examples(image_table("a", ["x", "y"], scores, "chosen")) == {"best": "y", "worst": "x"}


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text("abcd", min_size=1), st.sampled_from([0.0, 0.5, 1.0]), min_size=3), st.randoms())
def test_examples_differ_and_do_not_depend_on_the_order_of_rows(dice, random) -> None:
    table = table_of(dice)
    order = list(range(len(table)))
    random.shuffle(order)

    chosen = choose_examples(table)

    assert len(set(chosen.values())) == 3
    assert choose_examples(table.iloc[order]) == chosen
    assert dice[chosen["best"]] >= dice[chosen["median"]] >= dice[chosen["worst"]]


def test_examples_of_several_models_at_once_are_refused() -> None:
    table = table_of({"x": 0.5})

    with pytest.raises(ValueError, match="one site and one model"):
        choose_examples(pd.concat([table, table.assign(model="before")]))
