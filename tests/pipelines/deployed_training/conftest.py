"""The scripted Flower link, for the coordinator's nodes."""

from scripted_flower import clock, config, link, reply, scripted  # noqa: F401 - fixtures
