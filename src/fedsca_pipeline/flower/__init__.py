"""The deployed federation on Flower: its coordinator, its sites, and what travels between them.

``relay``, ``shim``, ``guard`` and ``app`` run in the engine's environment, which has flwr and no torch;
they import the standard library, flwr and one another. All else runs in the project's environment, which need
not have flwr.
"""
