"""Print results on the terminal: final table, comparison and data report, with the next commands.

This module does not import pandas: a command that finds everything up to date does not need it otherwise.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fedsca_pipeline.errors import counted
from fedsca_pipeline.evaluation import CLASS_DICE, MEAN

FinalTable = Mapping[str, Mapping[str, Any]]
"""``{site: {column: value}}``, the mean over sites last; a missing value is None."""


def show_result(table: FinalTable, mlflow: Mapping[str, str], volumes: FinalTable | None = None) -> None:
    """Print the final table, the table of volumes if there are any, the MLflow run and the next commands."""
    console = Console()
    console.print(render_final_table(table))
    if by_class := render_class_table(table):
        console.print(by_class)
    if volumes:
        console.print(render_volume_table(volumes))
    _show_next(console, mlflow, "kedro viz")


def _show_next(console: Console, mlflow: Mapping[str, str], *commands: str) -> None:
    """Print the MLflow run, the next commands, and how to see the run's experiment, if there is a run."""
    if mlflow["run_id"]:
        console.print(f"MLflow run: {mlflow['run_id']}", highlight=False)
        # MLflow's own start page is for traces, of which there are none. A run of an earlier version has no experiment.
        experiment = f"/{mlflow['experiment_id']}/runs" if mlflow.get("experiment_id") else ""
        page = f"/#/experiments{experiment}?workflowType=machine_learning"
        if (uri := mlflow["uri"]).startswith(("http://", "https://")):
            commands += (f"open {uri.rstrip('/')}{page}",)
        else:
            commands += (f"mlflow ui --backend-store-uri {shlex.quote(uri)}", f"then open http://127.0.0.1:5000{page}")
    for number, command in enumerate(commands):
        console.print(f"{'      ' if number else 'Next: '}{command}", highlight=False, soft_wrap=True, markup=False)


def render_final_table(table: FinalTable) -> Table:
    """Return ``evaluation.tables.final_table`` for a terminal of 80 columns.

    Three decimals, readable byte sizes, a separate row for the mean, a dash for missing values. The caption names the
    site with the lowest chosen Dice, and the privacy spent. Without sites only the headings remain.
    """
    return _by_site("Test results per site", table, _COLUMNS, _caption(table))


def render_class_table(table: FinalTable) -> Table | None:
    """Return a table of the chosen models' Dice per class, over the sites that have it; None if there is one class."""
    prefix = CLASS_DICE.format("")
    columns = [column for column in next(iter(table.values()), {}) if column.startswith(prefix)]
    if not columns:
        return None
    view = _view("Dice of the chosen models per class")
    view.add_column("class", no_wrap=True)
    for heading in ("sites", "mean", "lowest"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("at", no_wrap=True)
    sites = [site for site in table if site != MEAN]
    for column in columns:
        known = {site: table[site][column] for site in sites if table[site][column] is not None}
        lowest = min(known, key=known.__getitem__, default="")
        view.add_row(
            column.removeprefix(prefix),
            f"{len(known)} of {len(sites)}",
            *("–" if value is None else f"{value:.3f}" for value in (table[MEAN][column], known.get(lowest))),
            lowest,
        )
    return view


def render_volume_table(table: FinalTable) -> Table:
    """Return ``evaluation.volume_tables.final_volume_table`` for the terminal; a dash for missing values."""
    caption = "Slices: an empty prediction for an empty mask has Dice 1."
    return _by_site("Chosen models by volume, on the volumes' own grids", table, _VOLUME_COLUMNS, caption)


Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Heading and format of each column of a final table."""

_VOLUME_COLUMNS: Columns = {
    "volume Dice": ("Dice", "{:.3f}".format),
    "volume HD95 mm": ("HD95\n(mm)", "{:.1f}".format),
    "volume ASD mm": ("ASD\n(mm)", "{:.2f}".format),
    "volume NSD": ("NSD", "{:.3f}".format),
    "volumes": ("volumes", str),
}
_COLUMNS: Columns = {
    "Dice before": ("Dice\nbefore", "{:.3f}".format),
    "Dice after": ("Dice\nafter", "{:.3f}".format),
    "Dice chosen": ("Dice\nchosen", "{:.3f}".format),
    "HD95": ("HD95\n(px)", "{:.1f}".format),
    "bytes up": ("bytes\nup", decimal),
    "bytes down": ("bytes\ndown", decimal),
    "best round": ("best\nround", str),
}


def _view(title: str, caption: str | None = None) -> Table:
    # Without vertical rules the table fits 80 columns.
    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        show_edge=False,
    )


def _by_site(
    title: str,
    table: FinalTable,
    columns: Columns,
    caption: str | None = None,
) -> Table:
    view = _view(title, caption)
    view.add_column("site", no_wrap=True)
    for heading, _ in columns.values():
        view.add_column(heading, justify="right", no_wrap=True)
    for site, row in table.items():
        if site == MEAN:
            view.add_section()
        cells = ("–" if row[key] is None else shown(row[key]) for key, (_, shown) in columns.items())
        view.add_row(site, *cells, style="bold" if site == MEAN else "")
    return view


def _caption(table: FinalTable) -> str | None:
    chosen = {site: row["Dice chosen"] for site, row in table.items() if site != MEAN}
    known = {site: dice for site, dice in chosen.items() if dice is not None}
    lines = _epsilon_by_level(table)
    if len(chosen) > 1 and known:
        worst = min(known, key=known.__getitem__)
        lines.insert(0, f"Lowest chosen Dice: {worst} ({known[worst]:.3f}). Sizes are serialised bytes, all rounds.")
    return "\n".join(lines) or None


def _epsilon_by_level(table: FinalTable) -> list[str]:
    """Return one line per level of differential privacy: the epsilon that its sites have spent."""
    spent: dict[str, list[str]] = {}
    for site, row in table.items():
        if row.get("privacy"):
            spent.setdefault(row["privacy"], []).append(f"{site} {row['epsilon']:.2f}")
    return [f"Epsilon spent, {level}: {', '.join(sites)}." for level, sites in sorted(spent.items())]


def show_comparison(table: Sequence[Mapping[str, Any]], page: str, mlflow: Mapping[str, str]) -> None:
    """Print the methods in the table's order, the page's path, the MLflow run and the next command."""
    console = Console()
    view = Table(title="Methods compared", title_justify="left", box=box.SIMPLE, pad_edge=False)
    view.add_column("method", no_wrap=True)
    for heading in ("training\nimages", "mean\nDice", "worst\nsite", "HD95\n(px)", "sent per site\nand round"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in table:
        count = row["train_images"]
        view.add_row(
            str(row["label"]),
            "all" if count is None or count != count else f"{count:.0f}",
            *(f"{row[key]:.3f}" for key in ("dice", "worst_dice")),
            f"{row['hd95']:.1f}",
            "–" if math.isnan(row["bytes"]) else decimal(round(row["bytes"])),
        )
    console.print(view)
    console.print(f"With intervals, tests and figures: {page}", highlight=False, soft_wrap=True)
    _show_next(console, mlflow)


def show_forgotten(
    site: str, deleted: Sequence[str], runs: int, raw: Sequence[str], out_of_reach: Sequence[str]
) -> None:
    """Print what was deleted of a site, file by file, its raw data that are still there, and what is out of reach."""
    console = Console()

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{site}: deleted {counted(len(deleted), 'path')} and {counted(runs, 'MLflow run')}")
    for path in deleted:
        line(f"  {path}")
    if raw:
        line(f"Still there: {', '.join(raw)} (--params=site={site},delete_raw=true deletes raw data, too)")
    line("Out of reach:")
    for what in (
        "models of other sites and the general model, trained with its updates: train anew without it",
        *out_of_reach,
        "other data roots, the DVC cache and its remotes, git, backups and copies",
        "in a deployed federation, the hospital's own work folder and audit log, and the SuperLink's database",
    ):
        line(f"  {what}")


def show_data_report(sites: Mapping[str, Mapping[str, Any]], page: str) -> None:
    """Print one row per site (``data_report.across.across_sites``), the refusals, the alerts and the page's path."""
    console = Console()
    view = Table(
        title="Sites", title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False, collapse_padding=True
    )
    view.add_column("site", overflow="fold")
    for heading in ("trains", "images", "broken", "sub-\njects", "train/\nval/test", "near\ncopies", "warn-\nings"):
        view.add_column(heading, justify="right", no_wrap=True)
    for site, row in sites.items():
        counts = row["counts"]
        view.add_row(
            site,
            "[bold red]no[/]" if row["refusals"] else "yes",
            str(counts["used"]),
            f"[red]{counts['broken']}[/]" if counts["broken"] else "0",
            str(counts["subjects"]),
            "/".join(str(counts[split]) for split in ("train", "validation", "test")),
            str(row["near_duplicates"]),
            str(row["warnings"]),
        )
    console.print(view)
    for site, row in sites.items():
        for text in (*row["refusals"], *row["alerts"]):
            console.print(f"{site}: {text}", markup=False, highlight=False)
    console.print(f"Data report: {page}", highlight=False, soft_wrap=True, markup=False)
