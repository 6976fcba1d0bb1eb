"""The Markdown page of a comparison: tables, the verdict in words, tests, and how the reference method behaved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsca_pipeline.comparison.statistics import ALL_SITES
from fedsca_pipeline.comparison.tables import render_markdown
from fedsca_pipeline.config import ComparisonConfig
from fedsca_pipeline.errors import counted
from fedsca_pipeline.files import as_cell

if TYPE_CHECKING:
    from fedsca_pipeline.comparison.behaviour import Behaviour
    from fedsca_pipeline.comparison.plan import Method, Setting

FIGURES = "results_figures"
"""Folder of the page's pictures, beside the page."""

# Strategies without federation: sites train alone, or give all their images away.
_NOT_FEDERATED = frozenset({"local", "local_full", "centralised"})
_LEVEL = 0.05


@dataclass(frozen=True)
class Section:
    """The results with one number of training images per site (None: all), and the folder of their figures.

    ``fedavg_fp32``: bytes per site and round, up and down, of fedavg in fp32; None if it did not run.
    ``by_class``: Dice by method and class, from ``report.class_means``; empty if there is one class only.
    """

    train_images: int | None
    folder: str
    table: pd.DataFrame
    tests: pd.DataFrame
    behaviour: Behaviour
    fedavg_fp32: float | None = None
    by_class: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def title(self) -> str:
        """The section's heading."""
        count = self.train_images
        return "All training images" if count is None else f"{counted(count, 'training image')} a site"


def render_page(
    setting: Setting,
    methods: Mapping[str, Method],
    rates: Mapping[str, float],
    sections: Sequence[Section],
    ablations: Mapping[str, pd.DataFrame],
    unseen: pd.DataFrame,
    *,
    missing: Sequence[str],
    versions: str,
) -> str:
    """Return the page. Every number on it comes from the arguments; empty parts are left out.

    Args:
        setting: the setting of all cells.
        methods: the compared methods by name.
        rates: the chosen learning rates by method.
        sections: one per number of training images.
        ablations: tables of variants, by what they vary.
        unseen: from ``report``: Dice at sites that did not train.
        missing: one line per missing result.
        versions: from ``describe_versions``.
    """
    config = setting.config
    parts = [
        "# Methods compared",
        "Written by `kedro run --pipeline=comparison`; the next run overwrites edits. docs/comparison.md explains the "
        "columns and the tests.",
        _setting(setting, methods),
        *(_section(section, config.reference, methods) for section in sections),
        _ablations(ablations, config),
        _unseen(unseen, setting),
        _options(methods),
        _tuned(methods, rates),
        _missing(missing),
        versions,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(setting: Setting, methods: Mapping[str, Method]) -> str:
    base = setting.base
    training, federation = base["training"], base["federation"]
    steps = training["steps_per_round"]
    work = f"{steps} steps" if steps else f"{training['local_epochs']} epochs"
    seeds = sorted({seed for method in methods.values() for seed in method.seeds})
    sites = setting.sites
    return (
        f"Training sites: {len(sites)} ({', '.join(sites)}). {federation['rounds']} rounds of {work} of "
        f"{training['batch_size']} images, foundation {base['foundation']['name']} at "
        f"{base['preprocessing']['image_size']} px, {counted(len(seeds), 'seed')}. A seed decides the order of images, "
        f"the adapters' start values and which images train. Each site's validation images choose its model; test "
        f"images choose nothing. **Results at {counted(len(sites), 'site')} allow no claim about a new hospital**: "
        f"intervals and tests are about these images at these sites."
    )


def _section(section: Section, reference: str, methods: Mapping[str, Method]) -> str:
    picture = f"{FIGURES}/{section.folder}"
    return "\n\n".join(
        part
        for part in (
            f"## {section.title}",
            render_markdown(section.table).rstrip(),
            _by_class(section.by_class),
            _verdict(section, reference, methods),
            _tests(section.tests, reference),
            f"![Dice against bytes]({picture}/dice_against_bytes.png)",
            f"![Dice of each site's test images]({picture}/site_boxes.png)",
            f"![Validation Dice by round]({picture}/learning_curves.png)",
            f"![Critical differences]({picture}/critical_difference.png)",
            _behaviour(section.behaviour, reference, picture),
        )
        if part
    )


def _by_class(table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    rows = ([str(method), *(f"{value:.3f}" for value in values)] for method, *values in table.itertuples())
    return "Dice by class, mean over the sites that have the class:\n\n" + _table(["Method", *table.columns], rows)


def _verdict(section: Section, reference: str, methods: Mapping[str, Method]) -> str:
    """Return sentences about the reference's rank, its distance to other methods, and its bytes."""
    table = section.table.set_index("method")
    if reference not in table.index:
        return f"**{reference}** has no result here."
    federated = table[[methods[name].strategy.name not in _NOT_FEDERATED for name in table.index]]
    rivals, kind = (federated, "federated methods") if reference in federated.index else (table, "methods")
    lines = []
    for column, what in (("dice", "mean Dice"), ("worst_dice", "Dice of the worst site")):
        ranked = rivals[column].sort_values(ascending=False, kind="stable")
        if len(ranked) < 2:
            continue
        rank, best = list(ranked.index).index(reference) + 1, ranked.index[0]
        own = ranked[reference]
        text = f"By {what} **{reference}** is {_ordinal(rank)} of {len(ranked)} {kind} ({own:.3f}"
        if rank > 1:
            text += f"; {best} has {ranked[best]:.3f}"
        lines.append(text + ").")
    lines += _ahead(federated, reference)
    if "local" in table.index and reference != "local":
        difference = table.loc[reference, "dice"] - table.loc["local", "dice"]
        lines.append(f"Against training alone: {difference:+.3f}{_p(section.tests, 'local', sign=-1)}.")
    pooled = [name for name in table.index if methods[name].strategy.pools]
    if pooled and reference not in pooled:
        lines.append(f"With all images in one place, {pooled[0]} reaches {table.loc[pooled[0], 'dice']:.3f}.")
    sent = table["bytes"]
    # Unknown bytes are NaN, for which both comparisons are false.
    if "fedavg" in table.index and reference != "fedavg" and sent["fedavg"] > 0 and sent[reference] >= 0:
        text = f"It sends {_share(sent[reference] / sent['fedavg'])} of the bytes of fedavg in the same type"
        if section.fedavg_fp32:
            text += f", and {_share(sent[reference] / section.fedavg_fp32)} of those of fedavg in fp32"
        lines.append(f"{text}.")
    return " ".join(lines)


def _ahead(federated: pd.DataFrame, reference: str) -> list[str]:
    """Return a sentence on the federated methods with a higher mean Dice and their bytes; empty if there is none."""
    if reference not in federated.index:
        return []
    own = federated.loc[reference]
    found = federated[federated["dice"] > own["dice"]].sort_values("dice", ascending=False, kind="stable")
    rivals = [
        f"{name} ({row['dice'] - own['dice']:+.3f}{_times(row['bytes'], own['bytes'])})"
        for name, row in found.iterrows()
    ]
    return [f"Ahead of it: {', '.join(rivals)}."] if rivals else []


def _times(sent: float, own: float) -> str:
    """Return the ratio of another method's bytes to the reference's, in words; empty if it is not defined."""
    ratio = sent / own if own > 0 else math.nan
    if math.isnan(ratio):
        return ""
    return f", {ratio:.0f} times its bytes" if ratio >= 2 else f", {ratio:.2f} times its bytes"


def _share(share: float) -> str:
    return f"1/{1 / share:.0f}" if 0 < share < 0.5 else f"{share:.2f}"


def _p(tests: pd.DataFrame, method: str, sign: int) -> str:
    row = tests[(tests["method"] == method) & (tests["site"] == ALL_SITES)]
    if row.empty:
        return ""
    found = row.iloc[0]
    return f" (image by image {sign * found['difference']:+.3f}, Holm's p {_shown_p(found['p_holm'])})"


def _shown_p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


def _tests(tests: pd.DataFrame, reference: str) -> str:
    if tests.empty:
        return ""
    rows = []
    pooled = tests[tests["site"] == ALL_SITES].sort_values("difference", ascending=False, kind="stable")
    for found in pooled.itertuples():
        at_sites = tests[(tests["method"] == found.method) & (tests["site"] != ALL_SITES)]
        clear = at_sites[at_sites["p_holm"] < _LEVEL]
        better, worse = clear[clear["difference"] > 0]["site"], clear[clear["difference"] < 0]["site"]
        rows.append(
            (found.method, f"{found.difference:+.4f}", _shown_p(found.p), _shown_p(found.p_holm),
             ", ".join(better) or "–", ", ".join(worse) or "–")
        )  # fmt: skip
    return (
        f"Image by image against {reference} (Wilcoxon's signed-rank test on Dice averaged over seeds; Holm's "
        f"correction over methods; sites named where the corrected p is below {_LEVEL}):\n\n"
        + _table(["Method", "Difference", "p", "p, Holm", "Better at", "Worse at"], rows)
    )


def _behaviour(behaviour: Behaviour, reference: str, picture: str) -> str:
    # Similarity needs two sites.
    if len(behaviour.similarity) < 2 or behaviour.self_weight.empty:
        return ""
    matrix = behaviour.similarity.to_numpy(copy=True)
    others = [matrix[i, j] for i in range(len(matrix)) for j in range(len(matrix)) if i != j]
    own = behaviour.self_weight
    norms = behaviour.update_norm.mean(axis=1)
    last = own.index.max()
    lines = [
        f"How {reference} behaved (means over seeds): the cosine between two sites' updates is "
        f"{sum(others) / len(others):.3f} on average ({min(others):.3f} to {max(others):.3f}); a site's weight on its "
        f"own model is {own.iloc[0]:.2f} in round {own.index.min()} and {own[last]:.2f} in round {last}; local models "
        f"lie {behaviour.spread.mean():.2f} of their update norm from their mean. Mean update norms: "
        + ", ".join(f"{site} {norm:.2f}" for site, norm in norms.items())
        + ".",
        f"![Similarity of sites]({picture}/similarity.png)",
    ]
    return "\n\n".join(lines)


def _ablations(tables: Mapping[str, pd.DataFrame], config: ComparisonConfig) -> str:
    if not tables:
        return ""
    count = config.train_images[0]
    size = "all training images" if count is None else f"{counted(count, 'training image')} a site"
    return "\n\n".join(
        [
            f"## Ablations of {config.varied}, {size}",
            *(f"### {what}\n\n{render_markdown(table).rstrip()}" for what, table in tables.items()),
        ]
    )


def _unseen(unseen: pd.DataFrame, setting: Setting) -> str:
    if unseen.empty:
        return ""
    parts = [
        "## Sites that did not train",
        "Dice on a fixed half of the site, the same images in every column. *As it is*: the mean of the shared "
        "tensors, if the strategy shares the decoder. *Ensemble*: mean probability of all sites' models, which the "
        f"sites would have to release. *k images*: the mean, then {setting.config.shot_steps} local steps on k "
        "labelled images of the other half, for the tensors that the strategy keeps private (for all trained tensors "
        "if it keeps none).",
    ]
    # Methods differ in their first number of images, and with leave_one_out a site has several.
    sizes = unseen.groupby("site")["train_images"].nunique(dropna=False)
    for (site, count), rows in unseen.groupby(["site", "train_images"], dropna=False):
        order = sorted(set(rows["received"]), key=_received_order)
        lines = []
        for method, found in rows.groupby("method", sort=False):
            cells = found.set_index("received")
            lines.append([method, *(_interval(cells.loc[name]) if name in cells.index else "–" for name in order)])
        lines.sort(key=lambda line: (line[-1] != "–", line[-1]), reverse=True)
        images = int(rows["images"].max())
        title = f"### {site} ({counted(images, 'test image')})"
        if sizes[site] > 1:
            title += ", trained on " + ("all images" if pd.isna(count) else f"{counted(int(count), 'image')} a site")
        parts.append(title + "\n\n" + _table(["Method", *order], lines))
    return "\n\n".join(parts)


def _received_order(received: str) -> tuple[int, str]:
    """Sort key of what a site received: words first, then numbers of images."""
    count, _, _ = received.partition(" ")
    return (int(count), "") if count.isdigit() else (0, received)


def _interval(row: Any) -> str:
    return f"{row['dice']:.3f} [{row['dice_low']:.3f}, {row['dice_high']:.3f}]"


def _tuned(methods: Mapping[str, Method], rates: Mapping[str, float]) -> str:
    chosen = {name: rate for name, rate in rates.items() if len(methods[name].rates) > 1}
    beforehand = [f"- {name}: {method.tuned}" for name, method in methods.items() if method.tuned]
    parts = []
    if chosen:
        rows = [
            (name, ", ".join(f"{rate:g}" for rate in methods[name].rates), f"{rate:g}") for name, rate in chosen.items()
        ]
        parts.append(
            "The grid tunes the learning rate only: on the first seed, by validation Dice. Ablations use the rate of "
            "the method that they vary.\n\n" + _table(["Method", "Offered", "Chosen"], rows)
        )
    if beforehand:
        parts.append("Chosen by hand before the grid ran:\n\n" + "\n".join(beforehand))
    return "\n\n".join(["## What was tuned", *parts]) if parts else ""


def _options(methods: Mapping[str, Method]) -> str:
    """Return a table of the main methods' options that differ from their strategy's defaults."""
    rows = [
        (name, ", ".join(f"{key}: {value}" for key, value in options.items()))
        for name, method in methods.items()
        if method.ablation is None and (options := method.options.model_dump(exclude_defaults=True))
    ]
    if not rows:
        return ""
    return "## Options that differ from the defaults\n\n" + _table(["Method", "Options"], rows)


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return "## Missing\n\nThese have no result and are not in the tables:\n\n" + "\n".join(
        f"- {name}" for name in missing
    )


def describe_versions(versions: Mapping[str, int], marked: str, code: str) -> str:
    """Return a sentence on how many results each code version made.

    Args:
        versions: number of results by code version.
        marked: the mark of results of other versions.
        code: the current version.
    """
    if versions.keys() <= {code}:
        return f"Code version {code}."
    made = ", ".join(f"{version} ({counted(count, 'result')})" for version, count in versions.items())
    return (
        f"{marked} marks methods with results from another code version than the current one, {code}. Versions: {made}."
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    named = ([as_cell(name), *cells] for name, *cells in rows)
    lines = [heading, ["---"] * len(heading), *named]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ordinal(rank: int) -> str:
    names = {1: "first", 2: "second", 3: "third"}
    return names.get(rank, f"number {rank}")
