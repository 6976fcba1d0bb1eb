"""Comparison of many methods on the same sites: plan a grid of cells, run them, and report tables and figures."""
