"""Published data sets into site folders."""
