"""What a run is judged by: `metrics` (torch, MONAI), `tables` (pandas, rich), `figures` (plotly, matplotlib).

Import the module you need; this package itself imports none of them.
"""
