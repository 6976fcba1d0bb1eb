"""The coordinator of a deployed federation: its fleet, and its link to Flower."""
