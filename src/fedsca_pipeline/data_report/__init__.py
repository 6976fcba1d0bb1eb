"""A report on the sites' raw data and what is wrong with them, per site and across sites (docs/data_report.md).

``inspection`` inspects one site, ``across`` compares the sites' facts, ``page`` writes the pages.
"""
