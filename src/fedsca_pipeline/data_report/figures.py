"""Figures of the data report: SVG in a light and a dark version for its pages, plotly for Kedro Viz."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsca_pipeline.evaluation.figures import COLOURS, GRID, INK

_MARKERS = ("o", "s", "D", "^", "X", "*", "v")
_PLOTLY_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
_NO_PLANE = "No map: the foundation has seen fewer than two sites with four images"


@dataclass(frozen=True)
class Themed:
    """One figure for light and one for dark pages, as ``data:`` addresses of SVG with a transparent background."""

    light: str
    dark: str


@dataclass(frozen=True)
class _Theme:
    ink: str
    grid: str


_LIGHT, _DARK = _Theme("#3d4451", "#dfe3e8"), _Theme("#b6bdc9", "#333a45")


def histogram(intensities: Mapping[str, Any]) -> Themed:
    """Return a histogram of a site's raw intensities (``facts["intensity_values"]``): share of pixels per bin."""
    edges, shares = (np.array(intensities["histogram"][key]) for key in ("edges", "shares"))

    def draw(axes: Axes, theme: _Theme) -> None:
        axes.bar(edges[:-1], 100 * shares, width=np.diff(edges), align="edge", color=COLOURS[0], linewidth=0)
        median = intensities["quantiles"]["50"]
        axes.axvline(median, color=theme.ink, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f" median {median:.4g}", (median, 1), xycoords=("data", "axes fraction"), va="top", color=theme.ink, size=8
        )
        axes.set(xlabel="raw intensity", ylabel="pixels, %", xlim=(edges[0], edges[-1]))

    return _themed(draw, (6.4, 2.3))


def site_map(points: Mapping[str, np.ndarray]) -> Themed:
    """Return a map of the images, points [n, 2] by site from ``distance.plane``, a colour and a marker per site."""

    def draw(axes: Axes, theme: _Theme) -> None:
        for (site, xy), colour, marker in zip(points.items(), cycle(COLOURS), cycle(_MARKERS), strict=False):
            x, y = xy[:, 0], xy[:, 1]
            axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.75, linewidth=0, label=site)
        axes.set(xlabel="first component", ylabel="second component", xticks=[], yticks=[])
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor=theme.ink, fontsize=9, borderpad=0
        )

    return _themed(draw, (7.6, 4.0))


def interactive_map(points: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]) -> go.Figure:
    """Return the interactive map, which shows an image's name (``names`` by site) on hover. No site: only a title."""
    layout = {"template": "plotly_white", "font": {"color": INK, "size": 13}}
    if not points:
        return go.Figure(layout={**layout, "title": _NO_PLANE})
    figure = go.Figure(
        [
            go.Scatter(
                x=xy[:, 0].tolist(),
                y=xy[:, 1].tolist(),
                name=site,
                mode="markers",
                text=list(names[site]),
                marker={"color": colour, "symbol": marker, "size": 8, "opacity": 0.75},
                hovertemplate="%{text}<extra>" + site + "</extra>",
            )
            for (site, xy), colour, marker in zip(points.items(), cycle(COLOURS), cycle(_PLOTLY_MARKERS), strict=False)
        ]
    )
    axis = {"showticklabels": False, "gridcolor": GRID, "zeroline": False}
    figure.update_xaxes(title="first component", **axis)
    figure.update_yaxes(title="second component", **axis)
    figure.update_layout(**layout, title="Images as the foundation sees them", height=560)
    return figure


def sheet_figure(image: np.ndarray, dpi: int = 96) -> Figure:
    """Return a figure that shows a finished picture, uint8 [H, W, 3], at its own size."""
    height, width = image.shape[:2]
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    figure.figimage(image)
    return figure


def _themed(draw: Callable[[Axes, _Theme], None], size: tuple[float, float]) -> Themed:
    return Themed(*(_svg(draw, size, theme) for theme in (_LIGHT, _DARK)))


def _svg(draw: Callable[[Axes, _Theme], None], size: tuple[float, float], theme: _Theme) -> str:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.ink)
    draw(axes, theme)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=9)
    stream = io.BytesIO()
    # No date and no random ids, so that equal data give equal pages.
    with mpl.rc_context({"svg.hashsalt": "data report"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
