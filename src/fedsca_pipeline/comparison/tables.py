"""From the scores and costs of several methods to one table, as a frame, as Markdown and as a page."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from fedsca_pipeline.comparison.statistics import STATISTICS, bootstrap, mean_interval

COSTS = ("bytes", "bytes_to_95", "seconds", "peak_memory")
TABLE_COLUMNS = (
    "method",
    "label",
    *(column for name in (*STATISTICS, *COSTS) for column in (name, f"{name}_low", f"{name}_high")),
    "sites",
    "images",
    "seeds",
)
NOTHING = "No method was scored."
_UNKNOWN = "–"
_CAPTION = (
    "Mean with 95 % bootstrap interval: Dice and HD95 over images and seeds, costs over seeds; no interval where there "
    "is one seed or no spread. Bold: best value as shown, which says nothing of significance."
)


def method_table(
    scores: pd.DataFrame, costs: pd.DataFrame, labels: Mapping[str, str], draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per method that was scored, best mean Dice first (at a tie by name).

    Args:
        scores: one row per method, seed, site and image, as for ``statistics.bootstrap``.
        costs: one row per method and seed: ``bytes_up`` and ``bytes_down`` (serialised, mean over sites and rounds),
            ``bytes_to_95`` (all sites, both ways, until 95 % of the method's best validation Dice), ``seconds`` (CPU),
            ``peak_memory`` (bytes). A method without a row, or with a missing value at some seed, has that cost
            missing; methods that were not scored are left out.
        labels: names to show, by method; a method that is not named shows its own.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Columns ``TABLE_COLUMNS``: ``method``, ``label``; value, ``_low`` and ``_high`` of each of ``STATISTICS`` and of
        ``COSTS``, where ``bytes`` is up and down together; counts of ``sites``, ``images`` (over all sites) and
        ``seeds``, which tell whether two rows may be compared at all. No score: no row.

    Raises:
        ValueError: as for ``statistics.bootstrap``.
    """
    table = bootstrap(scores, draws=draws, seed=seed).set_index("method")
    table["label"] = [labels.get(method, method) for method in table.index]
    costs = costs.assign(bytes=costs["bytes_up"] + costs["bytes_down"])
    for name in COSTS:
        by_method = {method: values.to_numpy() for method, values in costs.groupby("method")[name]}
        intervals = [mean_interval(by_method.get(method, ()), draws, seed) for method in table.index]
        table[[name, f"{name}_low", f"{name}_high"]] = pd.DataFrame(intervals, index=table.index, columns=range(3))
    groups = scores.groupby("method")
    table["sites"], table["seeds"] = groups["site"].nunique(), groups["seed"].nunique()
    table["images"] = scores.drop_duplicates(["method", "site", "image"]).groupby("method").size()
    ordered = table.reset_index().sort_values(["dice", "method"], ascending=[False, True], ignore_index=True)
    return ordered[list(TABLE_COLUMNS)]


def render_markdown(table: pd.DataFrame) -> str:
    """The table as GitHub's Markdown, with a line below that says what the numbers are.

    Args:
        table: of ``method_table``.

    Returns:
        Text that ends with a newline; labels are escaped. No row: ``NOTHING``.
    """
    if table.empty:
        return f"{NOTHING}\n"
    lines = [
        ["Method", *(column.title for column in _COLUMNS), "Scored on"],
        ["---", *("---:" for _ in _COLUMNS), "---"],
    ]
    for label, cells, basis in _rows(table):
        shown = [f"**{cell.value}**{cell.rest}" if cell.best else cell.value + cell.rest for cell in cells]
        lines.append([_escape_markdown(label), *shown, basis])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_CAPTION}\n"


def render_html(tables: Mapping[str, pd.DataFrame], title: str = "Methods compared", note: str = "") -> str:
    """The tables as a page that needs no other file, for light and dark screens.

    Args:
        tables: heading to a table of ``method_table``, in order.
        title: of the page, plain text.
        note: a last paragraph, plain text.

    Returns:
        The page; everything that comes from the arguments is escaped. No row anywhere: a page that says ``NOTHING``.
    """
    filled = {heading: table for heading, table in tables.items() if not table.empty}
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_CAPTION if filled else NOTHING}</p>",
        *(f"<h2>{html.escape(heading)}</h2>\n<div>{_html_table(table)}</div>" for heading, table in filled.items()),
    ]
    if note:
        parts.append(f"<p>{html.escape(note)}</p>")
    return _PAGE.format(head=f"<title>{html.escape(title)}</title>", style=_STYLE, body="\n".join(parts))


def _fixed(value: float) -> tuple[float, str, int]:
    """Divisor, unit and decimals of a number that is shown as it is."""
    return 1.0, "", 3


def _pixels(value: float) -> tuple[float, str, int]:
    return 1.0, "", 1 if value >= 10 else 2


def _traffic(value: float) -> tuple[float, str, int]:
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= divisor:
            return divisor, unit, _decimals(value / divisor)
    return 1.0, "B", 0


def _seconds(value: float) -> tuple[float, str, int]:
    return 1.0, "s", _decimals(value)


def _memory(value: float) -> tuple[float, str, int]:
    return 2.0**30, "GiB", 2


def _decimals(value: float) -> int:
    """So many that three digits or more are shown."""
    return 2 if value < 10 else 1 if value < 100 else 0


@dataclass(frozen=True)
class _Column:
    """How one quantity is shown: its title, which end is best, and divisor, unit and decimals for a value."""

    name: str
    title: str
    best: Callable[..., float]
    scale: Callable[[float], tuple[float, str, int]]


@dataclass(frozen=True)
class _Cell:
    """What is shown: the value, the rest (interval, unit), and whether the value is the column's best."""

    value: str
    rest: str
    best: bool


_COLUMNS = (
    _Column("dice", "Dice, mean over sites ↑", max, _fixed),
    _Column("worst_dice", "Dice, worst site ↑", max, _fixed),
    _Column("dice_sd", "Dice, SD over sites ↓", min, _fixed),
    _Column("hd95", "HD95, pixels ↓", min, _pixels),
    _Column("bytes", "Sent per site and round, up + down ↓", min, _traffic),
    _Column("bytes_to_95", "Sent by all sites until 95 % of best Dice ↓", min, _traffic),
    _Column("seconds", "CPU time ↓", min, _seconds),
    _Column("peak_memory", "Peak memory ↓", min, _memory),
)


def _rows(table: pd.DataFrame) -> list[tuple[str, list[_Cell], str]]:
    """Label, cells and what it was scored on, of each method."""
    columns = [_cells(table, column) for column in _COLUMNS]
    return [
        (
            str(row["label"]),
            list(cells),
            ", ".join(_count(row[name], name) for name in ("sites", "images", "seeds")),
        )
        for row, *cells in zip(table.to_dict("records"), *columns, strict=True)
    ]


def _cells(table: pd.DataFrame, column: _Column) -> list[_Cell]:
    """One column's cells. All that look like the best one are best: a reader could not see the difference."""
    texts = [_texts(*row, column) for row in table[[column.name, f"{column.name}_low", f"{column.name}_high"]].values]
    known = table[column.name].dropna()
    best = _shown(column.best(known), column) if len(known) else None
    return [_Cell(shown, rest, (shown, unit) == best) for shown, unit, rest in texts]


def _shown(value: float, column: _Column) -> tuple[str, str]:
    divisor, unit, decimals = column.scale(value)
    return f"{value / divisor:.{decimals}f}", unit


def _texts(value: float, low: float, high: float, column: _Column) -> tuple[str, str, str]:
    """Value, unit, and what follows the value: the interval in the same unit, if there is one, and the unit."""
    if math.isnan(value):
        return _UNKNOWN, "", ""
    shown, unit = _shown(value, column)
    divisor, _, decimals = column.scale(value)
    # A single seed's value is not known exactly, as an interval of no width would claim.
    interval = "" if low == high else f" [{low / divisor:.{decimals}f}, {high / divisor:.{decimals}f}]"
    return shown, unit, f"{interval} {unit}" if unit else interval


def _count(number: int, names: str) -> str:
    return f"{number} {names.removesuffix('s') if number == 1 else names}"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", " ".join(text.split()))


def _html_table(table: pd.DataFrame) -> str:
    titles = ["Method", *(column.title for column in _COLUMNS), "Scored on"]
    header = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in titles)
    lines = []
    for label, cells, basis in _rows(table):
        data = "".join(f"<td>{_html_cell(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{html.escape(label)}</th>{data}<td class="basis">{basis}</td></tr>')
    rows = "\n".join(lines)
    return f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _html_cell(cell: _Cell) -> str:
    value = f"<strong>{cell.value}</strong>" if cell.best else cell.value
    return f"{value}<small>{cell.rest}</small>"


_STYLE = """
:root { color-scheme: light dark; --ink: #222222; --paper: #ffffff; --line: #dddddd; --quiet: #595959; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #17191c; --line: #3a3d42; --quiet: #a8abb0; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
p { max-width: 48rem; color: var(--quiet); }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; min-width: 6rem; }
tr > th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.basis, thead th:last-child { text-align: left; }
small, .basis { color: var(--quiet); }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{head}
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
