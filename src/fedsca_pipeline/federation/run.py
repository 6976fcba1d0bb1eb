"""A run: its fingerprint, its folder, and whether it can resume."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import GROUPS, Settings
from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation.fleets.registry import available_cores, site_threads
from fedsca_pipeline.files import fingerprint, read_json, remove_partial_files, sealed, unsealed, write_json

logger = logging.getLogger(__name__)

# Libraries whose version changes the numbers of a run.
_LIBRARIES = (
    *("torch", "opacus", "peft", "transformers", "numpy"),
    *("pillow", "tifffile", "scikit-image", "nibabel", "pynrrd", "simpleitk", "pydicom", "highdicom"),
)
_CURRENT = "current.json"

CHANGES_NO_NUMBER = frozenset({"fleet", "workers", "devices", "server_memory", "deadline", "grace", "quorum"})
"""Parameters of ``federation`` that change no number: how work is spread, how long a round waits, where arrays lie.

They change none as long as the threads per site are equal and the same sites answer.
"""

CODE_OF_A_RUN = (
    *("config.py", "compute.py", "data", "federation", "metrics", "model"),
    *("evaluation/scoring.py", "evaluation/volume_scoring.py"),
)
"""Files and folders of this package that decide a run's numbers. They alone are part of its fingerprint."""


def code_version(*more: str, root: Path = Path(__file__).parents[1]) -> str:
    """Return 16 hex digits over the code and the versions of the libraries that decide a run's numbers.

    Args:
        more: files or folders below ``root``, beside ``CODE_OF_A_RUN``.
        root: folder of the package.
    """
    places = [root / place for place in (*CODE_OF_A_RUN, *more)]
    files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library}={version(library)}".encode())
    return digest.hexdigest()[:16]


def resolve_threads(configured: int | None) -> int:
    """Return ``run.threads``, or the number of cores this process may use."""
    return configured or available_cores()


def describe_run(
    configuration: Mapping[str, Mapping[str, Any]], data: Mapping[str, str], foundation: str, threads: int
) -> dict[str, Any]:
    """Return everything that decides a run's numbers, as JSON values, with its fingerprint.

    Args:
        configuration: top-level parameter key to its JSON values.
        data: site to the version of its data.
        foundation: SHA-256 of the foundation's weights.
        threads: torch threads of one site; they decide the order of sums.
    """
    parts = {
        "configuration": dict(configuration),
        "data": dict(data),
        "foundation": foundation,
        "code": code_version(),
        "threads": threads,
    }
    return {"fingerprint": fingerprint(parts), **parts}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the differences between two nested mappings, one line each: ``federation.rounds: 8 -> 10``."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run's server checkpoints and site states, ``<checkpoints>/<fingerprint>``."""

    checkpoints: Path
    fingerprint: str

    @property
    def server(self) -> Path:
        """Folder of the server's checkpoints."""
        return self.checkpoints / self.fingerprint / "server"

    @property
    def sites(self) -> Path:
        """Folder of the sites' private states, one folder per site."""
        return self.checkpoints / self.fingerprint / "sites"

    @property
    def joined(self) -> Path:
        """File of the sites' answers at the start of a deployed run: counts and versions of their data."""
        return self.checkpoints / self.fingerprint / "joined_sites.json"

    def begun(self) -> str:
        """Return the identifier of this start of the run. The first call after ``clear`` creates a new one.

        Raises:
            ResumeError: its file is damaged.
        """
        path = self.checkpoints / self.fingerprint / "begun.json"
        if not path.is_file():
            write_json(path, secrets.token_hex(8))
        if not re.fullmatch(rb'"[0-9a-f]{16}"\s*', path.read_bytes()):
            raise ResumeError(
                f"{path}: damaged; restore it from a copy. Without one, delete it: the sites then begin the run anew"
            )
        begun: str = read_json(path)
        return begun

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Remove the sites' temporary files when the block ends, also by an error."""
        try:
            yield
        finally:
            remove_partial_files(self.sites)

    def clear(self) -> None:
        """Delete the run's checkpoints and states. If it is killed on the way, none of them stays in place."""
        doomed = self.checkpoints / f".{self.fingerprint}.partial"
        shutil.rmtree(doomed, ignore_errors=True)
        if (self.checkpoints / self.fingerprint).is_dir():
            (self.checkpoints / self.fingerprint).rename(doomed)
            shutil.rmtree(doomed)


def open_run(checkpoints: Path, description: Mapping[str, Any], *, force: bool) -> RunFolder:
    """Return the folder of the described run, to start or to resume it.

    ``force`` deletes what an earlier attempt of the same run left. An unfinished other run stays.

    Raises:
        ResumeError: another run is unfinished, and the message names what changed; or ``current.json`` is damaged.
    """
    folder = RunFolder(checkpoints, description["fingerprint"])
    if force:
        folder.clear()
    else:
        refuse_another_run(checkpoints, description)
    remove_partial_files(checkpoints)
    write_json(checkpoints / _CURRENT, sealed({"finished": False, "description": dict(description)}))
    return folder


def refuse_another_run(checkpoints: Path, description: Mapping[str, Any]) -> None:
    """Check that no other run than the described one is unfinished.

    Raises:
        ResumeError: another run is unfinished; the message names what changed.
    """
    unfinished = unfinished_run(checkpoints)
    if unfinished is not None and (changed := changes(unfinished, description)):
        raise ResumeError(
            "an unfinished run of another configuration, data or code is in the checkpoints. What changed:\n  "
            + "\n  ".join(changed)
            + "\nPut it back to resume that run, or add --params=force=true to start a new one."
        )


def unfinished_run(checkpoints: Path) -> dict[str, Any] | None:
    """Return the description of the unfinished run, or None.

    Raises:
        ResumeError: the file that describes the current run is damaged.
    """
    finished, description = _current(checkpoints)
    return None if finished else description


def shorter_run(checkpoints: Path, description: Mapping[str, Any]) -> tuple[RunFolder, int] | None:
    """Return folder and rounds of the finished run that the described one prolongs; None if it starts at round 1.

    It prolongs it if only ``federation.rounds`` has grown, and if the models of the shorter run's last round would be
    validated next in any case: every site takes part in the next round, and ``evaluation.every`` divides the rounds.
    With differential privacy the noise follows from the number of rounds.

    Raises:
        ResumeError: the file that describes the current run is damaged.
    """
    finished, shorter = _current(checkpoints)
    if not finished or shorter is None:
        return None
    new, rounds = description["configuration"], shorter["configuration"]["federation"]["rounds"]
    federation, every = new["federation"], new["evaluation"]["every"]
    if changes(shorter, description) != [f"federation.rounds: {rounds} -> {federation['rounds']}"]:
        return None
    if federation["rounds"] < rounds:
        return None
    reasons = {
        "federation.participation is below 1": federation["participation"] < 1,
        "federation.inject_failures is set": bool(federation["inject_failures"]),
        "evaluation.every does not divide them": rounds % every > 0,
        "the noise of training.privacy follows from the number of rounds": new["training"]["privacy"]["epsilon"],
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        logger.warning("%d rounds are done but cannot be prolonged: %s; starting at round 1", rounds, "; ".join(why))
        return None
    return RunFolder(checkpoints, shorter["fingerprint"]), rounds


def _current(checkpoints: Path) -> tuple[bool, dict[str, Any] | None]:
    """Return whether the current run is finished, and its description; False and None if there is none.

    Raises:
        ResumeError: the file that describes it is damaged.
    """
    marker = checkpoints / _CURRENT
    if not marker.is_file():
        return False, None
    try:
        current = unsealed(read_json(marker))
        return current["finished"], current["description"]
    except (ValueError, KeyError, RecursionError) as error:
        raise ResumeError(
            f"{marker}: damaged ({error}); delete it. The checkpoints stay, and the same command goes on with its run"
        ) from error


def finish_run(checkpoints: Path) -> None:
    """Mark the current run, if there is one, as finished, so that another configuration can start."""
    if (description := unfinished_run(checkpoints)) is not None:
        write_json(checkpoints / _CURRENT, sealed({"finished": True, "description": description}))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences between two runs' descriptions, one line each, with the YAML keys of the configuration."""
    return differences(_named(old), _named(new))


def _named(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with its configuration at the top level, so that differences read like YAML keys."""
    rest = {key: value for key, value in description.items() if key not in ("configuration", "fingerprint")}
    return {**description["configuration"], **rest}


def threads_of(settings: Settings, sites: int) -> int:
    """Return the torch threads that one of ``sites`` trains with."""
    return site_threads(settings.run, settings.federation, sites)


def data_version(raw_fingerprint: str, report: Mapping[str, Any]) -> str:
    """Return what identifies a site's data: its raw folder, and its split, which may be older."""
    return f"{raw_fingerprint}-{report['split']['fingerprint']}"


def configuration_of(settings: Settings) -> dict[str, Any]:
    """Return the JSON values of every parameter that decides a run's numbers."""
    values = {name: getattr(settings, name).model_dump(mode="json") for name in GROUPS}
    values["federation"] = {k: value for k, value in values["federation"].items() if k not in CHANGES_NO_NUMBER}
    return {**values, "strategies": {settings.federation.strategy: settings.strategy_options}}
