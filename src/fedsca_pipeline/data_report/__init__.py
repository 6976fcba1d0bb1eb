"""What the sites' raw data are like, and what is wrong with them: facts of each site, and across sites (docs/data.md).

``inspection`` looks at one site, ``across`` at what the sites tell of themselves, ``page`` writes both down.
"""
