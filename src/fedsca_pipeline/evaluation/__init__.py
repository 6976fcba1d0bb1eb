"""What a run is judged by: `metrics` (torch, MONAI), `tables` (pandas), `figures` (plotly, matplotlib).

Import the module you need; this package itself imports none of them.
"""

MEAN = "mean over sites"
WORST = "worst site"
"""Rows of the tables that are no site's."""
