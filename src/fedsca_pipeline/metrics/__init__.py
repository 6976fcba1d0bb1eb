"""Metrics of images (``images``) and volumes (``volumes``)."""
