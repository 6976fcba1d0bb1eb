"""A hospital of a deployed federation: its command, gateway, worker and Flower processes."""
