"""Kedro's ``run`` with plain errors, the final table and the next commands to type."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, cast

import click
from kedro import KedroDeprecationWarning
from kedro.config import MissingConfigException
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.cli.utils import split_string
from kedro.framework.project import pipelines
from kedro.io import DatasetError
from omegaconf import OmegaConf
from yaml import YAMLError

from fedsca_pipeline.errors import ConfigError, FedscaError, suggestion
from fedsca_pipeline.hooks.slices import RUNNERS, check_slices
from fedsca_pipeline.hooks.up_to_date import RunUpToDate
from fedsca_pipeline.settings import ROOT_LOCK, TRACKING
from fedsca_pipeline.terminal import show_result

_INTERRUPTED = 130


@click.group(name="fedsca_pipeline")
def cli() -> None:
    """Commands of this project."""


def _run(**options: Any) -> Any:
    # README uses the option that users know; Kedro 1.7 warns that it will be renamed.
    warnings.filterwarnings("ignore", message="Option '--pipeline' is deprecated", category=KedroDeprecationWarning)
    names = [options["pipeline"]] if options["pipeline"] else options["pipelines"]
    for name in names:
        if name not in pipelines:
            raise click.BadParameter(f"there is no pipeline {name!r}{suggestion(name, sorted(pipelines))}")
    try:
        _check_runner(options)
        return _run_kedro(names, options)
    except RunUpToDate as done:
        click.echo("Everything is up to date: nothing was run (--params=force=true runs anyway).")
        show_result(done.table, done.mlflow, done.volumes)
        return {}
    except (FedscaError, DatasetError, MissingConfigException) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.strerror or error}: {error.filename or 'no file named'}") from error
    except KeyboardInterrupt:
        TRACKING.interrupted()
        click.echo("\nStopped. The same command (without force) resumes from the last finished round.", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None
    finally:
        # Kedro calls no hook on Ctrl-C, nor when a check stops the run.
        ROOT_LOCK.release()


def _run_kedro(names: list[str], options: Mapping[str, Any]) -> Any:
    try:
        return _callback(kedro_run)(**options)
    except ValueError:
        # Kedro's answer to a name that it does not know; any other ValueError is a fault of the program.
        check_slices(names, options)
        raise


def _check_runner(options: Mapping[str, Any]) -> None:
    """Refuse what Kedro would end with a traceback: an unknown runner, and saving in the background."""
    if options["is_async"] or options["runner_params"].get("is_async"):
        raise ConfigError(
            "--async: rounds are saved one after the other, nothing can be loaded or saved in the background; leave it "
            "out. --runner=ParallelRunner prepares sites side by side"
        )
    # A name with a dot is somebody's own class.
    if (runner := options["runner"]) and "." not in runner and runner not in RUNNERS:
        raise ConfigError(f"--runner: {runner!r} cannot run this project{suggestion(runner, RUNNERS)}")


def _callback(owner: click.Command | click.Parameter) -> Callable[..., Any]:
    # Click's type allows None; Kedro sets it on both.
    return cast("Callable[..., Any]", owner.callback)


def _read_params(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Read ``--params`` as Kedro does, and lists as well (``a=x,y``), which Kedro reads as keys without a value."""
    items: list[str] = []
    for piece in split_string(context, option, value) if isinstance(value, str) else ():
        if "=" in piece or not items:
            items.append(piece)
        else:
            items[-1] += f",{piece}"
    lists = [item for item in items if re.search(r",|=\s*[\[{]", item)]
    plain = ",".join(item for item in items if item not in lists) if items else value
    merged = OmegaConf.create(_callback(_PARAMS)(context, option, plain))
    for item in lists:
        key, _, listed = item.partition("=")
        try:
            merged.merge_with_dotlist([f"{key.strip()}={listed if listed.startswith(('[', '{')) else f'[{listed}]'}"])
        except YAMLError as error:
            raise click.BadParameter(f"{key}: {listed} is no list; write {key}=one,two or {key}=[one,two]") from error
    return OmegaConf.to_container(merged)


_PARAMS = next(option for option in kedro_run.params if option.name == "params")
_with_lists = copy(_PARAMS)
_with_lists.callback = _read_params
run = click.Command(
    name="run",
    params=[_with_lists if option is _PARAMS else option for option in kedro_run.params],
    callback=_run,
    help=kedro_run.help,
)
cli.add_command(run)
