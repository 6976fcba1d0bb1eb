"""The page of a comparison, as Markdown: tables, what they allow to be said, and how the reference behaved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsca_pipeline.comparison.statistics import ALL_SITES
from fedsca_pipeline.comparison.tables import render_markdown
from fedsca_pipeline.config import ComparisonConfig

if TYPE_CHECKING:
    from fedsca_pipeline.comparison.behaviour import Behaviour
    from fedsca_pipeline.comparison.plan import Method, Setting

FIGURES = "results_figures"
"""Folder beside the page that its pictures are in."""

# Strategies that are no federation: nothing is learned from others, or everything is given away.
_NOT_FEDERATED = frozenset({"local", "local_full", "centralised"})
_LEVEL = 0.05


@dataclass(frozen=True)
class Section:
    """The comparison with one number of training images a site, None for all: tables, and the figures' folder.

    ``fedavg_fp32``: bytes a site and round, both ways, of fedavg without rounding; None where it was not run.
    ``by_class``: Dice by method and class, as ``report.class_means`` has it; nothing to show of one class.
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
        return "All training images" if count is None else f"{_number(count, 'training image')} a site"


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
    """Return the page. Every number on it comes from the arguments; what is empty is left out.

    ``versions``: of ``describe_versions``.
    """
    config = setting.config
    parts = [
        "# Methods compared",
        "Written by `kedro run --pipeline=comparison`; edits are lost. What the columns mean, and what the tests can "
        "say, is in docs/comparison.md.",
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
    sites = len(setting.sites)
    return (
        f"{_number(sites, 'site')} train ({', '.join(setting.sites)}), {federation['rounds']} rounds of {work} of "
        f"{training['batch_size']} images, foundation {base['foundation']['name']} at "
        f"{base['preprocessing']['image_size']} px, {_number(len(seeds), 'seed')}, which decide the order of images, "
        f"the adapters' start and which images train. Each site's model is the one its validation images chose; test "
        f"images choose nothing. **{_number(sites, 'site')} allow no claim about a new hospital**: intervals and tests "
        f"are about these images at these sites."
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
    return "Dice by class, mean over the sites that have it:\n\n" + _table(["Method", *table.columns], rows)


def _verdict(section: Section, reference: str, methods: Mapping[str, Method]) -> str:
    """Say where the reference stands, in words that follow from the numbers."""
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
        place, best = list(ranked.index).index(reference) + 1, ranked.index[0]
        own = ranked[reference]
        text = f"By {what} **{reference}** is {_ordinal(place)} of {len(ranked)} {kind} ({own:.3f}"
        if place > 1:
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
    # Not even a comparison holds of bytes that are unknown.
    if "fedavg" in table.index and reference != "fedavg" and sent["fedavg"] > 0 and sent[reference] >= 0:
        text = f"It sends {_share(sent[reference] / sent['fedavg'])} of the bytes of fedavg in the same type"
        if section.fedavg_fp32:
            text += f", and {_share(sent[reference] / section.fedavg_fp32)} of those of fedavg in fp32"
        lines.append(f"{text}.")
    return " ".join(lines)


def _ahead(federated: pd.DataFrame, reference: str) -> list[str]:
    """Say which federated methods have the higher mean Dice, and at what cost in bytes. Nothing where none has."""
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
    """Say how many times its own bytes another sends; nothing where either is unknown, or its own are none."""
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
    # One site has nothing to be similar to.
    if len(behaviour.similarity) < 2 or behaviour.self_weight.empty:
        return ""
    matrix = behaviour.similarity.to_numpy(copy=True)
    others = [matrix[i, j] for i in range(len(matrix)) for j in range(len(matrix)) if i != j]
    own = behaviour.self_weight
    norms = behaviour.update_norm.mean(axis=1)
    last = own.index.max()
    lines = [
        f"How {reference} behaved (means over seeds): the cosines between sites' updates are "
        f"{sum(others) / len(others):.3f} on average ({min(others):.3f} to {max(others):.3f}), so a site keeps "
        f"{own.iloc[0]:.2f} of its own weights in round {own.index.min()} and {own[last]:.2f} in round {last}; local "
        f"models lie {behaviour.spread.mean():.2f} updates from their mean. Mean update norms: "
        + ", ".join(f"{site} {norm:.2f}" for site, norm in norms.items())
        + ".",
        f"![Similarity of sites]({picture}/similarity.png)",
    ]
    return "\n\n".join(lines)


def _ablations(tables: Mapping[str, pd.DataFrame], config: ComparisonConfig) -> str:
    if not tables:
        return ""
    count = config.train_images[0]
    size = "all training images" if count is None else f"{_number(count, 'training image')} a site"
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
        "Dice on a fixed half of the site, the same images in every column. *As it is*: the federation's own model, "
        "where it has a decoder. *Ensemble*: mean probability of all sites' models, which they would have to give "
        f"away. *k images*: {setting.config.shot_steps} local steps on k labelled images of the other half, from the "
        "federation's mean, of what a strategy keeps private (of all it trains, where that is nothing).",
    ]
    # Not every method has the same first number of images, and with leave_one_out there are several.
    sizes = unseen.groupby("site")["train_images"].nunique(dropna=False)
    for (site, count), rows in unseen.groupby(["site", "train_images"], dropna=False):
        order = sorted(set(rows["received"]), key=_received_order)
        lines = []
        for method, found in rows.groupby("method", sort=False):
            cells = found.set_index("received")
            lines.append([method, *(_interval(cells.loc[name]) if name in cells.index else "–" for name in order)])
        lines.sort(key=lambda line: (line[-1] != "–", line[-1]), reverse=True)
        images = int(rows["images"].max())
        title = f"### {site} ({_number(images, 'test image')})"
        if sizes[site] > 1:
            title += ", trained on " + ("all images" if pd.isna(count) else f"{_number(int(count), 'image')} a site")
        parts.append(title + "\n\n" + _table(["Method", *order], lines))
    return "\n\n".join(parts)


def _received_order(received: str) -> tuple[int, str]:
    """Words first, then numbers of images."""
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
            "The grid chooses the learning rate, and nothing else: on the first seed, by validation Dice. Ablations "
            "have that of the method that they vary.\n\n" + _table(["Method", "Offered", "Chosen"], rows)
        )
    if beforehand:
        parts.append("Chosen before, by hand:\n\n" + "\n".join(beforehand))
    return "\n\n".join(["## What was tuned", *parts]) if parts else ""


def _options(methods: Mapping[str, Method]) -> str:
    """List what methods of the main table have that is not their strategy's default."""
    rows = [
        (name, ", ".join(f"{key}: {value}" for key, value in options.items()))
        for name, method in methods.items()
        if method.ablation is None and (options := method.options.model_dump(exclude_defaults=True))
    ]
    if not rows:
        return ""
    return "## Options that are not the defaults\n\n" + _table(["Method", "Options"], rows)


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return "## Missing\n\nThese have no result, and the tables are without them:\n\n" + "\n".join(
        f"- {name}" for name in missing
    )


def describe_versions(versions: Mapping[str, int], marked: str, code: str) -> str:
    """Say which ``versions`` of the code have made how many results, ``code`` being the present one."""
    if versions.keys() <= {code}:
        return f"Code version {code}."
    made = ", ".join(f"{version} ({_number(count, 'result')})" for version, count in versions.items())
    return (
        f"{marked} marks methods with results of another version of the code than the present one, {code}. "
        f"Versions: {made}."
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _ordinal(place: int) -> str:
    names = {1: "first", 2: "second", 3: "third"}
    return names.get(place, f"number {place}")
