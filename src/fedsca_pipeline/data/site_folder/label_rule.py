"""A site's label rule: the classes of its masks' values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_COLOUR = re.compile(r"#[0-9a-f]{6}")


@dataclass(frozen=True)
class LabelRule:
    """How a site's masks are read. Default: values are classes, and a mask of 0 and 255 only has class 1 at 255.

    ``numbers``: value or palette index to class; other numbers stay as they are. ``colours``: ``#rrggbb`` to class; if
    there are any, RGB and palette masks are read by colour, and unnamed black is background. ``threshold``: class 1
    from this grey value on, whatever the other rules.
    """

    numbers: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[str, int] = field(default_factory=dict)
    threshold: float | None = None


def number_of(colour: str) -> int:
    """Return ``#rrggbb`` as 0xRRGGBB.

    Raises:
        ValueError: it is written in another form.
    """
    if not _COLOUR.fullmatch(colour.lower()):
        raise ValueError(f"{colour!r} is not a colour; write '#rrggbb', in quotes")
    return int(colour[1:], 16)


def colour_of(number: int) -> str:
    """Return 0xRRGGBB as ``#rrggbb``."""
    return f"#{number:06x}"
