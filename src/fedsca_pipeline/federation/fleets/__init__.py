"""Fleets: what reaches the sites, in this process or in others."""
