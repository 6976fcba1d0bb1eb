"""Fleets: the ways to reach sites, in this process or in others."""
