"""Differential privacy inside a site."""
