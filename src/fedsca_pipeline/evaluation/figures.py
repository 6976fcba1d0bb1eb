"""Figures of a run: plotly for interactive ones, matplotlib for still ones, in colours safe for the colour blind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from plotly.subplots import make_subplots

Style = Literal["solid", "dashed", "dotted"]

# Okabe-Ito without yellow, which is hard to see on white, and without black, the colour of text. There is one marker
# more than there are colours, so that a repeated colour has another marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_SITE_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
CLASS_COLOURS = ("#F0E442", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#FFFFFF")
_CLASS_STYLES: tuple[Style, ...] = ("solid", "dashed", "dotted")
_MISSED, _EXTRA = "#D55E00", "#0072B2"
_WEIGHT_SCALE = ((0.0, "#FFFFFF"), (0.5, "#56B4E9"), (1.0, "#003A5C"))
INK, GRID, ABSENT, _MEAN = "#222222", "#DDDDDD", "#E2E2E2", "rgba(34, 34, 34, 0.28)"
_STRIP_LENGTH = 9
# Of a heat map: sites with labels, rounds a slider can tell apart, and numbers in 2 MB of a page.
_MOST_LABELLED, _MOST_FRAMES, _MOST_CELLS = 24, 100, 500_000
_CURVES = ("dice_validation", "dice_local", "loss")
_NO_WEIGHTS = "No aggregation weights: the strategy of this run has none"
_WEIGHTS_NOTE = "row: the site that receives · column: the site it comes from · rows sum to 1 · grey: absent"


def note(text: str) -> Figure:
    """Return a small figure with one line of text, to replace a figure without data."""
    figure = Figure(figsize=(6, 1.2), layout="constrained")
    figure.text(0.5, 0.5, text, ha="center", va="center", color=INK)
    return figure


@dataclass(frozen=True)
class OverlayExample:
    """One image to draw.

    Attributes:
        label: best, median, worst, or only.
        name: the image's name.
        dice: in 0..1, mean over classes.
        image: uint8 [3, H, W], unpadded.
        truth, prediction: bool [K, H, W].
    """

    label: str
    name: str
    dice: float
    image: NDArray[np.uint8]
    truth: NDArray[np.bool_]
    prediction: NDArray[np.bool_]


def choose_examples(table: pd.DataFrame) -> dict[str, str]:
    """Return the best, median and worst image by Dice (mean over classes), ties by name.

    Args:
        table: rows of ``tables.image_table`` of one site and one model.

    Returns:
        Image names by label, in the order ``best``, ``median``, ``worst``. Two images are best and worst, a single one
        is ``only``, no image gives an empty mapping. For an even number the median is the better of the two middle
        images.

    Raises:
        ValueError: the rows are of several sites or models.
    """
    if len(table[["site", "model"]].drop_duplicates()) > 1:
        raise ValueError("examples are chosen among the rows of one site and one model")
    dice = table.groupby("image")["dice"].mean().reset_index()
    ranked = dice.sort_values(["dice", "image"], ascending=[False, True])["image"].tolist()
    few = ((), ("only",), ("best", "worst"))
    if len(ranked) < len(few):
        return dict(zip(few[len(ranked)], ranked, strict=True))
    return {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}


def learning_curves(history: pd.DataFrame) -> go.Figure:
    """Return curves of validation Dice and training loss by round, one colour and marker per site.

    Their mean over sites is a pale band.

    Args:
        history: one row per round and site: ``round`` (0 = the foundation), ``site``, ``dice_validation``, ``loss``
            (mean over the local batches, missing in round 0) and, if logged, ``dice_local`` (right after local
            training, dotted, shown by a button). An absent site has no row or missing values.

    Returns:
        A figure of two panels. An empty history gives empty panels.
    """
    # A column without any value has dtype object.
    history = history.astype({column: "float64" for column in _CURVES if column in history})
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Validation Dice", "Training loss"), horizontal_spacing=0.09)
    sites = sorted(history["site"].unique())
    if len(sites) > 1:
        _add_curve(figure, _mean_dice(history, len(sites)), "dice_validation", "mean over sites", 1, _MEAN_LOOK)
    for site, colour, marker in zip(sites, cycle(COLOURS), cycle(_SITE_MARKERS), strict=False):
        rows = history[history["site"] == site].sort_values("round")
        look = {"line": {"color": colour, "width": 1.8}, "marker": {"color": colour, "symbol": marker, "size": 7}}
        dotted = {"line": {"color": colour, "width": 1.2, "dash": "dot"}, "marker": {**look["marker"], "size": 4}}
        _add_curve(figure, rows, "dice_validation", site, 1, look)
        _add_curve(figure, rows, "loss", site, 2, look, showlegend=False)
        if "dice_local" in rows:
            _add_curve(figure, rows, "dice_local", site, 1, dotted, showlegend=False, visible=False, meta="dice_local")
    last = 0 if history.empty else int(history["round"].max())
    step = max(1, math.ceil(last / 10))
    figure.update_xaxes(
        title="round (0 = foundation)",
        range=[-0.03 * last - 0.2, 1.03 * last + 0.2],
        dtick=step,
        zeroline=False,
        **_AXIS,
    )
    figure.update_yaxes(title="Dice (0 to 1)", range=[_floor(history), 1.02], row=1, col=1, **_AXIS)
    figure.update_yaxes(title="loss", rangemode="tozero", row=1, col=2, **_AXIS)
    figure.update_layout(
        **_LAYOUT,
        title="Learning curves per site",
        height=520,
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "y": -0.18, "x": 0, "yanchor": "top"},
        updatemenus=_local_dice_buttons(figure),
    )
    return figure


def weight_heatmap(weights: Mapping[int, pd.DataFrame]) -> go.Figure:
    """Return a heat map of SGCA's aggregation weights A, sites x sites, with a slider that starts at the last round.

    Args:
        weights: A by round (docs/method.md), with the receiving site as index and the sending site as columns, values
            in 0..1, rows summing to 1. Sites may differ by round: absent ones are grey.

    Returns:
        A figure with a frame per round and the colour scale fixed to 0..1. Rounds are sampled evenly if all would make
        the figure larger than some 2 MB. More than 24 sites have no labels, whole percentages, and an order in which
        sites of like weights are neighbours. No round: only a title that says so.
    """
    if not weights:
        return go.Figure(layout={**_LAYOUT, "title": _NO_WEIGHTS})
    sites = len(_sites_of(weights))
    tables = _aligned(weights, min(_MOST_FRAMES, _MOST_CELLS // sites**2))
    draw = _heatmap if sites <= _MOST_LABELLED else _heatmap_of_many
    frames = [
        go.Frame(name=str(number), data=[draw(table)], layout={"title": _weights_title(number)})
        for number, table in tables.items()
    ]
    last = max(tables)
    figure = go.Figure(data=[draw(tables[last])], frames=frames)
    labelled = sites <= _MOST_LABELLED
    common = {"type": "category", "showgrid": False, "constrain": "domain", "showticklabels": labelled}
    figure.update_xaxes(title="from", side="top", tickangle=-35, **common)
    figure.update_yaxes(title="receives", autorange="reversed", scaleanchor="x", **common)
    figure.update_layout(
        **{**_LAYOUT, "margin": {"l": 70, "r": 30, "t": 210, "b": 40}},
        title=_weights_title(last),
        plot_bgcolor=ABSENT,
        width=max(720, 280 + 62 * min(sites, _MOST_LABELLED)),
        height=max(560, 360 + 56 * min(sites, _MOST_LABELLED)),
        sliders=[_slider([frame.name for frame in frames])],
    )
    return figure


def weight_heatmap_image(weights: Mapping[int, pd.DataFrame]) -> Figure:
    """Return a still figure of the weights: the last round with numbers, and up to nine evenly spaced rounds.

    Args:
        weights: as for ``weight_heatmap``.
    """
    if not weights:
        return note(_NO_WEIGHTS)
    tables = _aligned(weights, _STRIP_LENGTH)
    shown = list(tables)
    side = math.ceil(math.sqrt(len(shown)))
    figure = Figure(figsize=(11.6, 5.9), layout="constrained")
    figure.suptitle(f"Aggregation weights\n{_WEIGHTS_NOTE}", fontsize=11, color=INK)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[6.6, 5])[0]
    scale = LinearSegmentedColormap.from_list("weights", _WEIGHT_SCALE).with_extremes(bad=ABSENT)
    _draw_weights(left, tables[shown[-1]], f"round {shown[-1]}", scale)
    grid = right.subplots(math.ceil(len(shown) / side), side, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, number in zip(grid.flat, shown, strict=False):
        axes.set_axis_on()
        axes.imshow(tables[number], cmap=scale, vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"round {number}", fontsize=9, color=INK)
    return figure


def overlays(
    examples: Sequence[OverlayExample], names: Sequence[str] | None = None, shown: Sequence[int] | None = None
) -> Figure:
    """Return one row per example: the image, the truth's outline, the prediction's outline with its errors tinted.

    A pixel is missed if the prediction lacks it in any class of the truth, else extra if the truth lacks it in any
    class of the prediction.

    Args:
        examples: images to draw; none gives a note.
        names: names of the K classes in the legend, class 1 first; None: their numbers.
        shown: classes, of 1..K, to draw and to list; None: all. A class looks the same whichever others are shown.
            The looks, a colour and a line style, repeat after 18.
    """
    if not examples:
        return note("No test image")
    heights = [3.0 * min(2.0, image.shape[1] / image.shape[2]) for image in (example.image for example in examples)]
    figure = Figure(figsize=(9.0, sum(heights) + 0.55 * len(examples) + 0.4), layout="constrained")
    rows = figure.subfigures(len(examples), 1, height_ratios=[height + 0.55 for height in heights], squeeze=False)[:, 0]
    classes = len(examples[0].truth)
    looks = _class_looks(classes, shown)
    for row, example in zip(rows, examples, strict=True):
        title = f"{example.label} · Dice {example.dice:.3f} · {_short(example.name)}"
        row.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
        panels = row.subplots(1, 3)
        for axes, name in zip(panels, ("image", "truth", "prediction"), strict=True):
            height, width = example.image.shape[1:]
            axes.imshow(example.image.transpose(1, 2, 0))
            axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            axes.set_title(name, fontsize=9, color=INK)
        _draw_outlines(panels[1], example.truth, looks)
        _draw_errors(panels[2], example, list(looks))
        _draw_outlines(panels[2], example.prediction, looks)
    numbers = [f"class {label}" for label in range(1, classes + 1)] if classes > 1 else ["mask outline"]
    legend = _overlay_legend(looks, names or numbers)
    figure.legend(handles=legend, loc="outside lower center", ncols=6, fontsize=8)
    return figure


_AXIS = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": INK, "ticks": "outside"}
_LAYOUT = {
    "template": "plotly_white",
    "font": {"color": INK, "size": 13},
    "margin": {"l": 70, "r": 30, "t": 80, "b": 60},
}
# Wide and pale, below the sites' lines.
_MEAN_LOOK = {"line": {"color": _MEAN, "width": 9}, "marker": {"color": _MEAN, "size": 1}}


def _add_curve(
    figure: go.Figure,
    rows: pd.DataFrame,
    column: str,
    name: str,
    panel: int,
    look: Mapping[str, object],
    **options: object,
) -> None:
    rows = rows.dropna(subset=[column])
    hover = f"{name} %{{y:.3f}}<extra></extra>"
    curve = go.Scatter(
        x=rows["round"].tolist(),
        y=rows[column].tolist(),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        hovertemplate=hover,
        **look,
        **options,
    )
    figure.add_trace(curve, row=1, col=panel)


def _local_dice_buttons(figure: go.Figure) -> list[dict[str, object]]:
    """Return buttons that show and hide Dice right after local training; none if it was not logged."""
    local = [trace.meta == "dice_local" for trace in figure.data]
    if not any(local):
        return []
    both = [True] * len(local)
    buttons = [
        {"label": "after each round", "method": "restyle", "args": [{"visible": [not hidden for hidden in local]}]},
        {"label": "and right after local training (dotted)", "method": "restyle", "args": [{"visible": both}]},
    ]
    position = {"x": 1, "xanchor": "right", "y": 1.12, "yanchor": "bottom"}
    return [{"type": "buttons", "direction": "right", "showactive": True, "buttons": buttons, **position}]


def _mean_dice(history: pd.DataFrame, sites: int) -> pd.DataFrame:
    """Return the mean validation Dice of the rounds that every site has; in others it would jump as sites drop out."""
    rounds = history.dropna(subset=["dice_validation"]).groupby("round")["dice_validation"].agg(["mean", "size"])
    return rounds[rounds["size"] == sites]["mean"].rename("dice_validation").reset_index()


def _floor(history: pd.DataFrame) -> float:
    """Return the lowest Dice of the panel, rounded down to a tenth; 0 without any."""
    columns = [column for column in ("dice_validation", "dice_local") if column in history]
    lowest = history[columns].min().min()
    return 0.0 if pd.isna(lowest) else math.floor(10 * lowest) / 10


def _sites_of(weights: Mapping[int, pd.DataFrame]) -> list[str]:
    """Return all sites that ever took part, sorted."""
    return sorted(set().union(*(table.index.union(table.columns) for table in weights.values())))


def _aligned(weights: Mapping[int, pd.DataFrame], most: int) -> dict[int, pd.DataFrame]:
    """Return up to ``most`` rounds, evenly spaced, the last among them, each over all sites; NaN for absent ones."""
    numbers, sites = sorted(weights), _sites_of(weights)
    if len(sites) > _MOST_LABELLED:
        last = weights[numbers[-1]].reindex(index=sites, columns=sites)
        sites = [sites[place] for place in _neighbours_first(np.nan_to_num(last.to_numpy(dtype=float)))]
    shown = {numbers[-1 - round(index)] for index in np.linspace(0, len(numbers) - 1, max(most, 1))}
    return {number: weights[number].reindex(index=sites, columns=sites) for number in sorted(shown)}


def _neighbours_first(weights: NDArray[np.float64]) -> list[int]:
    """Return the order of sites in which those that share much are neighbours: average linkage."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    mutual = (weights + weights.T) / 2
    distance = mutual.max() - mutual
    np.fill_diagonal(distance, 0.0)
    order: list[int] = leaves_list(linkage(squareform(distance, checks=False), "average")).tolist()
    return order


def _heatmap(table: pd.DataFrame) -> go.Heatmap:
    return go.Heatmap(
        z=table.to_numpy(dtype=float),
        x=table.columns.tolist(),
        y=table.index.tolist(),
        text=[[_weight(value) for value in row] for row in table.to_numpy(dtype=float)],
        texttemplate="%{text}",
        hovertemplate="%{y} receives %{z:.3f} of its aggregate from %{x}<extra></extra>",
        hoverongaps=False,
        colorscale=[list(stop) for stop in _WEIGHT_SCALE],
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        colorbar={"title": "weight", "tickvals": [0, 0.25, 0.5, 0.75, 1]},
    )


def _heatmap_of_many(table: pd.DataFrame) -> go.Heatmap:
    """Return a heat map without labels, in whole percentages, which take a third of the space."""
    percentages = [[None if math.isnan(value) else round(100 * value) for value in row] for row in table.to_numpy()]
    return go.Heatmap(
        z=percentages,
        x=table.columns.tolist(),
        y=table.index.tolist(),
        hovertemplate="%{y} receives %{z} % of its aggregate from %{x}<extra></extra>",
        hoverongaps=False,
        colorscale=[list(stop) for stop in _WEIGHT_SCALE],
        zmin=0,
        zmax=100,
        colorbar={"title": "weight", "tickvals": [0, 25, 50, 75, 100], "ticksuffix": " %"},
    )


def _weight(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _weights_title(number: int) -> dict[str, object]:
    subtitle = {"text": _WEIGHTS_NOTE, "font": {"size": 12}}
    return {
        "text": f"Aggregation weights · round {number}",
        "subtitle": subtitle,
        "yref": "container",
        "y": 0.97,
        "x": 0.02,
    }


def _slider(names: Sequence[str]) -> dict[str, object]:
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": name, "method": "animate", "args": [[name], at_once]} for name in names]
    return {"active": len(names) - 1, "currentvalue": {"prefix": "round "}, "pad": {"t": 20}, "steps": steps}


def _draw_weights(figure: SubFigure, table: pd.DataFrame, title: str, scale: Colormap) -> None:
    values = table.to_numpy(dtype=float)
    axes = figure.subplots()
    image = axes.imshow(values, cmap=scale, vmin=0, vmax=1)
    axes.set(xlabel="from", ylabel="receives", title=title, xticks=[], yticks=[])
    if len(table) <= _MOST_LABELLED:
        ticks = range(len(table))
        axes.set_xticks(ticks, table.columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_yticks(ticks, table.index, fontsize=9)
        size = max(6, 12 - 0.6 * len(table))
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > 0.6 else INK
            axes.text(column, row, _weight(value), ha="center", va="center", color=ink, fontsize=size)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.75)


def _class_looks(classes: int, shown: Sequence[int] | None) -> dict[int, tuple[str, Style]]:
    """Return the colour and line style of each class to draw, by channel."""
    looks = zip(range(classes), cycle((colour, style) for style in _CLASS_STYLES for colour in CLASS_COLOURS))
    return {channel: look for channel, look in looks if shown is None or channel + 1 in shown}


def _draw_outlines(axes: Axes, masks: NDArray[np.bool_], looks: Mapping[int, tuple[str, Style]]) -> None:
    height, width = masks.shape[1:]
    # A border of one background pixel closes the outline of an object that the image border cuts.
    x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
    for channel, (colour, style) in looks.items():
        if masks[channel].any():
            outline = np.pad(masks[channel], 1).astype(float)
            lines = axes.contour(x, y, outline, levels=[0.5], colors=[colour], linewidths=1.0, linestyles=[style])
            lines.set_path_effects([withStroke(linewidth=2.0, foreground="black")])


def _draw_errors(axes: Axes, example: OverlayExample, channels: Sequence[int]) -> None:
    prediction, truth = example.prediction[channels], example.truth[channels]
    extra, missed = (prediction & ~truth).any(axis=0), (truth & ~prediction).any(axis=0)
    tint = np.zeros((*missed.shape, 4))
    tint[extra] = to_rgba(_EXTRA, 0.55)
    tint[missed] = to_rgba(_MISSED, 0.55)
    axes.imshow(tint)


def _overlay_legend(looks: Mapping[int, tuple[str, Style]], names: Sequence[str]) -> list[Line2D | Patch]:
    halo = [withStroke(linewidth=3, foreground="black")]
    lines = [
        Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=names[channel], path_effects=halo)
        for channel, (colour, style) in looks.items()
    ]
    return [*lines, Patch(color=_MISSED, alpha=0.55, label="missed"), Patch(color=_EXTRA, alpha=0.55, label="extra")]


def _short(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"
