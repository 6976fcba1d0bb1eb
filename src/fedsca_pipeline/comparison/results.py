"""Finished cells: read them from disk, and turn them into long tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from fedsca_pipeline.comparison.plan import Cell, choose_rates, resolve_methods, setting_of, tuning_cells, unique
from fedsca_pipeline.federation.run import code_version
from fedsca_pipeline.files import fingerprint

logger = logging.getLogger(__name__)

Result = Mapping[str, Any]

_PARTS = frozenset(
    {
        "fingerprint", "code", "description", "method", "left_out", "sites", "rounds", "traffic", "unseen", "seconds",
        "peak_memory",
    }
)  # fmt: skip


def read_result(folder: Path, cell: Cell) -> Result | None:
    """Return a cell's result from ``folder``, or None if it is missing or damaged; log a warning for a damaged one."""
    path = folder / f"{cell.fingerprint}.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_bytes())
        # The file name alone does not show that the content was changed or belongs to another cell.
        sound = result.keys() >= _PARTS and fingerprint(result["description"]) == cell.fingerprint
    except (ValueError, AttributeError, UnicodeDecodeError):
        sound = False
    if not sound:
        logger.warning("%s: the result of %s is damaged; the cell runs again", path, cell)
        return None
    return result


def validation_dice(result: Result) -> float:
    """Return the mean over sites of the chosen models' validation Dice, which decides between learning rates."""
    return sum(site["dice_validation"] for site in result["sites"].values()) / len(result["sites"])


@dataclass(frozen=True)
class Frames:
    """Results with one number of training images, as tables in long form.

    ``scores``: method, seed, site, image, dice, hd95 (pixels). ``costs``: method, seed, bytes_up and bytes_down (per
    site and training round), bytes_to_95, seconds (CPU), peak_memory (bytes). ``curves``: method, seed, round,
    dice_validation (mean over sites), bytes (all sites, up and down, so far). ``unseen``: method, seed, site, received,
    image, dice, hd95. ``classes``: method, seed, site, class (number), dice (mean over images) of the classes that the
    site has; no row if there is one class only.
    """

    scores: pd.DataFrame
    costs: pd.DataFrame
    curves: pd.DataFrame
    unseen: pd.DataFrame
    classes: pd.DataFrame


def frames(results: Sequence[tuple[Cell, Result]]) -> Frames:
    """Return the tables of cells that differ in method, seed and left-out site only. The tables may be empty.

    A cell with a left-out site contributes the rows of that site only; the other sites' rows come from the cell
    without a left-out site.
    """
    complete = [(cell, result) for cell, result in results if cell.left_out is None]
    return Frames(
        scores=_table(_SCORES, (row for pair in complete for row in _scores(*pair))),
        costs=_table(_COSTS, (_cost(*pair) for pair in complete)),
        curves=_table(_CURVES, (row for pair in complete for row in _curve(*pair))),
        unseen=_table(_UNSEEN, (row for pair in results for row in _unseen(*pair))),
        classes=_table(_CLASSES, (row for pair in complete for row in _classes(*pair))),
    )


_SCORES = ("method", "seed", "site", "image", "dice", "hd95")
_COSTS = ("method", "seed", "bytes_up", "bytes_down", "bytes_to_95", "seconds", "peak_memory")
_CURVES = ("method", "seed", "round", "dice_validation", "bytes")
_CLASSES = ("method", "seed", "site", "class", "dice")
_UNSEEN = ("method", "seed", "site", "received", "image", "dice", "hd95")


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


def _named(cell: Cell) -> dict[str, Any]:
    return {"method": cell.method, "seed": cell.seed}


def _scores(cell: Cell, result: Result) -> Iterable[dict[str, Any]]:
    for site, found in result["sites"].items():
        for image, dice, hd95 in zip(found["images"], found["dice"], found["hd95"], strict=True):
            yield {**_named(cell), "site": site, "image": image, "dice": dice, "hd95": hd95}


def _classes(cell: Cell, result: Result) -> Iterable[dict[str, Any]]:
    for site, found in result["sites"].items():
        for label, dice in found.get("dice_by_class", {}).items():
            yield {**_named(cell), "site": site, "class": int(label), "dice": sum(dice) / len(dice)}


def _cost(cell: Cell, result: Result) -> dict[str, Any]:
    return {**_named(cell), **result["traffic"], "seconds": result["seconds"], "peak_memory": result["peak_memory"]}


def _curve(cell: Cell, result: Result) -> Iterable[dict[str, Any]]:
    sent = 0
    for record in result["rounds"]:
        known = [site["dice_validation"] for site in record["sites"].values() if "dice_validation" in site]
        if known:
            # A round's record has the Dice of the models before that round's training.
            mean = sum(known) / len(known)
            yield {**_named(cell), "round": record["round"] - 1, "dice_validation": mean, "bytes": sent}
        sent += record["bytes"]


def _unseen(cell: Cell, result: Result) -> Iterable[dict[str, Any]]:
    for site, by_received in result["unseen"].items():
        if cell.left_out not in (None, site):
            continue
        for received, found in by_received.items():
            for image, dice, hd95 in zip(found["images"], found["dice"], found["hd95"], strict=True):
                row = {"site": site, "received": received, "image": image, "dice": dice, "hd95": hd95}
                yield {**_named(cell), **row}


def rates_of(plan: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, float]:
    """Return the learning rates that the ``known`` results choose, by method."""
    setting = setting_of(plan)
    methods = resolve_methods(setting)
    tuned = [cell for cell in tuning_cells(methods, setting) if cell.fingerprint in known]
    return choose_rates(methods, ((cell, validation_dice(known[cell.fingerprint])) for cell in tuned))


def read_known(cells: Sequence[Cell], folder: Path, *, same_code: bool) -> tuple[dict[str, Any], int]:
    """Return the cells' usable results in ``folder`` by fingerprint, and the number refused for their code version.

    With ``same_code`` only results of the current code version are usable.
    """
    found = {cell.fingerprint: read_result(folder, cell) for cell in unique(cells)}
    sound = {name: result for name, result in found.items() if result is not None}
    usable = {name: result for name, result in sound.items() if not same_code or result["code"] == code_at_work()}
    return usable, len(sound) - len(usable)


@cache
def code_at_work() -> str:
    """Return the code version, computed once per process: files may change while it runs."""
    return code_version("comparison/cell.py")
