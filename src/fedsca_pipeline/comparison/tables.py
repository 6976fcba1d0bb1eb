"""The table of methods, one row per method: as a data frame, as Markdown and as an HTML page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsca_pipeline.comparison.statistics import STATISTICS, bootstrap, mean_interval
from fedsca_pipeline.errors import counted
from fedsca_pipeline.files import as_cell

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
    "Mean with 95 % bootstrap interval: Dice and HD95 over images and seeds, costs over seeds; no interval for a "
    "single seed or without spread. Bold: the best value as printed, which says nothing about significance."
)


def method_table(
    scores: pd.DataFrame, costs: pd.DataFrame, labels: Mapping[str, str], draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return one row per method with scores, the highest mean Dice first (ties: by name).

    Args:
        scores: one row per method, seed, site and image, as for ``statistics.bootstrap``.
        costs: one row per method and seed: ``bytes_up`` and ``bytes_down`` (serialised, mean over sites and rounds),
            ``bytes_to_95`` (all sites, both directions, until 95 % of the method's best validation Dice), ``seconds``
            (CPU), ``peak_memory`` (bytes). If a method has no row, or a seed's value is missing, that cost is missing.
            Methods without scores are left out.
        labels: names to show, by method. Default: the method's name.
        draws: number of bootstrap draws.
        seed: seed of the bootstrap.

    Returns:
        Columns ``TABLE_COLUMNS``: ``method``, ``label``; value, ``_low`` and ``_high`` of each of ``STATISTICS`` and of
        ``COSTS``, where ``bytes`` is the sum of up and down; the numbers of ``sites``, ``images`` (over all sites) and
        ``seeds``: two rows are comparable only if these agree. Without scores the table has no row.

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
    """Return the table as GitHub's Markdown, with a line below that explains the numbers.

    Args:
        table: from ``method_table``.

    Returns:
        Text that ends with a newline; labels are escaped. For a table without rows: ``NOTHING``.
    """
    if table.empty:
        return f"{NOTHING}\n"
    lines = [_TITLES, ["---", *("---:" for _ in _COLUMNS), "---"]]
    for row in _rows(table):
        shown = [f"**{cell.value}**{cell.rest}" if cell.best else cell.value + cell.rest for cell in row.cells]
        lines.append([_escape_markdown(row.label), *shown, row.basis])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_CAPTION}\n"


def render_html(tables: Mapping[str, pd.DataFrame], title: str = "Methods compared", note: str = "") -> str:
    """Return the tables as one self-contained HTML page for light and dark screens.

    Args:
        tables: tables from ``method_table`` by heading, in order.
        title: the page's title, plain text.
        note: a last paragraph, plain text.

    Returns:
        The page; the template escapes all arguments. If no table has a row, the page says ``NOTHING``.
    """
    filled = {heading: _rows(table) for heading, table in tables.items() if not table.empty}
    environment = Environment(
        loader=PackageLoader("fedsca_pipeline.comparison"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("tables.html").render(
        title=title, caption=_CAPTION if filled else NOTHING, columns=_TITLES, tables=filled, note=note
    )


# How each kind of quantity is shown: divisor, unit and number of decimals for a value.


def _fixed(value: float) -> tuple[float, str, int]:
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
    """Return the number of decimals that shows at least three digits."""
    return 2 if value < 10 else 1 if value < 100 else 0


@dataclass(frozen=True)
class _Column:
    """How one quantity is shown: its title, ``best`` (max or min), and ``scale``: divisor, unit and decimals."""

    name: str
    title: str
    best: Callable[..., float]
    scale: Callable[[float], tuple[float, str, int]]


@dataclass(frozen=True)
class _Cell:
    """One cell as text: the value, the rest (interval and unit), and whether the value is the column's best."""

    value: str
    rest: str
    best: bool


@dataclass(frozen=True)
class _Row:
    """One method as text: its label, a cell per column, and the sites, images and seeds it was scored on."""

    label: str
    cells: tuple[_Cell, ...]
    basis: str


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
_TITLES = ["Method", *(column.title for column in _COLUMNS), "Scored on"]


def _rows(table: pd.DataFrame) -> list[_Row]:
    columns = [_cells(table, column) for column in _COLUMNS]
    return [
        _Row(
            str(row["label"]),
            tuple(shown),
            ", ".join(counted(row[f"{noun}s"], noun) for noun in ("site", "image", "seed")),
        )
        for row, *shown in zip(table.to_dict("records"), *columns, strict=True)
    ]


def _cells(table: pd.DataFrame, column: _Column) -> list[_Cell]:
    """Return one column's cells. Every value that prints like the best one is marked as best."""
    numbers = table[[column.name, f"{column.name}_low", f"{column.name}_high"]].to_numpy(dtype=float)
    texts = [_texts(value, low, high, column) for value, low, high in numbers]
    known = table[column.name].dropna()
    best = _shown(column.best(known), column) if len(known) else None
    return [_Cell(shown, rest, (shown, unit) == best) for shown, unit, rest in texts]


def _shown(value: float, column: _Column) -> tuple[str, str]:
    divisor, unit, decimals = column.scale(value)
    return f"{value / divisor:.{decimals}f}", unit


def _texts(value: float, low: float, high: float, column: _Column) -> tuple[str, str, str]:
    """Return the value, its unit, and the text after the value: the interval in the same unit, if any, and the unit."""
    if math.isnan(value):
        return _UNKNOWN, "", ""
    shown, unit = _shown(value, column)
    divisor, _, decimals = column.scale(value)
    # An interval of zero width would claim that a single seed's value is exact.
    interval = "" if low == high else f" [{low / divisor:.{decimals}f}, {high / divisor:.{decimals}f}]"
    return shown, unit, f"{interval} {unit}" if unit else interval


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", as_cell(" ".join(text.split())))
