"""What a run is judged by: `metrics` (torch, MONAI), `tables` (pandas), `figures` (plotly, matplotlib).

Import the module you need; this package itself imports none of them.
"""

MEAN = "mean over sites"
WORST = "worst site"
"""Rows of the tables that are no site's."""

ALL_CLASSES = "mean over classes"
"""Of several classes: the table rows that are no single class's."""

CLASS_DICE = "Dice chosen {}"
"""Of several classes: the final table's column of one, by its name."""
