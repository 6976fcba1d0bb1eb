"""Demonstration sites, written where there is no raw data yet."""
