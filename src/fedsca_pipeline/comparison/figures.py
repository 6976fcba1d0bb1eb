"""Still figures that compare up to about 20 methods: traffic, sites, learning curves, ranks and similarity.

Made with matplotlib, without pyplot's global state. ``statistics``, ``results`` and ``tables`` describe the frames
``scores``, ``curves`` and ``table``. ``labels`` maps methods to the names to show; default: the method's name. Without
data a figure shows a note instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from scipy import stats

from fedsca_pipeline.comparison.statistics import image_means, pareto_front
from fedsca_pipeline.errors import counted
from fedsca_pipeline.evaluation.figures import ABSENT, COLOURS, GRID, INK, note

_FRONT, _OTHER = COLOURS[0], "#8A8A8A"
_STYLES = ("-", "--", ":", "-.")
_SIMILARITY_SCALE = ((0.0, "#D55E00"), (0.5, "#FFFFFF"), (1.0, "#0072B2"))
_LEVEL = 0.05
_LEAST = 3
_PANELS_A_ROW = 4
# Offsets of a label from its point, in label heights: beside it first, then farther and farther up and down.
_RISES = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8, 10, -10, 12, -12)


def dice_against_bytes(table: pd.DataFrame) -> Figure:
    """Draw mean Dice against bytes per site and round (up + down), with the Pareto front as a step line.

    A logarithmic axis has no zero: methods that send nothing are in a grey band at the left. Bars are the 95 %
    intervals of Dice. Methods with unknown bytes are left out.

    Args:
        table: from ``tables.method_table``; uses ``label``, ``bytes`` (>= 0), ``dice``, ``dice_low``, ``dice_high``.
    """
    table = table.dropna(subset=["bytes", "dice"]).sort_values("dice", ascending=False)
    if table.empty:
        return note("No method with known bytes")
    figure = Figure(figsize=(10, 6.4))
    axes = figure.add_axes((0.085, 0.105, 0.895, 0.81))
    sent, dice = table["bytes"].to_numpy(dtype=float), table["dice"].to_numpy(dtype=float)
    positions = _log_positions(sent)
    front = pareto_front(sent, dice)
    # If a value lies outside its interval, the bar has no arm on that side.
    bars = np.clip([dice - table["dice_low"], table["dice_high"] - dice], 0, None)
    colours = [_FRONT if on_front else _OTHER for on_front in front]
    axes.errorbar(positions, dice, yerr=bars, fmt="none", ecolor=_OTHER, elinewidth=1, alpha=0.45, zorder=1)
    axes.scatter(positions, dice, c=colours, s=34, zorder=3)
    _style_bytes(axes, sent, positions)
    steps = _draw_front(axes, positions[front], dice[front])
    axes.set_title(
        "Dice against traffic · line: Pareto front · bars: 95 % interval", fontsize=11, color=INK, loc="left"
    )
    _label_points(axes, np.column_stack([positions, dice]), [_plain(label) for label in table["label"]], steps)
    return figure


def site_boxes(scores: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw one panel per site with a box per method: the images' Dice, averaged over seeds.

    Methods are sorted by their mean over sites, the highest on top. Boxes span the quartiles, with the median as a line
    and the mean as a dot; whiskers reach to the last image within 1.5 interquartile ranges, images beyond are dots. A
    method without images at a site has an empty row there.

    Raises:
        ValueError: as in ``statistics.bootstrap``, or two methods have the same label.
    """
    if scores.empty:
        return note("No score")
    dice = image_means(scores)
    order = dice.groupby(level="site").mean().mean().sort_values(kind="stable").index
    names = _names(order, labels)
    sites = dice.index.unique("site")
    down = math.ceil(len(sites) / _PANELS_A_ROW)
    across = math.ceil(len(sites) / down)
    figure = Figure(figsize=(2.0 + 2.7 * across, down * (1.1 + 0.27 * len(order))), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(sites) :]:
        axes.set_axis_off()
    for axes, site in zip(grid.flat, sites, strict=False):
        at_site = dice.xs(site, level="site")
        _draw_boxes(axes, [at_site[method].dropna().to_numpy() for method in order])
        axes.set_title(f"{_plain(site)} · {counted(len(at_site), 'image')}", fontsize=10, color=INK)
        # The panel below may be empty, so each panel has its own tick labels.
        axes.tick_params(labelbottom=True)
    grid[0, 0].set_yticks(range(len(order)), names, fontsize=9)
    figure.supxlabel(
        "Dice of an image, mean over seeds · box: quartiles, line: median, dot: mean", fontsize=9, color=INK
    )
    return figure


def learning_curves(
    curves: pd.DataFrame, highlight: Sequence[str] = (), labels: Mapping[str, str] | None = None
) -> Figure:
    """Draw validation Dice by round: the mean over seeds as a line, the lowest to the highest seed as a band.

    The axis starts at the lowest value of a trained round: the step from the untrained foundation would take most of
    the height, and methods differ above it. A line has only the rounds that all seeds of its method have: with other
    rounds the mean would jump when a seed joins or leaves.

    Args:
        curves: one row per ``method``, ``seed`` and ``round`` (0 = the foundation) with ``dice_validation``.
        highlight: methods in colour, named in the legend; the others are thin and grey. Unknown names are ignored.
            Empty: highlight all. With more than six highlighted methods there are no bands: they would hide the lines.
        labels: see above.

    Raises:
        ValueError: two methods have the same label.
    """
    curves = curves.dropna(subset=["dice_validation"])
    if curves.empty:
        return note("No validation Dice")
    lines = {method: _seed_range(rows) for method, rows in curves.groupby("method")}
    ranked = sorted(lines, key=lambda method: (-_last(lines[method]), method))
    names = dict(zip(ranked, _names(ranked, labels), strict=True))
    shown = [method for method in ranked if not highlight or method in highlight]
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots()
    for method in (method for method in ranked if method not in shown):
        axes.plot(lines[method]["mean"], color=_OTHER, linewidth=0.9, alpha=0.55, zorder=1)
    bands = len(shown) <= len(COLOURS)
    for method, (style, colour) in zip(shown, cycle(product(_STYLES, COLOURS)), strict=False):
        line = lines[method]
        if bands:
            axes.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.15, linewidth=0, zorder=2)
        axes.plot(line["mean"], color=colour, linestyle=style, linewidth=1.8, zorder=3, label=names[method])
    handles = axes.get_legend_handles_labels()[0]
    if rest := len(ranked) - len(shown):
        handles.append(Line2D([], [], color=_OTHER, linewidth=0.9, alpha=0.55, label=f"other methods ({rest})"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False, title="best last round first")
    _style(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round (0 = foundation)", ylabel="validation Dice, mean over sites")
    _leave_out_the_climb(axes, lines.values())
    band = " · band: lowest to highest seed" if bands else ""
    axes.set_title(f"Learning curves · line: mean over seeds{band}", fontsize=11, color=INK, loc="left")
    return figure


def critical_difference(scores: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw Demšar's critical-difference diagram (JMLR 2006): mean ranks, and bars that join similar methods.

    A bar joins methods that Nemenyi's test does not separate. Blocks are the images that all methods have, Dice
    averaged over seeds; rank 1 is the highest Dice, ties share their mean rank. The title has the p of Friedman's test,
    without which the bars mean little. As in ``statistics.paired_tests``, large sites weigh more, and the diagram says
    nothing about another training.

    Returns:
        The diagram; a note if there are fewer than three methods or three such images.

    Raises:
        ValueError: as in ``statistics.bootstrap``, or two methods have the same label.
    """
    if scores.empty:
        return note("No score")
    blocks = image_means(scores).dropna()
    methods, images = blocks.shape[1], len(blocks)
    if methods < _LEAST or images < _LEAST:
        return note(f"Ranks need {_LEAST} methods and {_LEAST} images in common: there are {methods} and {images}")
    # Rounding errors of the means over seeds must not break ties.
    blocks = blocks.round(12).set_axis(_names(blocks.columns, labels), axis=1)
    ranks = blocks.rank(axis=1, ascending=False).mean()
    unequal = (blocks.max(axis=1) > blocks.min(axis=1)).any()
    p = float(stats.friedmanchisquare(*blocks.to_numpy().T).pvalue) if unequal else 1.0
    critical = stats.studentized_range.ppf(1 - _LEVEL, methods, np.inf) * math.sqrt(
        methods * (methods + 1) / (12 * images)
    )
    figure = Figure(figsize=(10, 2.2 + 0.26 * methods), layout="constrained")
    axes = figure.subplots()
    _draw_ranks(axes, ranks, blocks)
    verdict = f"Friedman's test finds {'a' if p < _LEVEL else 'no'} difference ({_p(p)})"
    bars = f"bars join methods that Nemenyi's test does not part at {_LEVEL} (critical difference {critical:.2f})"
    title = f"Mean rank by Dice over {counted(images, 'image')}, 1 is best · {verdict}\n{bars}"
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def similarity_matrix(table: pd.DataFrame, title: str = "Similarity of the sites' updates") -> Figure:
    """Draw the similarity of sites as an annotated heat map.

    Args:
        table: sites x sites, in -1..1, in the order to draw; missing values are grey and not annotated.
        title: plain text above the map.
    """
    if table.empty:
        return note("No similarity between sites")
    values = table.to_numpy(dtype=float)
    rows, columns = values.shape
    figure = Figure(figsize=(2.8 + 0.62 * columns, 2.0 + 0.56 * rows), layout="constrained")
    axes = figure.subplots()
    scale = LinearSegmentedColormap.from_list("similarity", _SIMILARITY_SCALE).with_extremes(bad=ABSENT)
    image = axes.imshow(values, cmap=scale, vmin=-1, vmax=1)
    axes.set_xticks(
        range(columns), [_plain(site) for site in table.columns], rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(rows), [_plain(site) for site in table.index])
    axes.tick_params(labelsize=9)
    axes.set_title(_plain(title), fontsize=11, color=INK)
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            ink = "white" if abs(value) > 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return figure


def _plain(text: object) -> str:
    """Return the text with dollar signs escaped: matplotlib reads them as formulas."""
    return str(text).replace("$", r"\$")


def _names(methods: Sequence[str] | pd.Index, labels: Mapping[str, str] | None) -> list[str]:
    names = [_plain((labels or {}).get(method, method)) for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"two methods have the same label: {', '.join(sorted(names))}")
    return names


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _style(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _log_positions(sent: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x positions: the bytes, and for zero bytes a position to the left of all others."""
    least = sent[sent > 0].min(initial=np.inf)
    return np.where(sent > 0, sent, least / 6 if np.isfinite(least) else 1.0)


def _style_bytes(axes: Axes, sent: NDArray[np.float64], positions: NDArray[np.float64]) -> None:
    """Style the logarithmic axis in bytes, with a grey band for methods that send nothing, if any."""
    _style(axes)
    axes.set_xscale("log")
    axes.margins(y=0.09)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    limits = (positions.min() / 3, positions.max() * 5)
    axes.set_xlim(limits)
    axes.set(xlabel="bytes per site and round, up + down (logarithmic)", ylabel="test Dice, mean over sites")
    if (sent == 0).any():
        position = positions.min()
        edge = position * 2.4
        axes.axvspan(limits[0], edge, color=ABSENT, alpha=0.55, linewidth=0, zorder=0)
        name: dict[str, Any] = {"ha": "center", "fontsize": 8.5, "color": INK, "transform": axes.get_xaxis_transform()}
        axes.text(position, 0.012, "sends nothing", **name)
        # The axis has no meaning inside the band.
        axes.set_xticks([tick for tick in axes.get_xticks() if tick > edge])
        axes.set_xticks([tick for tick in axes.get_xticks(minor=True) if tick > edge], minor=True)
        axes.set_xlim(limits)


def _draw_front(axes: Axes, positions: NDArray[np.float64], dice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw the Pareto front as steps; return their corners [corners, 2]."""
    order = np.argsort(positions, kind="stable")
    # More bytes never lower the reachable Dice: each step stays level up to the next method.
    x, y = np.append(positions[order], axes.get_xlim()[1]), dice[order]
    corners = np.column_stack([np.repeat(x, 2)[1:-1], np.repeat(y, 2)])
    axes.plot(*corners.T, color=_FRONT, linewidth=1.2, alpha=0.75, zorder=2)
    return corners


def _label_points(axes: Axes, points: NDArray[np.float64], names: Sequence[str], steps: NDArray[np.float64]) -> None:
    """Write each point's name [points, 2] where it covers no other name, no point and no step of the front.

    A line ties a name to its point if they are not side by side. If no position is free, names overlap.
    """
    renderer = FigureCanvasAgg(axes.get_figure(root=True)).get_renderer()
    pixel = axes.figure.dpi / 72
    positions, corners = axes.transData.transform(points), axes.transData.transform(steps)
    frame = axes.get_window_extent(renderer)
    taken = [Bbox.from_extents(*(position - 4 * pixel), *(position + 4 * pixel)) for position in positions]
    taken += [Bbox([np.minimum(*ends) - pixel, np.maximum(*ends) + pixel]) for ends in pairwise(corners)]
    for name, position, point in zip(names, positions, points, strict=True):
        label = axes.annotate(
            name, tuple(point), (0, 0), textcoords="offset points", va="bottom", fontsize=8.5, color=INK, zorder=4
        )
        size = label.get_window_extent(renderer)
        boxes = _candidates(position, size.width, size.height, pixel)
        free = [box for box in boxes if _inside(box, frame) and not box.count_overlaps(taken)]
        box = (free or boxes)[0]
        taken.append(box)
        _move(axes, label, position, box, pixel)


def _candidates(position: NDArray[np.float64], width: float, height: float, pixel: float) -> list[Bbox]:
    """Return possible boxes for a name of this size, in pixels, around a point; the nearest first."""
    gap = 7 * pixel
    starts = {"right": position[0] + gap, "left": position[0] - gap - width, "centre": position[0] - width / 2}
    boxes = []
    for rise in _RISES:
        bottom = position[1] - height / 2 + rise * 1.12 * height
        boxes += [Bbox.from_bounds(start, bottom, width, height) for start in starts.values()]
    return boxes


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def _move(axes: Axes, label: Annotation, position: NDArray[np.float64], box: Bbox, pixel: float) -> None:
    """Move a name into its box; draw a line to its point if the box is not beside it."""
    label.set_position(((box.x0 - position[0]) / pixel, (box.y0 - position[1]) / pixel))
    nearest = np.clip(position, (box.x0, box.y0), (box.x1, box.y1))
    if np.hypot(*(nearest - position)) > 9 * pixel:
        end = ((nearest[0] - position[0]) / pixel, (nearest[1] - position[1]) / pixel)
        axes.annotate(
            "", label.xy, end, textcoords="offset points", arrowprops={"arrowstyle": "-", "color": _OTHER, "lw": 0.6}
        )


def _draw_boxes(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    line = {"color": INK, "linewidth": 0.9}
    boxes = axes.boxplot(
        values,
        positions=range(len(values)),
        orientation="horizontal",
        widths=0.62,
        patch_artist=True,
        showmeans=True,
        manage_ticks=False,
        boxprops={"facecolor": COLOURS[5], "edgecolor": INK, "linewidth": 0.7},
        medianprops={**line, "linewidth": 1.5},
        whiskerprops=line,
        capprops=line,
        meanprops={"marker": "o", "markersize": 3, "markerfacecolor": INK, "markeredgecolor": "none"},
        flierprops={"marker": ".", "markersize": 4.5, "markerfacecolor": _OTHER, "markeredgecolor": "none"},
    )
    for box in boxes["boxes"]:
        box.set_alpha(0.75)
    _style(axes)
    axes.set_ylim(-0.7, len(values) - 0.3)


def _seed_range(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean, lowest and highest of the seeds by round, for the rounds that all seeds have."""
    table = rows.groupby("round")["dice_validation"].agg(["mean", "min", "max", "size"])
    return table[table["size"] == rows["seed"].nunique()]


def _leave_out_the_climb(axes: Axes, lines: Iterable[pd.DataFrame]) -> None:
    trained = pd.concat([line[line.index > 0] for line in lines])
    if trained.empty:
        return
    lowest, highest = trained["min"].min(), trained["max"].max()
    margin = 0.05 * (highest - lowest) or 0.01
    axes.set_ylim(lowest - margin, highest + margin)


def _last(line: pd.DataFrame) -> float:
    return float(line["mean"].iloc[-1]) if len(line) else -math.inf


def _draw_ranks(axes: Axes, ranks: pd.Series, blocks: pd.DataFrame) -> None:
    # This import takes most of a second, and no other figure needs it.
    import scikit_posthocs

    drawn = scikit_posthocs.critical_difference_diagram(
        ranks,
        scikit_posthocs.posthoc_nemenyi_friedman(blocks),
        alpha=_LEVEL,
        ax=axes,
        label_fmt_left="{label}  {rank:.2f} ",
        label_fmt_right=" {rank:.2f}  {label}",
        label_props={"fontsize": 9},
        marker_props={"s": 16},
        elbow_props={"color": _OTHER, "linewidth": 0.8},
        crossbar_props={"color": _FRONT, "linewidth": 2.4},
        text_h_margin=0.03 * len(ranks),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for label in drawn["labels"]:
        label.set_color(INK)
