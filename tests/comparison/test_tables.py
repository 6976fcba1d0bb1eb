from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsca_pipeline.comparison.statistics import SCORE_COLUMNS, STATISTICS
from fedsca_pipeline.comparison.tables import COSTS, NOTHING, TABLE_COLUMNS, method_table, render_html, render_markdown

DRAWS = 100
COST_COLUMNS = ("method", "seed", "bytes_up", "bytes_down", "bytes_to_95", "seconds", "peak_memory")
EMPTY_TAGS = {"meta"}


class Page(HTMLParser):
    """Text by tag, attributes, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def scores_of(dice: dict[str, list[float]], seeds: int = 1) -> pd.DataFrame:
    """Two sites with the given Dice of their images, halved at the second; HD95 20 everywhere."""
    rows = [
        (method, seed, site, f"i{number}", value * factor, 20.0)
        for method, values in dice.items()
        for seed in range(seeds)
        for site, factor in (("x", 1.0), ("y", 0.5))
        for number, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def costs_of(*rows: tuple[object, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


COSTS_OF_TWO = costs_of(
    ("a", 0, 100e3, 284e3, 12.5e6, 90.0, 1.5 * 2**30),
    ("a", 1, 100e3, 286e3, 13.5e6, 110.0, 1.5 * 2**30),
    ("b", 0, 0.0, 0.0, np.nan, 50.0, np.nan),
    ("b", 1, 0.0, 0.0, np.nan, 50.0, np.nan),
)


def two_methods() -> pd.DataFrame:
    scores = scores_of({"b": [0.4, 0.8], "a": [0.6, 0.9]}, seeds=2)
    return method_table(scores, COSTS_OF_TWO, {"a": "Method A"}, draws=DRAWS)


def cells_of(markdown: str, row: int) -> list[str]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [cell.strip() for cell in lines[row + 2].strip("|").split(" | ")]


def test_the_best_method_is_first_with_its_scores_and_costs() -> None:
    table = two_methods()

    assert table.columns.tolist() == list(TABLE_COLUMNS)
    assert table["label"].tolist() == ["Method A", "b"]
    first = table.iloc[0]
    assert first["dice"] == pytest.approx(0.75 * 0.75)
    assert first["worst_dice"] == pytest.approx(0.375)
    assert first["dice_sd"] == pytest.approx(0.1875)
    assert first["hd95"] == 20
    assert (first["bytes"], first["bytes_low"], first["bytes_high"]) == (385e3, 384e3, 386e3)
    assert (first["seconds"], first["seconds_low"], first["seconds_high"]) == (100, 90, 110)
    assert first[["sites", "images", "seeds"]].tolist() == [2, 4, 2]


def test_unknown_costs_stay_unknown_and_methods_without_scores_are_left_out() -> None:
    costs = pd.concat([COSTS_OF_TWO, costs_of(("other", 0, 1.0, 1.0, 1.0, 1.0, 1.0))])
    table = method_table(scores_of({"b": [0.5], "c": [0.4]}), costs, {}, draws=DRAWS).set_index("method")

    assert table.index.tolist() == ["b", "c"]
    assert table.loc["b", ["bytes", "bytes_low", "bytes_high"]].tolist() == [0, 0, 0]
    assert table.loc["b", ["bytes_to_95", "bytes_to_95_low", "peak_memory", "peak_memory_high"]].isna().all()
    assert table.loc["c", [f"{name}{end}" for name in COSTS for end in ("", "_low", "_high")]].isna().all()


def test_if_one_seed_misses_the_goal_there_is_no_mean() -> None:
    costs = costs_of(("a", 0, 1.0, 1.0, 10.0, 1.0, 1.0), ("a", 1, 1.0, 1.0, np.nan, 1.0, 1.0))

    table = method_table(scores_of({"a": [0.5]}, seeds=2), costs, {}, draws=DRAWS)

    assert table["bytes_to_95"].isna().all()
    assert table["bytes"].item() == 2


@settings(deadline=None, max_examples=15)
@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 100))
def test_the_order_of_rows_does_not_matter_and_ties_are_sorted_by_name(order: list[str], seed: int) -> None:
    dice = {"a": [0.5, 0.7], "b": [0.5, 0.7], "c": [0.9, 0.8], "d": [0.1, 0.2]}
    scores = scores_of({method: dice[method] for method in order}).sample(frac=1, random_state=seed)

    table = method_table(scores, COSTS_OF_TWO.sample(frac=1, random_state=seed), {}, draws=20)

    assert table["method"].tolist() == ["c", "a", "b", "d"]
    pd.testing.assert_frame_equal(table, method_table(scores_of(dice), COSTS_OF_TWO, {}, draws=20))


def test_markdown_shows_values_intervals_and_units() -> None:
    table = two_methods()
    known = {"dice": 0.5, "dice_low": 0.41, "dice_high": 0.6127}
    text = render_markdown(table.assign(**{name: [value, 0.4] for name, value in known.items()}))

    first, second = cells_of(text, 0), cells_of(text, 1)
    assert first[0] == "Method A"
    assert first[1] == "**0.500** [0.410, 0.613]"
    assert first[4] == "**20.0**"
    assert first[5] == "385 [384, 386] kB"
    assert first[6] == "**13.0** [12.5, 13.5] MB"
    assert first[7] == "100 [90, 110] s"
    assert first[8] == "**1.50** GiB"
    assert first[9] == "2 sites, 4 images, 2 seeds"
    assert second[1] == "0.400"
    assert second[5:9] == ["**0** B", "–", "**50.0** s", "–"]
    assert text.endswith("significance.\n")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (12_345, "12.3 kB"), (7.96e6, "7.96 MB"), (1.6e9, "1.60 GB")],
)
def test_bytes_have_a_suitable_unit(value: float, shown: str) -> None:
    table = two_methods().assign(bytes=value, bytes_low=value, bytes_high=value)

    assert cells_of(render_markdown(table), 0)[5].replace("*", "") == shown


def test_all_values_that_print_like_the_best_are_bold() -> None:
    table = two_methods().assign(dice=[0.81234, 0.81228], hd95=[3.0, 2.0])

    text = render_markdown(table)

    assert [cells_of(text, row)[1].startswith("**0.812**") for row in (0, 1)] == [True, True]
    assert [cells_of(text, row)[4].startswith("**") for row in (0, 1)] == [False, True]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_every_column_with_a_value_has_a_bold_one(values: list[float]) -> None:
    ends = {f"{name}{end}": 1.0 for name in (*STATISTICS, *COSTS) for end in ("", "_low", "_high")}
    table = pd.DataFrame({"label": "m", **ends, "dice": values, "sites": 1, "images": 1, "seeds": 1})

    text = render_markdown(table)

    best = [cells_of(text, row)[1].split(" ")[0] for row in range(len(values))]
    assert {cell.strip("*") for cell in best if "*" in cell} == {f"{max(values):.3f}"}
    assert "1 site, 1 image, 1 seed" in text


def test_a_label_that_a_spreadsheet_would_run_is_neutralised_in_markdown() -> None:
    text = render_markdown(two_methods().assign(label=["=1+1", "@SUM(A1)"]))

    assert {cells_of(text, row)[0] for row in (0, 1)} == {"'=1+1", "'@SUM(A1)"}


def test_labels_are_escaped_in_markdown_and_in_the_page() -> None:
    table = two_methods().assign(label=["a|b_c *d*\n<i>", "<script>alert(1)</script>"])

    markdown, page = render_markdown(table), render_html({"<i>8 images": table}, title="A & <b>", note="<u>")

    assert cells_of(markdown, 0)[0] == r"a\|b\_c \*d\* \<i\>"
    parsed = Page(page)
    assert parsed.texts["title"] == parsed.texts["h1"] == ["A & <b>"]
    assert "<script>alert(1)</script>" in parsed.texts["th"]
    assert parsed.texts["h2"] == ["<i>8 images"]
    assert parsed.texts["p"][-1] == "<u>"
    assert not {"script", "i", "u"} & parsed.texts.keys()
    assert "<script" not in page


def test_the_page_is_self_contained_and_supports_dark_screens() -> None:
    page = render_html({"All": two_methods()})
    parsed = Page(page)

    assert not {name for name, _ in parsed.attributes} & {"src", "href", "onclick"}
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert ("lang", "en") in parsed.attributes


def test_the_page_shows_the_same_values_as_the_markdown() -> None:
    table = two_methods()

    markdown, page = render_markdown(table), Page(render_html({"All": table}))

    bold = [cell for row in (0, 1) for cell in cells_of(markdown, row) if cell.startswith("**")]
    assert page.texts["h2"] == ["All"]
    assert page.texts["strong"] == [cell.split("**")[1] for cell in bold]
    assert page.texts["th"][10:] == ["Method A", "b"]
    assert "[384, 386] kB" in page.texts["small"]


def test_without_scores_markdown_and_page_say_so() -> None:
    table = method_table(scores_of({}), COSTS_OF_TWO, {}, draws=DRAWS)

    assert table.columns.tolist() == list(TABLE_COLUMNS)
    assert table.empty
    assert render_markdown(table) == f"{NOTHING}\n"
    assert Page(render_html({"All": table})).texts["p"] == [NOTHING]
