"""Kedro's project settings."""

from fedsca_pipeline.datasets.catalog import ProjectCatalog
from fedsca_pipeline.hooks.checks import ParameterHooks
from fedsca_pipeline.hooks.root_lock import RootLock
from fedsca_pipeline.hooks.tracking import TrackingHooks
from fedsca_pipeline.hooks.up_to_date import UpToDateHooks

ROOT_LOCK = RootLock()
TRACKING = TrackingHooks()
# The last one is called first: MLflow has ended its runs before a run counts as done, and the lock goes last.
HOOKS = (ROOT_LOCK, ParameterHooks(ROOT_LOCK), UpToDateHooks(TRACKING), TRACKING)

DATA_CATALOG_CLASS = ProjectCatalog

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment changes single keys of a parameter group, it does not replace the group.
    "merge_strategy": {"parameters": "soft", "mlflow": "soft"},
    "config_patterns": {"mlflow": ["mlflow*"]},
}
