"""Kedro datasets that kedro-datasets does not have: atomic saving, folders, and a site's cached arrays.

One module each, so that a catalog entry imports only the library it needs.
"""
