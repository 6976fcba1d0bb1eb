"""The plan of a comparison: its methods, its cells, and each cell's fingerprint.

A cell is one training of one method. A cell's description holds everything that decides its numbers; the description's
fingerprint names its result. A new method or seed therefore adds new cells only, and two rows with the same description
are computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from fedsca_pipeline.config import GROUPS, ComparisonConfig, FederationConfig, MethodConfig, Settings
from fedsca_pipeline.errors import ConfigError, counted, faults_by_key, suggestion
from fedsca_pipeline.federation.run import CHANGES_NO_NUMBER
from fedsca_pipeline.federation.strategies import STRATEGIES, strategy_class, strategy_options
from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions
from fedsca_pipeline.files import fingerprint

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]

# The parameter groups that a method may set. Data and foundation are the same for all methods.
_GROUPS: Mapping[str, type[BaseModel]] = {
    name: GROUPS[name] for name in ("adapters", "training", "federation", "evaluation")
}
# Parameters that have their own key in a method's entry; a value under `set` would have no effect.
_OWN_KEYS: Mapping[str, str] = {"federation.strategy": "strategy", "adapters.seed": "seeds"}
_RATE = "training.learning_rate"
THREADS = 1
"""Torch threads per cell: many single-threaded cells use the cores better than one cell with many threads."""


@dataclass(frozen=True)
class Method:
    """A row of the comparison with resolved parameters.

    ``groups`` are JSON values of adapters, training, federation and evaluation. ``rates`` are the learning rates to
    choose from; ``rates_of`` names the method that chooses (an ablation follows the method it varies). ``tuned`` is a
    note on what was chosen before the grid, and how.
    """

    name: str
    strategy: type[Strategy]
    options: StrategyOptions
    groups: Mapping[str, Values]
    seeds: tuple[int, ...]
    train_images: tuple[int | None, ...]
    rates: tuple[float, ...]
    rates_of: str
    ablation: str | None
    tuned: str | None = None


@dataclass(frozen=True)
class Cell:
    """One training: ``sites`` train, ``unseen`` are only tested. ``train_images`` is per site; None: all."""

    method: str
    strategy: str
    seed: int
    train_images: int | None
    learning_rate: float
    left_out: str | None
    sites: tuple[str, ...]
    unseen: tuple[str, ...]
    description: Values

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the description's hash; neither the method's name nor the code version is part of it."""
        return fingerprint(self.description)

    def __str__(self) -> str:
        images = "all images" if self.train_images is None else counted(self.train_images, "image")
        without = f", without {self.left_out}" if self.left_out else ""
        return f"{self.method}, seed {self.seed}, {images}, rate {self.learning_rate:g}{without}"


@dataclass(frozen=True)
class Setting:
    """What all cells share: parameter groups and strategy options as JSON values, versions of data and foundation."""

    base: Mapping[str, Values]
    strategies: Mapping[str, Values | None]
    data: Mapping[str, str]
    foundation: str
    config: ComparisonConfig

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that train, sorted: all but ``unseen_sites``."""
        return tuple(site for site in sorted(self.data) if site not in self.config.unseen_sites)


def resolve_methods(setting: Setting) -> dict[str, Method]:
    """Return the methods to compare, by name.

    A method that the sites have not permitted (``centralised``) is left out, unless ``comparison.only`` is set.

    Raises:
        ConfigError: with the YAML key: an unknown strategy, option or site; a value out of range; a strategy and an
            adapter that do not go together; too few sites; a quorum that some cell cannot reach.
    """
    config = setting.config
    if unknown := sorted(set(config.unseen_sites) - set(setting.data)):
        raise ConfigError(
            f"comparison.unseen_sites: no such site: {', '.join(unknown)}; there are {', '.join(sorted(setting.data))}"
        )
    if len(setting.sites) < 1 + config.leave_one_out:
        raise ConfigError("comparison.unseen_sites: no site is left to train")
    found = {name: _method(name, method, setting) for name, method in config.chosen.items()}
    return {name: method for name, method in found.items() if method is not None}


def tuning_cells(methods: Mapping[str, Method], setting: Setting) -> list[Cell]:
    """Return the cells that choose the learning rates: one per method and rate, first seed, first number of images."""
    return [
        _cell(method, setting, method.seeds[0], method.train_images[0], rate, left_out=None)
        for method in methods.values()
        if method.rates_of == method.name
        for rate in method.rates
    ]


def cells(methods: Mapping[str, Method], setting: Setting, rates: Mapping[str, float]) -> list[Cell]:
    """Return the grid's cells, first seeds first. A method without a learning rate in ``rates`` has no cell."""
    left_out = setting.sites if setting.config.leave_one_out else ()
    found = [
        (order, _cell(method, setting, seed, count, rates[method.rates_of], site))
        for method in methods.values()
        if method.rates_of in rates
        for order, seed in enumerate(method.seeds)
        for count in method.train_images
        # Ablations are not tested at sites that were left out.
        for site in (None, *(left_out if method.ablation is None else ()))
    ]
    return [cell for _, cell in sorted(found, key=lambda pair: pair[0])]


def choose_rates(methods: Mapping[str, Method], tuned: Iterable[tuple[Cell, float]]) -> dict[str, float]:
    """Return each method's learning rate: that of its ``tuned`` cell with the highest mean validation Dice.

    At a tie the lower rate wins. A method with a missing cell is left out: it would have had fewer tries than others.
    """
    scores: dict[str, dict[float, float]] = {}
    for cell, dice in tuned:
        scores.setdefault(cell.method, {})[cell.learning_rate] = dice
    return {
        name: max(sorted(found), key=found.__getitem__)
        for name, found in scores.items()
        if name in methods and set(found) == set(methods[name].rates)
    }


def unique(cells_: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the first cell of each fingerprint."""
    seen: set[str] = set()
    for cell in cells_:
        if cell.fingerprint not in seen:
            seen.add(cell.fingerprint)
            yield cell


def _method(name: str, config: MethodConfig, setting: Setting) -> Method | None:
    where = f"comparison.methods.{name}"
    strategy_name = config.strategy or name
    if strategy_name not in STRATEGIES:
        raise ConfigError(f"{where}.strategy: {strategy_name!r} is no strategy{suggestion(strategy_name, STRATEGIES)}")
    groups = _with_set(where, setting.base, config.set)
    try:
        strategy = strategy_class(strategy_name)
        given = {**(setting.strategies.get(strategy_name) or {}), **config.options}
        options = strategy_options(strategy_name, given)
        if not options.permitted and setting.config.only is None:
            return None
        strategy.check_use(options, groups["adapters"]["method"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not strategy.pools:
        _check_quorum(where, FederationConfig.model_validate(groups["federation"]), config, setting)
    grid = setting.config
    counts = config.train_images or (grid.train_images if config.ablation is None else grid.train_images[:1])
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError(
            f"{where}.train_images: {list(counts)}; each number must be at least 1, or null for all images"
        )
    own_rates = config.learning_rates or ([groups["training"]["learning_rate"]] if _RATE in config.set else [])
    return Method(
        name=name,
        strategy=strategy,
        options=options,
        groups=groups,
        # A value that is listed twice makes one cell.
        seeds=tuple(dict.fromkeys(config.seeds or grid.seeds)),
        train_images=tuple(dict.fromkeys(counts)),
        rates=tuple(dict.fromkeys(own_rates or grid.learning_rates or [groups["training"]["learning_rate"]])),
        rates_of=name if config.ablation is None or own_rates else grid.varied,
        ablation=config.ablation,
        tuned=config.tuned,
    )


def _check_quorum(where: str, federation: FederationConfig, config: MethodConfig, setting: Setting) -> None:
    """Check that the quorum is at most the number of sites drawn per round in the method's smallest cell."""
    left_out = setting.config.leave_one_out and config.ablation is None
    sites = len(setting.sites) - left_out
    if federation.quorum > (drawn := federation.drawn(sites)):
        why = " when comparison.leave_one_out leaves one out" if left_out else ""
        raise ConfigError(
            f"{where}: federation.quorum: {federation.quorum}, but only {drawn} of {counted(sites, 'site')} are drawn "
            f"per round{why}; lower the quorum or raise federation.participation"
        )


def _with_set(where: str, base: Mapping[str, Values], changes: Values) -> dict[str, Values]:
    groups = {group: dict(base[group]) for group in _GROUPS}
    for key, value in changes.items():
        group, _, rest = key.partition(".")
        if group not in groups or not rest:
            raise ConfigError(f"{where}.set: {key} cannot be set here; only keys of {', '.join(groups)} can")
        if key in _OWN_KEYS:
            raise ConfigError(f"{where}.set: {key} cannot be set here; use {where}.{_OWN_KEYS[key]}")
        parent = groups[group]
        *path, last = rest.split(".")
        for part in path:
            inner = parent.get(part) or {}
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{where}.set: {key} cannot be set here; {group}.{part} has no keys")
            parent[part] = dict(inner)
            parent = parent[part]
        parent[last] = value
    return {group: _validated(where, group, values) for group, values in groups.items()}


def _validated(where: str, group: str, values: Values) -> Values:
    try:
        return _GROUPS[group].model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(f"{where}.set: {'; '.join(faults_by_key(error, group))}") from error


def _cell(method: Method, setting: Setting, seed: int, count: int | None, rate: float, left_out: str | None) -> Cell:
    config = setting.config
    sites = tuple(site for site in setting.sites if site != left_out)
    # Each method is tested at unseen sites with one number of images; ablations are not.
    tested = method.ablation is None and count == method.train_images[0]
    unseen = (*config.unseen_sites, *([left_out] if left_out else [])) if tested or left_out else ()
    groups = {name: dict(values) for name, values in method.groups.items()}
    groups["training"]["learning_rate"] = rate
    groups["adapters"]["seed"] = seed
    groups["federation"] = {
        key: value for key, value in groups["federation"].items() if key not in CHANGES_NO_NUMBER
    } | {"strategy": method.strategy.name}
    options = method.options.model_dump(mode="json", exclude_defaults=True)
    # Class names change no number.
    fixed = {
        "preprocessing": {**setting.base["preprocessing"], "class_names": None},
        "foundation": setting.base["foundation"],
    }
    description = {
        "configuration": {
            **{name: _without_defaults(name, values) for name, values in {**fixed, **groups}.items()},
            "strategies": {method.strategy.name: options},
        },
        "seed": seed,
        "device": setting.base["run"]["device"],
        "threads": THREADS,
        "train_images": count,
        "unseen": {
            "sites": list(unseen),
            "shots": list(config.shots),
            "steps": config.shot_steps,
            "release_private": config.release_private,
        }
        if unseen
        else {},
        "data": {site: setting.data[site] for site in (*sites, *unseen)},
        "foundation": setting.foundation,
    }
    return Cell(method.name, method.strategy.name, seed, count, rate, left_out, sites, tuple(unseen), description)


def _without_defaults(group: str, values: Values) -> Values:
    """Return a group without default values: a parameter that a later version adds then changes no fingerprint."""
    return GROUPS[group].model_validate(values).model_dump(mode="json", exclude_defaults=True)


def check_comparison(settings: Settings, comparison: ComparisonConfig, sites: Sequence[str]) -> None:
    """Check the comparison's parameters as ``make_plan`` does, without data or a foundation.

    Raises:
        ConfigError: with the YAML key.
    """
    make_plan(settings, comparison, dict.fromkeys(sites, ""), "")


def make_plan(
    settings: Settings, comparison: ComparisonConfig, data: Mapping[str, str], foundation: str
) -> dict[str, Any]:
    """Return the checked setting of all cells as JSON values: every method resolves and has sites to train on.

    Args:
        settings: all parameter groups.
        comparison: the grid.
        data: version of each site's data.
        foundation: SHA-256 of the foundation's weights.

    Raises:
        ConfigError: with the YAML key.
    """
    plan = {
        "base": {name: getattr(settings, name).model_dump(mode="json") for name in GROUPS},
        "strategies": settings.strategies,
        "data": dict(data),
        "foundation": foundation,
        "comparison": comparison.model_dump(mode="json"),
    }
    setting = setting_of(plan)
    methods = resolve_methods(setting)
    for name in setting.config.chosen:
        if name not in methods:
            logger.warning("comparison.methods.%s is left out: the sites have not permitted it", name)
    return plan


def setting_of(plan: Mapping[str, Any]) -> Setting:
    """Return the setting that ``make_plan`` stored as JSON values."""
    config = ComparisonConfig.model_validate(plan["comparison"])
    return Setting(plan["base"], plan["strategies"], plan["data"], plan["foundation"], config)
