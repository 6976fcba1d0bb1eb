"""A site's label rule: which values of its masks are which class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_COLOUR = re.compile(r"#[0-9a-f]{6}")


@dataclass(frozen=True)
class LabelRule:
    """How a site's masks are to be read; without anything, values are classes, and 255 beside nothing but 0 is 1.

    ``numbers``: value or palette index to class; numbers that are not named stay as they are. ``colours``: ``#rrggbb``
    to class; where there are any, RGB and palette masks are read by colour, and black is background if it is not named.
    ``threshold``: class 1 from this grey value on, and nothing else matters.
    """

    numbers: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[str, int] = field(default_factory=dict)
    threshold: float | None = None


def number_of(colour: str) -> int:
    """Return 0xRRGGBB of ``#rrggbb``.

    Raises:
        ValueError: it is not written so.
    """
    if not _COLOUR.fullmatch(colour.lower()):
        raise ValueError(f"{colour!r} is not a colour; write '#rrggbb', in quotes")
    return int(colour[1:], 16)


def colour_of(number: int) -> str:
    """Return ``#rrggbb`` of 0xRRGGBB."""
    return f"#{number:06x}"
