from __future__ import annotations

import warnings
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from fedsca_pipeline.comparison.figures import (
    critical_difference,
    dice_against_bytes,
    learning_curves,
    similarity_matrix,
    site_boxes,
)
from fedsca_pipeline.comparison.statistics import SCORE_COLUMNS
from fedsca_pipeline.evaluation.figures import ABSENT, COLOURS


def scores_of(methods: int, sites: int = 2, images: int = 6, seeds: int = 2) -> pd.DataFrame:
    """Scores in which m0 is best and m1 second best on every image."""
    generator = np.random.default_rng(0)
    base = generator.uniform(0.6, 0.9, size=(sites, images))
    rows = [
        (f"m{method}", seed, f"s{site}", f"i{image}", base[site, image] - 0.02 * method + 0.001 * seed, 1.0)
        for method in range(methods)
        for seed in range(seeds)
        for site in range(sites)
        for image in range(images)
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def table_of(sent: list[float], dice: list[float]) -> pd.DataFrame:
    dices = np.array(dice)
    labels = [f"method {number}" for number in range(len(sent))]
    return pd.DataFrame(
        {"label": labels, "bytes": sent, "dice": dices, "dice_low": dices - 0.02, "dice_high": dices + 0.02}
    )


def curves_of(methods: int, seeds: int = 2, rounds: int = 4) -> pd.DataFrame:
    rows = [
        (f"m{method}", seed, number, 0.5 + 0.05 * number - 0.01 * method + 0.02 * seed, 1e3 * number)
        for method in range(methods)
        for seed in range(seeds)
        for number in range(rounds + 1)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "round", "dice_validation", "bytes"])


def rendered(figure: Figure, tmp_path) -> Figure:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 300
    return figure


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts} - {""}


def boxes_of(figure: Figure) -> list:
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]


def note_of(figure: Figure) -> str:
    assert figure.axes == []
    (text,) = figure.texts
    return text.get_text()


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (lambda: dice_against_bytes(table_of([], [])), "No method"),
        (lambda: dice_against_bytes(table_of([np.nan], [0.5])), "No method"),
        (lambda: site_boxes(scores_of(0)), "No score"),
        (lambda: learning_curves(curves_of(0)), "No validation Dice"),
        (lambda: learning_curves(curves_of(1).assign(dice_validation=np.nan)), "No validation Dice"),
        (lambda: critical_difference(scores_of(0)), "No score"),
        (lambda: critical_difference(scores_of(2)), "there are 2 and 12"),
        (lambda: critical_difference(scores_of(3, sites=1, images=2)), "there are 3 and 2"),
        (lambda: similarity_matrix(pd.DataFrame()), "No similarity"),
    ],
)
def test_a_figure_without_data_says_so(figure, said: str, tmp_path) -> None:
    assert said in note_of(rendered(figure(), tmp_path))


def test_the_pareto_front_is_drawn_in_steps_from_the_fewest_bytes_to_the_right_edge(tmp_path) -> None:
    table = table_of([1e5, 1e6, 1e6, 1e7], [0.6, 0.8, 0.7, 0.75])

    figure = rendered(dice_against_bytes(table), tmp_path)

    (axes,) = figure.axes
    (line,) = [line for line in axes.lines if len(line.get_xdata()) > 2]
    edge = axes.get_xlim()[1]
    assert list(zip(*line.get_data(), strict=True)) == [(1e5, 0.6), (1e6, 0.6), (1e6, 0.8), (edge, 0.8)]
    colours = [to_hex(colour).upper() for colour in axes.collections[-1].get_facecolors()]
    assert [colour == COLOURS[0] for colour in colours] == [True, False, False, True]
    assert axes.get_xscale() == "log"
    assert texts(figure) == set(table["label"])


def test_methods_that_send_nothing_are_in_a_band_left_of_all_others(tmp_path) -> None:
    figure = rendered(dice_against_bytes(table_of([0, 0, 1e5, 1e6], [0.5, 0.6, 0.7, 0.8])), tmp_path)

    (axes,) = figure.axes
    (band,) = [patch for patch in axes.patches if to_hex(patch.get_facecolor()).upper() == ABSENT]
    edge = band.get_x() + band.get_width()
    x = sorted(axes.collections[-1].get_offsets()[:, 0])
    assert x[0] == x[1] < edge < x[2] == 1e5
    assert band.get_x() == axes.get_xlim()[0]
    assert min(axes.get_xticks()) > edge
    assert "sends nothing" in texts(figure)


def test_methods_that_all_send_nothing_are_drawn_without_a_warning(tmp_path) -> None:
    figure = rendered(dice_against_bytes(table_of([0, 0], [0.5, 0.6])), tmp_path)

    assert {"method 0", "method 1", "sends nothing"} == texts(figure)


def test_an_interval_that_does_not_contain_its_value_is_drawn(tmp_path) -> None:
    rendered(dice_against_bytes(table_of([1e5], [0.5]).assign(dice_low=0.6, dice_high=0.7)), tmp_path)


@pytest.mark.parametrize("close", [0.02, 0.002])
def test_twenty_names_overlap_neither_each_other_nor_the_edge(close: float) -> None:
    generator = np.random.default_rng(1)
    sent = [0.0, 0.0, *([4e5] * 9), *([8e6] * 7), 1.6e7, 1.6e7]

    figure = dice_against_bytes(table_of(sent, list(0.75 + generator.normal(0, close, size=20))))

    boxes = boxes_of(figure)
    frame = figure.axes[0].get_window_extent()
    assert len(boxes) == 21
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.parametrize(("sites", "panels"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (9, (3, 3))])
def test_every_site_has_a_panel_with_the_methods_in_the_same_order(sites: int, panels, tmp_path) -> None:
    figure = rendered(site_boxes(scores_of(3, sites), labels={"m0": "best"}), tmp_path)

    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == [f"s{site} · 6 images" for site in range(sites)]
    assert figure.axes[0].get_gridspec().get_geometry() == panels
    # Drawn from below: the last is on top.
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["m2", "m1", "best"]
    assert all(len(axes.patches) == 3 for axes in shown)


def test_boxes_show_the_images_averaged_over_seeds(tmp_path) -> None:
    scores = scores_of(1, sites=1, images=5, seeds=3)

    figure = rendered(site_boxes(scores), tmp_path)

    images = scores.groupby("image")["dice"].mean()
    (box,) = [patch.get_path().vertices[:, 0] for patch in figure.axes[0].patches]
    assert (box.min(), box.max()) == pytest.approx(np.percentile(images, [25, 75]))


def test_a_method_without_images_at_a_site_has_an_empty_row_there(tmp_path) -> None:
    scores = scores_of(3)

    figure = rendered(site_boxes(scores[(scores["method"] != "m1") | (scores["site"] != "s0")]), tmp_path)

    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(names) == ["m0", "m1", "m2"]
    for axes, empty in zip(figure.axes, (["m1"], []), strict=True):
        boxes = [box.get_path().vertices for box in axes.patches]
        assert [name for name, box in zip(names, boxes, strict=True) if np.isnan(box[:, 0]).any()] == empty


def test_learning_curves_leave_the_step_from_the_foundation_out_of_the_axis(tmp_path) -> None:
    curves = curves_of(2)
    curves.loc[curves["round"] == 0, "dice_validation"] = 0.01

    (axes,) = rendered(learning_curves(curves), tmp_path).axes

    trained = curves[curves["round"] > 0]["dice_validation"]
    lowest, highest = axes.get_ylim()
    assert 0.01 < lowest < trained.min()
    assert trained.max() < highest


def test_curves_show_the_mean_and_the_range_of_the_seeds(tmp_path) -> None:
    figure = rendered(learning_curves(curves_of(2), labels={"m0": "best"}), tmp_path)

    (axes,) = figure.axes
    x, y = axes.lines[0].get_data()
    assert list(x) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(y, 0.51 + 0.05 * np.arange(5))
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.5, 0.72))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["best", "m1"]


def test_rounds_that_some_seed_lacks_are_not_drawn() -> None:
    curves = curves_of(1)

    figure = learning_curves(curves[(curves["seed"] == 0) | (curves["round"] < 3)])

    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 1, 2]


def test_seeds_without_a_common_round_have_an_empty_line(tmp_path) -> None:
    curves = curves_of(2)
    apart = (curves["method"] == "m0") & ((curves["seed"] == 0) == (curves["round"] < 3))

    figure = rendered(learning_curves(curves[~apart]), tmp_path)

    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [5, 0]


def test_highlighted_methods_are_in_colour_and_the_others_grey(tmp_path) -> None:
    figure = rendered(learning_curves(curves_of(20), highlight=["m3", "m7", "not there"]), tmp_path)

    (axes,) = figure.axes
    assert len(axes.lines) == 20
    assert len(axes.collections) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["m3", "m7", "other methods (18)"]
    assert [line.get_color() in COLOURS for line in axes.lines] == [False] * 18 + [True] * 2


def test_twenty_methods_in_colour_all_look_different(tmp_path) -> None:
    figure = rendered(learning_curves(curves_of(20)), tmp_path)

    (axes,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 20
    assert len(axes.collections) == 0


def test_methods_in_the_same_order_on_every_image_have_whole_ranks(tmp_path) -> None:
    figure = rendered(critical_difference(scores_of(4), labels={"m0": "best"}), tmp_path)

    shown = {text.strip() for text in texts(figure)}
    assert shown == {"best  1.00", "m1  2.00", "3.00  m2", "4.00  m3"}
    title = figure.get_suptitle()
    assert "over 12 images" in title
    assert "finds a difference (p < 0.001)" in title
    # q of four methods at 0.05 is 2.569 (Demšar 2006, table 5); sqrt(4 * 5 / (6 * 12)) = 0.527.
    assert "critical difference 1.35" in title


def test_bars_join_exactly_the_methods_closer_than_the_critical_difference() -> None:
    figure = critical_difference(scores_of(4))

    bars = [line.get_xdata() for line in figure.axes[0].lines if line.get_color() == COLOURS[0]]
    assert sorted((min(bar), max(bar)) for bar in bars) == [(1, 2), (2, 3), (3, 4)]


def test_identical_methods_have_one_rank_and_no_difference(tmp_path) -> None:
    one = scores_of(1)
    scores = pd.concat([one.assign(method=name) for name in "abc"])

    figure = rendered(critical_difference(scores), tmp_path)

    assert {text.strip() for text in texts(figure)} == {"a  2.00", "b  2.00", "2.00  c"}
    assert "finds no difference (p = 1.000)" in figure.get_suptitle()


def test_only_images_that_all_methods_have_are_ranked() -> None:
    scores = scores_of(3)

    figure = critical_difference(scores[(scores["method"] != "m2") | (scores["image"] != "i0")])

    assert "over 10 images" in figure.get_suptitle()


def test_the_similarity_matrix_is_annotated_and_has_a_fixed_scale(tmp_path) -> None:
    table = pd.DataFrame([[1, -0.25], [np.nan, 1]], index=["a", "b"], columns=["a", "b"])

    figure = rendered(similarity_matrix(table), tmp_path)

    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "-0.25", "1.00"]
    assert axes.get_images()[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


@pytest.mark.parametrize("name", ["$a$", "{rank}", "a_b^c", "100 % $\\bad$"])
def test_names_are_not_read_as_formulas(name: str, tmp_path) -> None:
    scores, labels = scores_of(3).replace({"site": {"s0": name}}), {"m0": name}

    rendered(site_boxes(scores, labels), tmp_path)
    rendered(critical_difference(scores, labels), tmp_path)
    rendered(learning_curves(curves_of(2), labels=labels), tmp_path)
    rendered(dice_against_bytes(table_of([1e5], [0.5]).assign(label=name)), tmp_path)
    rendered(similarity_matrix(pd.DataFrame([[1.0]], index=[name], columns=[name]), title=name), tmp_path)


def test_two_methods_with_the_same_label_are_refused() -> None:
    with pytest.raises(ValueError, match="two methods have the same label"):
        site_boxes(scores_of(2), labels={"m0": "same", "m1": "same"})


def test_pyplot_holds_no_figure() -> None:
    dice_against_bytes(table_of([1e5, 0], [0.5, 0.4]))
    critical_difference(scores_of(3))

    assert matplotlib.pyplot.get_fignums() == []
