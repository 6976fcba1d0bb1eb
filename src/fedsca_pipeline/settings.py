"""Kedro's project settings."""

from fedsca_pipeline.datasets.catalog import ProjectCatalog
from fedsca_pipeline.hooks.tracking import ProjectHooks

HOOKS = (ProjectHooks(),)

DATA_CATALOG_CLASS = ProjectCatalog

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment changes single keys of a parameter group, it does not replace the group.
    "merge_strategy": {"parameters": "soft", "mlflow": "soft"},
    "config_patterns": {"mlflow": ["mlflow*"]},
}
