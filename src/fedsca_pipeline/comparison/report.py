"""The report of a comparison: from finished cells to tables, figures, the Markdown page and the HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fedsca_pipeline.comparison.behaviour import Behaviour, behaviour_of
from fedsca_pipeline.comparison.figures import (
    critical_difference,
    dice_against_bytes,
    learning_curves,
    similarity_matrix,
    site_boxes,
)
from fedsca_pipeline.comparison.page import Section, describe_versions, render_page
from fedsca_pipeline.comparison.plan import (
    Cell,
    Method,
    Setting,
    cells,
    resolve_methods,
    setting_of,
    tuning_cells,
    unique,
)
from fedsca_pipeline.comparison.results import Frames, Result, code_at_work, frames, rates_of, read_known
from fedsca_pipeline.comparison.statistics import bootstrap, paired_tests
from fedsca_pipeline.comparison.tables import method_table, render_html
from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.errors import counted

_BYTES = ("bytes_up", "bytes_down", "bytes_to_95")
_OTHER_CODE = " \N{DAGGER}"


@dataclass(frozen=True)
class Report:
    """The tables, the Markdown page, the table of methods as an HTML page, and the figures by path."""

    table: pd.DataFrame
    tests: pd.DataFrame
    unseen: pd.DataFrame
    page: str
    html: str
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Comparison:
    """A grid and its finished cells.

    ``results`` are keyed by fingerprint, ``rates`` by method. ``code`` is the current code version; the report marks
    results of other versions.
    """

    setting: Setting
    methods: Mapping[str, Method]
    results: Mapping[str, Result]
    rates: Mapping[str, float]
    code: str

    @cached_property
    def wanted(self) -> list[Cell]:
        """All cells of the grid whose learning rate is chosen."""
        return cells(self.methods, self.setting, self.rates)

    @cached_property
    def sizes(self) -> list[int | None]:
        """Numbers of training images per site: those of the comparison first, then those that single methods add."""
        of_methods = (count for method in self.methods.values() for count in method.train_images)
        return list(dict.fromkeys([*self.setting.config.train_images, *of_methods]))

    @cached_property
    def missing(self) -> list[str]:
        """What has no result, one line each: methods not permitted, methods without a learning rate, cells."""
        undecided = [
            f"{name}: no learning rate chosen"
            for name, method in self.methods.items()
            if method.rates_of not in self.rates
        ]
        not_permitted = [
            f"{name}: the sites have not permitted it (docs/comparison.md)"
            for name in self.setting.config.chosen
            if name not in self.methods
        ]
        return [
            *not_permitted,
            *undecided,
            *(str(cell) for cell in unique(self.wanted) if cell.fingerprint not in self.results),
        ]

    def of_size(self, count: int | None) -> Frames:
        """Return the tables of all methods with ``count`` training images per site.

        Methods that pool the sites' images have missing bytes: they send images, which are not counted.
        """
        found = [cell for cell in self.wanted if cell.train_images == count and cell.fingerprint in self.results]
        tables = frames([(cell, self.results[cell.fingerprint]) for cell in found])
        pooled = tables.costs["method"].isin([name for name, method in self.methods.items() if method.strategy.pools])
        costs = tables.costs.astype(dict.fromkeys(_BYTES, float))
        costs.loc[pooled, list(_BYTES)] = float("nan")
        return replace(tables, costs=costs)

    @cached_property
    def labels(self) -> dict[str, str]:
        """Each method's label: its name, marked if another code version made any of its results."""
        marked = {
            cell.method
            for cell in self.wanted
            if self.results.get(cell.fingerprint, {}).get("code", self.code) != self.code
        }
        return {name: name + _OTHER_CODE * (name in marked) for name in self.methods}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, class 1 first."""
        return PreprocessingConfig(**self.setting.base["preprocessing"]).names

    @cached_property
    def ablations(self) -> dict[str, list[str]]:
        """Names of the ablations, grouped by what they vary."""
        found: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            if method.ablation is not None:
                found.setdefault(method.ablation, []).append(name)
        return found


def report_of(plan: Mapping[str, Any], finished: Path) -> tuple[dict[str, str], Report]:
    """Return the names of a plan's cells that have a result, by fingerprint, and the report on them.

    The report uses the results in ``finished`` that a run of the same plan would not compute again.
    """
    setting = setting_of(plan)
    methods = resolve_methods(setting)
    same_code = setting.config.same_code
    tuning = tuning_cells(methods, setting)
    known = read_known(tuning, finished, same_code=same_code)[0]
    rates = rates_of(plan, known)
    grid = [*tuning, *cells(methods, setting, rates)]
    known |= read_known([cell for cell in grid if cell.fingerprint not in known], finished, same_code=same_code)[0]
    index = {cell.fingerprint: str(cell) for cell in unique(grid) if cell.fingerprint in known}
    return index, build_report(Comparison(setting, methods, known, rates, code_at_work()))


def build_report(comparison: Comparison) -> Report:
    """Return the report of a comparison. A method without any result appears in the list of missing ones only."""
    config = comparison.setting.config
    main = [name for name, method in comparison.methods.items() if method.ablation is None]
    sections: list[Section] = []
    tables, tests = [], []
    figures: dict[str, Figure] = {}
    for count in comparison.sizes:
        found = comparison.of_size(count)
        scores = _only(found.scores, main)
        if scores.empty:
            continue
        table = method_table(scores, _only(found.costs, main), comparison.labels)
        paired = _tests(scores, config.reference)
        name = "all_images" if count is None else f"{count}_images"
        behaviour = _behaviour(comparison, count)
        figures |= {f"{name}/{key}": figure for key, figure in _figures(found, main, comparison, behaviour).items()}
        tables.append(table.assign(train_images=count))
        tests.append(paired.assign(train_images=count))
        by_class = class_means(_only(found.classes, main), comparison.labels, comparison.class_names)
        fp32 = _fedavg_fp32(comparison.methods, found)
        sections.append(Section(count, name, table, paired, behaviour, fp32, by_class))
    ablated = _ablations(comparison)
    unseen = pd.concat(
        [_unseen_table(_only(comparison.of_size(count).unseen, main)).assign(train_images=count)
         for count in comparison.sizes], ignore_index=True,
    )  # fmt: skip
    versions = describe_versions(_versions(comparison), _OTHER_CODE.strip(), comparison.code)
    page = render_page(
        comparison.setting,
        comparison.methods,
        comparison.rates,
        sections,
        ablated,
        unseen,
        missing=comparison.missing,
        versions=versions,
    )
    if not sections:
        # Tables without rows still have their columns, so that a saved file can be read again.
        empty = frames([])
        tables = [method_table(empty.scores, empty.costs, {}).assign(train_images=None)]
        tests = [_tests(empty.scores, config.reference).assign(train_images=None)]
    shown = {section.title: section.table for section in sections}
    shown |= {f"Ablation: {what}": table for what, table in ablated.items()}
    html = render_html(shown, note=versions)
    return Report(_concat(tables), _concat(tests), unseen, page, html, figures)


def _fedavg_fp32(methods: Mapping[str, Method], found: Frames) -> float | None:
    """Return fedavg's bytes per site and round in fp32, the usual yardstick; None if no row has them."""
    names = [
        name
        for name, method in methods.items()
        if method.strategy.name == "fedavg" and method.groups["federation"]["wire_dtype"] == "fp32"
    ]
    sent = _only(found.costs, names)[["bytes_up", "bytes_down"]].sum(axis=1, skipna=False)
    return float(sent.mean()) if sent.notna().any() else None


def class_means(classes: pd.DataFrame, labels: Mapping[str, str], names: Sequence[str]) -> pd.DataFrame:
    """Return the mean Dice of each class: over seeds, then over the sites that have the class, each counting once.

    Args:
        classes: as in ``Frames``.
        labels: the methods' labels.
        names: names of the classes, class 1 first.

    Returns:
        One row per method, by label, the highest mean over classes first; one column per class that some site has,
        with the number of these sites in its heading. Empty in, empty out.
    """
    sites = classes.groupby(["method", "class", "site"], as_index=False)["dice"].mean()
    means = sites.pivot_table(index="method", columns="class", values="dice")
    order = means.mean(axis=1).sort_values(ascending=False, kind="stable").index
    counts = classes.groupby("class")["site"].nunique()
    headings = {label: f"{names[label - 1]} ({counted(count, 'site')})" for label, count in counts.items()}
    return means.loc[order].rename(index=labels, columns=headings)


def _only(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    return table[table["method"].isin(list(names))]


def _concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)


def _tests(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    if reference not in set(scores["method"]):
        return paired_tests(scores.iloc[:0], reference)
    return paired_tests(scores, reference)


def _figures(found: Frames, main: Sequence[str], comparison: Comparison, behaviour: Behaviour) -> dict[str, Figure]:
    scores, labels = _only(found.scores, main), comparison.labels
    table = method_table(scores, _only(found.costs, main), labels)
    reference = comparison.setting.config.reference
    best = [name for name in table["method"] if name != reference][:3]
    return {
        "dice_against_bytes": dice_against_bytes(table),
        "site_boxes": site_boxes(scores, labels),
        "learning_curves": learning_curves(
            _only(found.curves, main), highlight=[reference, *best, "local", "fedavg"], labels=labels
        ),
        "critical_difference": critical_difference(scores, labels),
        "similarity": similarity_matrix(
            behaviour.similarity, f"{reference}: similarity of the sites' updates, mean over rounds and seeds"
        ),
    }


def _ablations(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """Return one table per group of ablations: the variants and the method they vary."""
    first = comparison.setting.config.train_images[0]
    found = comparison.of_size(first)
    varied = comparison.setting.config.varied
    tables = {
        what: method_table(
            _same_seeds(found.scores, [varied, *names]),
            _same_seeds(found.costs, [varied, *names]),
            comparison.labels,
        )
        for what, names in comparison.ablations.items()
        if set(names) & set(found.scores["method"])
    }
    return {what: table for what, table in tables.items() if not table.empty}


def _same_seeds(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return the rows of these methods, of the seeds that all of them have."""
    table = _only(table, names)
    seeds = [set(rows["seed"]) for _, rows in table.groupby("method")]
    return table[table["seed"].isin(set.intersection(*seeds))] if seeds else table


def _unseen_table(unseen: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method, site and received model: Dice with its interval, numbers of images and seeds."""
    columns = ["method", "site", "received", "dice", "dice_low", "dice_high", "images", "seeds"]
    rows = []
    for (site, received), part in unseen.groupby(["site", "received"], sort=False):
        table = bootstrap(part, ["dice"]).set_index("method")
        for method, scores in part.groupby("method"):
            counts = {"images": scores["image"].nunique(), "seeds": scores["seed"].nunique()}
            rows.append({"method": method, "site": site, "received": received, **table.loc[method].to_dict(), **counts})
    return pd.DataFrame(rows, columns=columns)


def _behaviour(comparison: Comparison, count: int | None) -> Behaviour:
    reference = comparison.setting.config.reference
    results = [
        comparison.results[cell.fingerprint]
        for cell in comparison.wanted
        if (cell.method, cell.train_images, cell.left_out) == (reference, count, None)
        and cell.fingerprint in comparison.results
    ]
    return behaviour_of(results, comparison.setting.sites)


def _versions(comparison: Comparison) -> dict[str, int]:
    """Return the number of results by code version."""
    made = [result["code"] for result in comparison.results.values()]
    return {code: made.count(code) for code in sorted(set(made))}
