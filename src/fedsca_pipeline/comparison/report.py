"""From finished cells to tables, figures and the page that a comparison ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedsca_pipeline.comparison.behaviour import Behaviour
from fedsca_pipeline.comparison.figures import (
    critical_difference,
    dice_against_bytes,
    learning_curves,
    similarity_matrix,
    site_boxes,
)
from fedsca_pipeline.comparison.page import Section, describe_versions, render_page
from fedsca_pipeline.comparison.plan import Cell, Method, Setting, cells, unique
from fedsca_pipeline.comparison.results import Frames, Result, frames
from fedsca_pipeline.comparison.statistics import bootstrap, paired_tests
from fedsca_pipeline.comparison.tables import method_table, render_html
from fedsca_pipeline.config import PreprocessingConfig

_BYTES = ("bytes_up", "bytes_down", "bytes_to_95")
_OTHER_CODE = " \N{DAGGER}"


@dataclass(frozen=True)
class Report:
    """What a comparison ends with: tables, the page as Markdown, the table of methods as HTML, figures by path."""

    table: pd.DataFrame
    tests: pd.DataFrame
    unseen: pd.DataFrame
    page: str
    html: str
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Comparison:
    """A grid and what is known of it.

    ``results`` by fingerprint, ``rates`` by method. ``code`` is the present version: results of another are marked.
    """

    setting: Setting
    methods: Mapping[str, Method]
    results: Mapping[str, Result]
    rates: Mapping[str, float]
    code: str
    figures: dict[str, Figure] = field(default_factory=dict)

    @cached_property
    def wanted(self) -> list[Cell]:
        """All cells of the grid whose learning rate is known."""
        return cells(self.methods, self.setting, self.rates)

    @cached_property
    def sizes(self) -> list[int | None]:
        """Numbers of training images a site, those of the comparison first, then what single methods add."""
        of_methods = (count for method in self.methods.values() for count in method.train_images)
        return list(dict.fromkeys([*self.setting.config.train_images, *of_methods]))

    @cached_property
    def missing(self) -> list[str]:
        """What has no result: cells, and methods whose learning rate is not chosen."""
        undecided = [
            f"{name}: no learning rate chosen" for name, m in self.methods.items() if m.rates_of not in self.rates
        ]
        withheld = [
            f"{name}: the sites have not permitted it (docs/comparison.md)"
            for name in self.setting.config.chosen
            if name not in self.methods
        ]
        return [
            *withheld,
            *undecided,
            *(str(cell) for cell in unique(self.wanted) if cell.fingerprint not in self.results),
        ]

    def of_size(self, count: int | None) -> Frames:
        """Return the tables of all methods with so many training images a site.

        A method that pools the sites' images has no bytes: what travels there is the images, which nobody counts.
        """
        found = [cell for cell in self.wanted if cell.train_images == count and cell.fingerprint in self.results]
        tables = frames([(cell, self.results[cell.fingerprint]) for cell in found])
        pooled = tables.costs["method"].isin([name for name, method in self.methods.items() if method.strategy.pools])
        costs = tables.costs.astype(dict.fromkeys(_BYTES, float))
        costs.loc[pooled, list(_BYTES)] = float("nan")
        return replace(tables, costs=costs)

    @cached_property
    def labels(self) -> dict[str, str]:
        """What to call each method: its name, marked where one of its results is of another version of the code."""
        marked = {
            cell.method
            for cell in self.wanted
            if self.results.get(cell.fingerprint, {}).get("code", self.code) != self.code
        }
        return {name: name + _OTHER_CODE * (name in marked) for name in self.methods}

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, class 1 first."""
        return PreprocessingConfig(**self.setting.base["preprocessing"]).names

    @cached_property
    def ablations(self) -> dict[str, list[str]]:
        """The variants of the ablated method by what they vary."""
        found: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            if method.ablation is not None:
                found.setdefault(method.ablation, []).append(name)
        return found


def build_report(comparison: Comparison) -> Report:
    """Return all that is shown of a comparison. Methods without any result are named as missing, and nothing else."""
    config = comparison.setting.config
    main = [name for name, method in comparison.methods.items() if method.ablation is None]
    sections, tables, tests, figures = [], [], [], {}
    for count in comparison.sizes:
        found = comparison.of_size(count)
        scores = _only(found.scores, main)
        if scores.empty:
            continue
        table = method_table(scores, _only(found.costs, main), comparison.labels)
        paired = _tests(scores, config.reference)
        name = "all_images" if count is None else f"{count}_images"
        figures |= {f"{name}/{key}": figure for key, figure in _figures(found, main, comparison, count).items()}
        tables.append(table.assign(train_images=count))
        tests.append(paired.assign(train_images=count))
        behaviour = _behaviour(comparison, count)
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
        # Tables without a row have their columns all the same, so that they can be read again.
        empty = frames([])
        tables = [method_table(empty.scores, empty.costs, {}).assign(train_images=None)]
        tests = [_tests(empty.scores, config.reference).assign(train_images=None)]
    shown = {section.title: section.table for section in sections}
    shown |= {f"Ablation: {what}": table for what, table in ablated.items()}
    html = render_html(shown, note=versions)
    return Report(_concat(tables), _concat(tests), unseen, page, html, figures)


def _fedavg_fp32(methods: Mapping[str, Method], found: Frames) -> float | None:
    """Return the bytes a site and round of the rows that are fedavg in fp32, the usual yardstick; None without one."""
    names = [
        name
        for name, method in methods.items()
        if method.strategy.name == "fedavg" and method.groups["federation"]["wire_dtype"] == "fp32"
    ]
    sent = _only(found.costs, names)[["bytes_up", "bytes_down"]].sum(axis=1, skipna=False)
    return float(sent.mean()) if sent.notna().any() else None


def class_means(classes: pd.DataFrame, labels: Mapping[str, str], names: Sequence[str]) -> pd.DataFrame:
    """Mean Dice of each class: over seeds, then over the sites that have it, each counting once.

    Args:
        classes: as in ``Frames``.
        labels: what to call each method.
        names: of the classes, class 1 first.

    Returns:
        Methods by label, sorted by their mean over classes, best first; a column for each class that a site has, which
        says how many have it. No row in, no row out.
    """
    sites = classes.groupby(["method", "class", "site"], as_index=False)["dice"].mean()
    means = sites.pivot_table(index="method", columns="class", values="dice")
    order = means.mean(axis=1).sort_values(ascending=False, kind="stable").index
    counts = classes.groupby("class")["site"].nunique()
    said = {label: f"{names[label - 1]} ({count} site{'s' * (count > 1)})" for label, count in counts.items()}
    return means.loc[order].rename(index=labels, columns=said)


def _only(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    return table[table["method"].isin(list(names))]


def _concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)


def _tests(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    if reference not in set(scores["method"]):
        return paired_tests(scores.iloc[:0], reference)
    return paired_tests(scores, reference)


def _figures(found: Frames, main: Sequence[str], comparison: Comparison, count: int | None) -> dict[str, Figure]:
    scores, labels = _only(found.scores, main), comparison.labels
    table = method_table(scores, _only(found.costs, main), labels)
    reference = comparison.setting.config.reference
    best = [name for name in table["method"] if name != reference][:3]
    behaviour = _behaviour(comparison, count)
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
    """Return a table for each thing that is varied, the ablated method among its variants."""
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
    """Keep the seeds that all of these methods have: variants that ran once are held against the same seed."""
    table = _only(table, names)
    seeds = [set(rows["seed"]) for _, rows in table.groupby("method")]
    return table[table["seed"].isin(set.intersection(*seeds))] if seeds else table


def _unseen_table(unseen: pd.DataFrame) -> pd.DataFrame:
    """One row a method, site and what it received: Dice with its interval over images and seeds, and their numbers."""
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
    wanted = [
        comparison.results[cell.fingerprint]
        for cell in comparison.wanted
        if (cell.method, cell.train_images, cell.left_out) == (reference, count, None)
        and cell.fingerprint in comparison.results
    ]
    rounds = [record for result in wanted for record in result["rounds"] if not record["final"]]
    complete = [r for r in rounds if "weights" in r and r["accepted"] == sorted(comparison.setting.sites)]
    sites = pd.DataFrame(
        [{"round": r["round"], "site": site, **entry} for r in rounds for site, entry in r["sites"].items()],
        columns=["round", "site", "self_weight", "update_norm", "spread"],
    )
    return Behaviour(
        similarity=_mean_matrix(complete, "similarity", comparison.setting.sites),
        weights=_mean_matrix(complete, "weights", comparison.setting.sites),
        self_weight=sites.groupby("round")["self_weight"].mean(),
        update_norm=sites.pivot_table(index="site", columns="round", values="update_norm"),
        spread=sites.groupby("round")["spread"].mean(),
    )


def _mean_matrix(rounds: Sequence[Mapping[str, Any]], name: str, sites: Sequence[str]) -> pd.DataFrame:
    if not rounds:
        return pd.DataFrame()
    return pd.DataFrame(np.mean([r[name] for r in rounds], axis=0), index=list(sites), columns=list(sites))


def _versions(comparison: Comparison) -> dict[str, int]:
    """Return how many results each version of the code has made."""
    made = [result["code"] for result in comparison.results.values()]
    return {code: made.count(code) for code in sorted(set(made))}
