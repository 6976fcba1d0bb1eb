"""What the sites' raw data are like, and what is wrong with them, site by site and across sites (docs/data_report.md).

``inspection`` looks at one site, ``across`` at what the sites tell of themselves, ``page`` writes both down.
"""
