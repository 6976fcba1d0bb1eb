"""What a data root keeps of a site, and its deletion. The raw data of a site are deleted only if that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedsca_pipeline.files import read_json, remove_partial_files, write_json

RAW = ("01_raw/{site}/", "private/{site}/")
"""Where a site's raw data are, and what belongs to them: names, salt, privacy ledger."""

# A slash at the end: a folder.
_OF_ONE_SITE = (
    "02_intermediate/{site}/",
    "03_primary/{site}/",
    "05_model_input/{site}.safetensors",
    "06_models/{site}/",
    "07_model_output/test_scores/{site}.csv",
    "07_model_output/volume_scores/{site}.csv",
    "07_model_output/predictions/{site}/",
    "08_reporting/overlays/{site}.png",
    "08_reporting/data_report/{site}.html",
    "08_reporting/data_report/{site}.json",
    "08_reporting/data_report/{site}.png",
)
# Only these tell which sites there are: a data report has pages on no site, too.
_TELLING = (*_OF_ONE_SITE[:8], "07_model_output/checkpoints/*/sites/{site}/")
# Made of all sites together, by the last run or report; its document, the key, tells whether a site took part.
_OF_ALL_SITES = {
    "06_models/run_description.json": (
        *(f"06_models/{name}" for name in ("run_description.json", "site_models.json")),
        "07_model_output/deployed_scores.json",
        *(f"08_reporting/{name}" for name in ("final_table.*", "*_scores.csv", "volume_table.json")),
        *(f"08_reporting/{name}" for name in ("learning_curves.json", "weight_heatmap.*", "last_run.json")),
    ),
    "08_reporting/data_report/index.json": (
        *(f"08_reporting/data_report/{name}" for name in ("index.*", "sites.csv", "map.json")),
    ),
}
_TELLING_DOCUMENTS = ("run_description.json", "index.json", "plan.json")
# Folders of one run or cell each, with what all its sites sent and received.
_RUNS = ("07_model_output/checkpoints/*/", "07_model_output/rounds/*/", "07_model_output/comparison_checkpoints/*/")
_BY_SITE = ("02_intermediate/demo_sites.json", "02_intermediate/import.json", "02_intermediate/joined_sites.json")
_POOLED = "_pooled"
# Keys of documents whose values have an entry for each site, whatever else a site may be called.
_KEYS = ("sites", "data")


def kept_sites(root: Path) -> set[str]:
    """Return the names of the sites of which a data root keeps anything but raw data."""
    found = {path.name.split(".")[0] for pattern in _TELLING for path in root.glob(pattern.format(site="[!._]*"))}
    joined = _read(root / "02_intermediate/joined_sites.json")
    return found.union(joined, _read(root / "06_models/run_description.json").get("data", ()))


def forget(root: Path, site: str, cells: Path, *, raw: bool) -> list[Path]:
    """Delete what a data root keeps of a site, and return the deleted files and folders, in order.

    What is made of all sites together goes as a whole if the site took part: a later run makes it anew without the
    site. Documents with an entry for each site lose that of the site. The list is empty if nothing was there.

    Args:
        root: the data root; other roots are not touched.
        site: name of the site, made of letters, digits, ``_`` and ``-``.
        cells: folder of a comparison's finished cells, which may lie elsewhere.
        raw: delete the site's raw data as well, with what belongs to them.

    Raises:
        OSError: something cannot be deleted; the rest of it stays, and the same call goes on.
    """
    own = {path for pattern in (*_OF_ONE_SITE, *(RAW if raw else ())) for path in root.glob(pattern.format(site=site))}
    doomed = {run for pattern in _RUNS for run in root.glob(pattern) if _took_part(run, site)}
    doomed |= set(_naming([root / "07_model_output/checkpoints/current.json"], site))
    for document, files in _OF_ALL_SITES.items():
        if any(_naming([root / document], site)):
            doomed |= {path for pattern in files for path in root.glob(pattern)}
    compared = set(_naming([root / "07_model_output/comparison/plan.json", *cells.glob("*.json")], site))
    if compared:
        doomed |= {*compared, *root.glob("08_reporting/comparison")}
    # What tells that there is something to delete goes last, so that a killed deletion can be repeated.
    deleted = [
        *sorted(doomed, key=lambda path: (path.name in _TELLING_DOCUMENTS, path)),
        *sorted(own),
    ]
    remove_partial_files(root / "05_model_input", f"{site}.*")
    for path in deleted:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    changed = []
    for path in (root / document for document in _BY_SITE):
        if (kept := _without(before := _read(path), site)) != before:
            write_json(path, kept)
            changed.append(path)
    return [*deleted, *changed]


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} if the file is missing, damaged or something else."""
    try:
        document = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _without(value: Any, site: str, *, by_site: bool = True) -> Any:
    """Return a JSON value without the site's entries, on its top level and below the keys that have one per site."""
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if not (by_site and key == site)}
        return {key: _without(entry, site, by_site=key in _KEYS) for key, entry in kept.items()}
    if isinstance(value, list):
        return [_without(entry, site, by_site=False) for entry in value if not (by_site and entry == site)]
    return value


def _took_part(run: Path, site: str) -> bool:
    """Return whether a site took part in a run, by its folder; pooled images belong to every site."""
    sites = {path.name for path in run.rglob("sites/*/")}
    documents = [*run.rglob("*.json")]
    joined = any(site in _read(path) for path in documents if path.name == "joined_sites.json")
    return joined or not sites.isdisjoint({site, _POOLED}) or any(_naming(documents, site))


def _naming(documents: Iterable[Path], site: str) -> Iterator[Path]:
    """Yield the documents in which an entry of ``_KEYS`` has the site."""
    return (path for path in documents if path.is_file() and _has_entry(_read(path), (site, _POOLED)))


def _has_entry(value: Any, sites: tuple[str, ...]) -> bool:
    if isinstance(value, dict):
        by_site = [entry for key, entry in value.items() if key in _KEYS and isinstance(entry, dict | list)]
        return any(site in entry for entry in by_site for site in sites) or any(
            _has_entry(entry, sites) for entry in value.values()
        )
    return isinstance(value, list) and any(_has_entry(entry, sites) for entry in value)
