"""The project's pipelines, by name."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from pathlib import Path

from kedro.pipeline import Pipeline, pipeline
from kedro.utils import find_kedro_project

from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES, discover_sites, may_hold_volumes
from fedsca_pipeline.pipelines.comparison import pipeline as comparison_pipeline
from fedsca_pipeline.pipelines.data_report import pipeline as data_report_pipeline
from fedsca_pipeline.pipelines.demo_sites import pipeline as demo_sites_pipeline
from fedsca_pipeline.pipelines.deployed_training import pipeline as deployed_pipeline
from fedsca_pipeline.pipelines.evaluation import pipeline as evaluation_pipeline
from fedsca_pipeline.pipelines.federated_training import pipeline as training_pipeline
from fedsca_pipeline.pipelines.forget_site import pipeline as forget_pipeline
from fedsca_pipeline.pipelines.foundation import pipeline as foundation_pipeline
from fedsca_pipeline.pipelines.import_sites import pipeline as import_pipeline
from fedsca_pipeline.pipelines.in_force import pipeline as in_force_pipeline
from fedsca_pipeline.pipelines.predict import pipeline as predict_pipeline
from fedsca_pipeline.pipelines.preprocessing import pipeline as preprocessing_pipeline

# Kedro does not tell the registry which data it asks for; a hook that sees the context sets both of these.
raw_folder: ContextVar[Path | None] = ContextVar("raw_folder", default=None)
deployed: ContextVar[bool] = ContextVar("deployed", default=False)


def register_pipelines() -> dict[str, Pipeline]:
    """Return all pipelines, with nodes for each site folder in ``data/01_raw``, or for the demonstration sites.

    With ``federation.fleet: flower``, ``federated_training`` and ``__default__`` are those of the coordinator.
    """
    # Kedro warns about dots outside namespaces; the data sets of a site are named <site>.<what>.
    warnings.filterwarnings("ignore", message="One or more dataset names contain '.'", category=UserWarning)
    raw = raw_folder.get() or (find_kedro_project(Path.cwd()) or Path.cwd()) / "data" / "01_raw"
    sites = discover_sites(raw) or DEMO_SITES
    volume_sites = [site for site in sites if may_hold_volumes(raw / site)]
    demo = demo_sites_pipeline.create_pipeline()
    # Each sum is sorted and checked anew, so a pipeline of many sites is built in one step.
    prepared = pipeline([demo, preprocessing_pipeline.create_pipeline(sites)])
    foundation_ = foundation_pipeline.create_pipeline()
    trained = training_pipeline.create_pipeline(sites)
    scores = evaluation_pipeline.create_scores(sites, volume_sites)
    figures = evaluation_pipeline.create_figures(sites)
    if deployed.get():
        federated = pipeline([foundation_, deployed_pipeline.create_pipeline()])
        whole = pipeline([federated, evaluation_pipeline.create_curves()])
    else:
        federated = pipeline([prepared, foundation_, trained, scores])
        whole = pipeline([federated, figures])
    return {
        "import_sites": import_pipeline.create_pipeline(),
        "predict": predict_pipeline.create_pipeline(),
        "forget_site": forget_pipeline.create_pipeline(),
        "in_force": in_force_pipeline.create_pipeline(),
        "demo_sites": demo,
        "data_report": pipeline([demo, data_report_pipeline.create_pipeline(sites)]),
        "preprocessing": prepared,
        "foundation": foundation_,
        "training": trained,
        "federated_training": federated,
        "evaluation": pipeline([scores, figures]),
        "comparison": pipeline([prepared, foundation_, comparison_pipeline.create_pipeline(sites)]),
        "__default__": whole,
    }
