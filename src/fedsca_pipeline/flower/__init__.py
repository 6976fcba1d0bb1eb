"""The deployed federation on Flower: coordinator, sites, messages, audit log and processes.

``coordinator/relay.py``, ``site/shim.py``, ``site/guard.py`` and ``app/`` run in Flower's environment (the engine),
which has flwr but no torch. They import only the standard library, flwr, one another, ``messages.frames`` and
``processes.engine``. Everything else runs in the project's environment, which does not need flwr.
"""
