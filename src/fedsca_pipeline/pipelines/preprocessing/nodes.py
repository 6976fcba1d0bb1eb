"""Nodes of preprocessing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import PreprocessingConfig, RunConfig

logger = logging.getLogger(__name__)


def prepare_for(site: str) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Return the node function that prepares one site."""

    def prepare(
        raw_sites: Path,
        model_input: Path,
        private_sites: Path,
        demo_sites_summary: dict[str, Any],
        previous_manifest: Any,
        preprocessing: PreprocessingConfig,
        run: RunConfig,
    ) -> tuple[Any, Any, dict[str, Any]]:
        from fedsca_pipeline.data.preprocessing.prepare import prepare_site
        from fedsca_pipeline.data.site_folder.pairing import Broken, by_fault
        from fedsca_pipeline.files import remove_partial_files

        # What a killed command left of this site may be as large as all its arrays.
        remove_partial_files(model_input, f"{site}.*")
        private = private_sites / site
        prepared = prepare_site(
            raw_sites, site, preprocessing, run.seed, previous_manifest, scratch=model_input, private=private
        )
        broken = prepared.report["broken"]
        logger.info("%s: %d images, %d broken", site, prepared.report["counts"]["used"], len(broken))
        for fault in by_fault([Broken(**entry) for entry in broken]):
            logger.warning("%s: %s: %s (left out; %s)", site, fault.file, fault.reason, fault.cure)
        if broken:
            logger.warning("%s: each file is listed in the site's report.json below 02_intermediate", site)
        if broken and prepared.report["pseudonyms"]:
            logger.warning("%s: names stand for files as %s lists them", site, private / "names.csv")
        return prepared.manifest, prepared.arrays, prepared.report

    return prepare
