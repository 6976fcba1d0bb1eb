"""Kedro hooks."""
