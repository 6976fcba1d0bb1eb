"""Kedro pipelines: thin wiring around the packages beside this one."""
