"""Fixtures of a scripted Flower link."""

from scripted_flower import (  # noqa: F401 - fixtures
    certificates,
    clock,
    config,
    exchange,
    fleet,
    link,
    reply,
    scripted,
    site_file,
    values,
)
