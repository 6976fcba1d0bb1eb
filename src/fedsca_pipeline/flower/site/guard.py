"""The ``flwr-clientapp`` of a site: runs only the ClientApp of the installed package, never code from a bundle.

By default Flower unpacks and runs code sent by any party that controls the SuperLink, and version 1.41 cannot verify a
bundle offline. This guard accepts only a bundle that equals, byte for byte, the one built from the package's ``app``
folder. It unpacks nothing even then: the code that runs is the code that the hospital has installed and reviewed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flwr.cli.build import build_fab_from_disk
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from fedsca_pipeline.flower.site import shim

APP = Path(__file__).parents[1] / "app"


class ForeignBundleError(Exception):
    """The app bundle of a run differs from the bundle of the installed package."""


def refuse_foreign(bundle: bytes, **_options: Any) -> None:
    """Check that a bundle is the one of the installed package.

    Raises:
        ForeignBundleError: the bundle differs; the message has both hashes.
    """
    installed, received = (hashlib.sha256(content).hexdigest() for content in (build_fab_from_disk(APP), bundle))
    if installed != received:
        raise ForeignBundleError(
            f"the run sent app bundle {received[:16]}, this site runs only {installed[:16]}; install the same version "
            "of fedsca_pipeline at the coordinator and here"
        )


def main() -> None:
    """Run ``flwr-clientapp`` with the guard."""
    run_clientapp.install_from_fab = refuse_foreign
    run_clientapp.get_load_client_app_fn = lambda **_options: lambda *_bundle: shim.app
    flwr_clientapp()


if __name__ == "__main__":
    main()
