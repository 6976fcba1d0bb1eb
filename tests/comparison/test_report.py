"""From finished cells to tables and the page; the page's words follow from the numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest

from fedsca_pipeline.comparison.plan import Cell, resolve_methods
from fedsca_pipeline.comparison.report import Comparison, Report, build_report

ABLATION: Mapping[str, Any] = {"strategy": "fedsca", "set": {"adapters.width": 8}, "ablation": "adapter"}
FIGURES = ("dice_against_bytes", "site_boxes", "learning_curves", "critical_difference", "similarity")


@pytest.fixture
def compare(make_setting, grid, result_of) -> Callable[..., Comparison]:
    """Make a comparison with a result for each cell that ``dice`` maps to a number; keywords are ``make_setting``'s."""

    def make(
        methods: Mapping[str, Any],
        dice: Callable[[Cell], float | None],
        *,
        rates: Mapping[str, float] | None = None,
        code: Callable[[Cell], str] = lambda cell: "now",
        **setting: Any,
    ) -> Comparison:
        found = make_setting(methods, **setting)
        resolved = resolve_methods(found)
        results = {
            cell.fingerprint: result_of(cell, value, code=code(cell))
            for cell in grid(found)
            if (value := dice(cell)) is not None
        }
        rates = {name: method.rates[0] for name, method in resolved.items()} if rates is None else rates
        return Comparison(found, resolved, results, rates, "now")

    return make


def by_method(**dice: float) -> Callable[[Cell], float | None]:
    return lambda cell: dice.get(cell.method)


def read_again(table: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


def built(comparison: Comparison) -> Report:
    report = build_report(comparison)
    assert "nan" not in report.page
    return report


METHODS = {"fedsca": {}, "local": {}, "fedavg": {}}


def test_there_is_one_row_per_method_with_the_best_first_and_five_figures(compare) -> None:
    report = built(compare(METHODS, by_method(fedsca=0.6, local=0.5, fedavg=0.7)))

    assert list(report.table["method"]) == ["fedavg", "fedsca", "local"]
    assert report.table["dice"].tolist() == pytest.approx([0.71, 0.61, 0.51])
    assert sorted(report.figures) == sorted(f"all_images/{name}" for name in FIGURES)
    assert all(f"results_figures/all_images/{name}.png" in report.page for name in FIGURES)
    assert "## All training images" in report.page
    assert "<h2>All training images</h2>" in report.html
    assert "fedavg" in report.html
    assert "Code version now." in report.html
    assert "## Missing" not in report.page
    assert "Code version now." in report.page


def test_each_number_of_images_has_a_section_also_if_only_one_method_uses_it(compare) -> None:
    report = built(
        compare(
            {"fedsca": {}, "local": {"train_images": [2, 3]}}, by_method(fedsca=0.6, local=0.5), train_images=[2, 4]
        )
    )

    headings = [line for line in report.page.splitlines() if line.startswith("## ")]
    assert headings == [f"## {count} training images a site" for count in (2, 4, 3)]
    assert dict(report.table.groupby("train_images")["method"].agg(list)) == {
        2: ["fedsca", "local"],
        3: ["local"],
        4: ["fedsca"],
    }
    assert "**fedsca** has no result here." in report.page


class TestVerdict:
    def test_the_verdict_says_when_the_reference_wins(self, compare) -> None:
        page = built(compare(METHODS, by_method(fedsca=0.7, local=0.5, fedavg=0.6))).page

        assert "By mean Dice **fedsca** is first of 2 federated methods (0.710)." in page
        assert "By Dice of the worst site **fedsca** is first of 2 federated methods (0.710)." in page
        assert "Against training alone: +0.200 (image by image +0.200, Holm's p" in page

    def test_the_verdict_says_when_the_reference_loses(self, compare) -> None:
        page = built(compare(METHODS, by_method(fedsca=0.4, local=0.5, fedavg=0.6))).page

        assert "By mean Dice **fedsca** is second of 2 federated methods (0.410; fedavg has 0.610)." in page
        assert "Against training alone: -0.100 (image by image -0.100, Holm's p" in page
        assert page.index("| fedavg | +0.2000 |") < page.index("| local | +0.1000 |")
        assert "Ahead of it: fedavg (+0.200, 1.00 times its bytes)." in page

    def test_unknown_bytes_are_not_compared(self, compare) -> None:
        comparison = compare(METHODS, by_method(fedsca=0.4, local=0.5, fedavg=0.6))
        for result in comparison.results.values():
            if result["method"] == "fedsca":
                result["traffic"] = {"bytes_up": None, "bytes_down": None, "bytes_to_95": None}

        assert "Ahead of it: fedavg (+0.200)." in built(comparison).page

    def test_local_and_pooled_training_are_no_rivals_under_any_name(self, compare) -> None:
        page = built(
            compare(
                {
                    "fedsca": {},
                    "fedavg": {},
                    "pooled": {"strategy": "centralised"},
                    "alone": {"strategy": "local"},
                },
                by_method(fedsca=0.4, fedavg=0.3, pooled=0.9, alone=0.8),
                strategies={"centralised": {"allow_pooling": True}},
            )
        ).page

        assert "By mean Dice **fedsca** is first of 2 federated methods (0.410)." in page
        assert "With all images in one place, pooled reaches 0.910." in page
        (row,) = (line for line in page.splitlines() if line.startswith("| pooled | **0.910**"))
        assert row.count(" – ") == 2, "it sends images, which are not counted"
        assert "Ahead of it" not in page

    @pytest.mark.parametrize("reference", ["local", "fedavg"])
    def test_any_method_can_be_the_reference(self, compare, reference: str) -> None:
        page = built(compare(METHODS, by_method(fedsca=0.7, local=0.5, fedavg=0.6), reference=reference)).page

        place = {"local": "third of 3 methods (0.510; fedsca", "fedavg": "second of 2 federated methods (0.610; fedsca"}
        assert f"By mean Dice **{reference}** is {place[reference]} has 0.710)." in page
        assert ("Against training alone" in page) == (reference != "local")
        assert ("of the bytes of fedavg" in page) == (reference != "fedavg")

    def test_bytes_are_shown_as_a_share_of_fedavg_s(self, compare) -> None:
        comparison = compare(METHODS, by_method(fedsca=0.7, local=0.5, fedavg=0.6))
        for result in comparison.results.values():
            if result["method"] == "fedsca":
                result["traffic"] = {"bytes_up": 1.0, "bytes_down": 2.0, "bytes_to_95": None}

        assert "It sends 1/10 of the bytes of fedavg in the same type." in build_report(comparison).page

    def test_fedavg_in_fp32_is_a_second_yardstick_if_it_ran(self, compare) -> None:
        plain = {"strategy": "fedavg", "set": {"federation.wire_dtype": "fp32"}, "ablation": "wire"}
        comparison = compare({**METHODS, "plain": plain}, by_method(fedsca=0.7, local=0.5, fedavg=0.6, plain=0.6))
        for result in comparison.results.values():
            if result["method"] == "plain":
                result["traffic"] = {"bytes_up": 60.0, "bytes_down": 60.0, "bytes_to_95": None}

        assert "same type, and 1/4 of those of fedavg in fp32." in build_report(comparison).page


class TestMissing:
    def test_without_any_result_the_page_lists_what_is_missing(self, compare) -> None:
        report = built(compare(METHODS, lambda cell: None, unseen_sites=["c"], leave_one_out=True))

        assert report.page.count("\n- ") == 9
        assert "- fedsca, seed 0, all images, rate 0.01, without a" in report.page
        assert report.figures == {}
        assert read_again(report.table).empty
        assert "method" in read_again(report.table)
        assert "difference" in read_again(report.tests)
        assert "received" in read_again(report.unseen)
        assert "No method was scored" in report.html

    def test_methods_without_a_chosen_rate_are_listed_as_missing(self, compare) -> None:
        report = built(compare(METHODS, by_method(fedsca=0.5), rates={}))

        assert [line for line in report.page.splitlines() if line.startswith("- ")] == [
            f"- {name}: no learning rate chosen" for name in METHODS
        ]
        assert "label" in read_again(report.table)

    def test_a_single_method_has_a_table_and_no_test(self, compare) -> None:
        report = built(compare({"fedsca": {}}, by_method(fedsca=0.5)))

        assert list(report.table["method"]) == ["fedsca"]
        assert report.tests.empty
        assert "Image by image" not in report.page
        assert "first of" not in report.page

    def test_without_the_reference_the_other_methods_are_still_shown(self, compare) -> None:
        report = built(compare(METHODS, by_method(local=0.5, fedavg=0.4)))

        assert list(report.table["method"]) == ["local", "fedavg"]
        assert "**fedsca** has no result here." in report.page
        assert "- fedsca, seed 0" in report.page

    def test_a_missing_seed_is_listed_and_the_row_has_one_seed_less(self, compare) -> None:
        report = built(
            compare(METHODS, lambda cell: None if (cell.method, cell.seed) == ("local", 1) else 0.5, seeds=[0, 1])
        )

        assert report.table.set_index("method")["seeds"].to_dict() == {"fedsca": 2, "local": 1, "fedavg": 2}
        assert [line for line in report.page.splitlines() if line.startswith("- ")] == [
            "- local, seed 1, all images, rate 0.01"
        ]

    def test_with_one_training_site_there_is_no_similarity(self, compare) -> None:
        page = built(compare(METHODS, by_method(fedsca=0.5, local=0.4, fedavg=0.3), unseen_sites=["a", "b"])).page

        assert "Training sites: 1 (c)" in page
        assert "How fedsca behaved" not in page


class TestVersions:
    def test_a_method_with_a_result_of_another_code_version_is_marked(self, compare) -> None:
        report = built(
            compare(
                METHODS,
                by_method(fedsca=0.7, local=0.5, fedavg=0.6),
                seeds=[0, 1],
                code=lambda cell: "old" if (cell.method, cell.seed) == ("fedavg", 1) else "now",
            )
        )

        assert report.table.set_index("method")["label"].to_dict() == {
            "fedsca": "fedsca",
            "fedavg": "fedavg †",
            "local": "local",
        }
        assert "| fedavg † |" in report.page
        assert "than the current one, now. Versions: now (5 results), old (1 result)." in report.page

    def test_all_methods_are_marked_if_no_result_is_of_the_current_code(self, compare) -> None:
        page = built(compare({"fedsca": {}}, by_method(fedsca=0.7), code=lambda cell: "old")).page

        assert "| fedsca † |" in page
        assert "† marks methods with results from another code version than the current one, now." in page


class TestAblations:
    def test_a_variant_is_compared_with_the_reference_and_is_in_no_other_table(self, compare) -> None:
        report = built(compare({**METHODS, "wide": ABLATION}, by_method(fedsca=0.6, local=0.5, fedavg=0.4, wide=0.7)))

        assert "wide" not in set(report.table["method"])
        assert "wide" not in set(report.tests["method"])
        ablations = report.page[report.page.index("## Ablations of fedsca, all training images") :]
        assert ablations.index("### adapter") < ablations.index("| wide |") < ablations.index("| fedsca |")
        assert "local" not in ablations
        assert report.html.index("<h2>Ablation: adapter</h2>") < report.html.index(">wide</th>")

    def test_ablations_may_vary_a_method_other_than_the_reference(self, compare) -> None:
        wide = {"strategy": "fedavg", "set": {"adapters.width": 8}, "ablation": "adapter"}
        comparison = compare(
            {**METHODS, "wide": wide}, by_method(fedsca=0.6, local=0.5, fedavg=0.4, wide=0.7), ablated="fedavg"
        )

        page = built(comparison).page
        ablations = page[page.index("## Ablations of fedavg, ") :]
        assert ablations.index("| wide |") < ablations.index("| fedavg |")
        assert "| fedsca |" not in ablations

    def test_variants_are_compared_on_the_seeds_that_all_have(self, compare) -> None:
        report = built(
            compare(
                {"fedsca": {}, "wide": {**ABLATION, "seeds": [0]}},
                lambda cell: {("fedsca", 0): 0.2, ("fedsca", 1): 0.8, ("wide", 0): 0.3}[cell.method, cell.seed],
                seeds=[0, 1],
            )
        )

        assert report.table["dice"].tolist() == pytest.approx([0.51])
        ablations = report.page[report.page.index("## Ablations") :]
        (reference,) = (line for line in ablations.splitlines() if line.startswith("| fedsca |"))
        assert reference.startswith("| fedsca | 0.210")
        assert "3 sites, 9 images, 1 seed |" in reference

    def test_a_variant_without_a_result_is_missing_and_has_no_table(self, compare) -> None:
        page = built(compare({"fedsca": {}, "wide": ABLATION}, by_method(fedsca=0.6))).page

        assert "## Ablations" not in page
        assert "- wide, seed 0" in page


class TestUnseen:
    def test_each_received_model_is_a_column_with_words_before_numbers(self, compare) -> None:
        report = built(compare(METHODS, by_method(fedsca=0.6, local=0.5, fedavg=0.4), seeds=[0, 1], unseen_sites=["c"]))

        assert "### c (3 test images)" in report.page
        assert "| Method | ensemble | 2 images |" in report.page
        assert set(report.unseen["site"]) == {"c"}
        assert (report.unseen["images"] == 3).all()
        assert (report.unseen["seeds"] == 2).all()
        assert report.unseen.set_index(["method", "received"])["dice"].to_dict() == {
            (method, received): pytest.approx(dice + 0.01)
            for method, dice in (("fedsca", 0.6), ("local", 0.5), ("fedavg", 0.4))
            for received in ("ensemble", "2 images")
        }

    def test_left_out_sites_are_reported_beside_unseen_sites(self, compare) -> None:
        report = built(
            compare({"fedsca": {}}, lambda cell: 0.6, unseen_sites=["c"], leave_one_out=True, train_images=[2, 4])
        )

        titles = [line for line in report.page.splitlines() if line.startswith("### ")]
        assert titles == [
            "### a (3 test images), trained on 2 images a site",
            "### a (3 test images), trained on 4 images a site",
            "### b (3 test images), trained on 2 images a site",
            "### b (3 test images), trained on 4 images a site",
            "### c (3 test images)",
        ]


def test_the_page_lists_manual_choices_and_options_that_differ_from_the_defaults(compare) -> None:
    methods = {"fedsca": {"options": {"rho": 0.25}, "tuned": "rho, in three trials"}, "local": {}}

    page = built(compare(methods, by_method(fedsca=0.6, local=0.5))).page

    assert "- fedsca: rho, in three trials" in page[page.index("## What was tuned") :]
    assert "| fedsca | rho: 0.25 |" in page[page.index("## Options that differ from the defaults") :]
    assert "The grid tunes" not in page


def test_only_methods_with_several_rates_are_listed_as_tuned(compare) -> None:
    page = built(
        compare(
            {"fedsca": {"learning_rates": [0.1, 0.2]}, "local": {}},
            by_method(fedsca=0.6, local=0.5),
        )
    ).page

    assert "| fedsca | 0.1, 0.2 | 0.1 |" in page
    assert "| local | " not in page[page.index("## What was tuned") :]


def test_several_classes_have_a_table_of_means_over_the_sites_that_have_them(compare) -> None:
    classes = {"a": {"1": [0.2, 0.4], "2": [0.5, 0.7]}, "b": {"1": [0.9, 0.9]}, "c": {"1": [0.6, 0.6]}}
    comparison = compare(
        METHODS,
        by_method(fedsca=0.5, local=0.4, fedavg=0.3),
        base={"preprocessing": {"classes": 3, "class_names": ["tumour", "cyst", "vessel"]}},
    )
    shifts = {"fedsca": 0.1, "local": 0.0, "fedavg": -0.1}
    for result in comparison.results.values():
        for site, found in result["sites"].items():
            shift = shifts[result["method"]]
            found["dice_by_class"] = {label: [value + shift for value in dice] for label, dice in classes[site].items()}

    page = built(comparison).page

    assert "| Method | tumour (3 sites) | cyst (1 site) |" in page
    assert page.index("| fedsca | 0.700 | 0.700 |") < page.index("| local | 0.600 | 0.600 |")
    assert "vessel" not in page


def test_with_one_class_there_is_no_table_of_classes(compare) -> None:
    assert "by class" not in built(compare(METHODS, by_method(fedsca=0.5, local=0.4, fedavg=0.3))).page
