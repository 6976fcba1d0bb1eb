"""Kedro datasets that kedro-datasets does not have: atomic files, folders, and a site's cached arrays.

Each kind has its own module, so that a catalog entry imports only the library it needs.
"""
