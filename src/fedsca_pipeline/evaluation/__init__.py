"""Scores, tables and figures of a run. This package imports nothing heavy itself; import the module you need."""

MEAN = "mean over sites"
WORST = "worst site"
"""Table rows that summarise the sites."""

ALL_CLASSES = "mean over classes"
"""Table rows over all classes, if there are several."""

CLASS_DICE = "Dice chosen {}"
"""Column of the final table for one class, by the class's name, if there are several."""
