"""The site's ``flwr-clientapp``: runs the ClientApp of the installed package, whatever bundle a run carries.

Flower would unpack and run the code that whoever controls the SuperLink sends along, and 1.41 cannot verify a bundle
offline. Here a bundle must be, byte for byte, the one that this package makes of its own ``app`` folder, and even then
nothing of it is unpacked: what runs is what the hospital has installed and reviewed.
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
    """A run's app bundle is not the one of the installed package."""


def refuse_foreign(bundle: bytes, **_options: Any) -> None:
    """Do nothing for this package's own bundle.

    Raises:
        ForeignBundleError: with both hashes.
    """
    own, came = (hashlib.sha256(content).hexdigest() for content in (build_fab_from_disk(APP), bundle))
    if own != came:
        raise ForeignBundleError(
            f"the run brought app bundle {came[:16]}, this site runs {own[:16]} only; install the same version of "
            "fedsca_pipeline at the coordinator and here"
        )


def main() -> None:
    """Be ``flwr-clientapp``."""
    run_clientapp.install_from_fab = refuse_foreign
    run_clientapp.get_load_client_app_fn = lambda **_options: lambda *_bundle: shim.app
    flwr_clientapp()


if __name__ == "__main__":
    main()
