"""Fetch, verify and convert the frozen foundation, once."""
