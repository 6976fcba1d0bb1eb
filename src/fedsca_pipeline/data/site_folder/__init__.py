"""The contract of a site folder: its files, their pairs and its ``site.yml``."""
