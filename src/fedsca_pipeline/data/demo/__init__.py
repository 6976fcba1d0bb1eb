"""Phantom hospitals, written when there is no raw data."""
