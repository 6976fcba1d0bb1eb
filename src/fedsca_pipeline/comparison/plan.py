"""The grid: which cells a comparison has, and what identifies each.

A cell is one method, trained once. Everything that decides its numbers is in its description, and the description's
fingerprint names its result, so that a new method or seed costs new cells only and two rows that mean the same are
computed once.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from fedsca_pipeline.config import GROUPS, ComparisonConfig, FederationConfig, MethodConfig, Settings
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.run import CHANGES_NO_NUMBER
from fedsca_pipeline.federation.strategies import STRATEGIES, strategy_class, strategy_options
from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions
from fedsca_pipeline.files import fingerprint

logger = logging.getLogger(__name__)


Values = Mapping[str, Any]

# What a method may set; the data and the foundation are the same for all.
_GROUPS: Mapping[str, type[BaseModel]] = {
    name: GROUPS[name] for name in ("adapters", "training", "federation", "evaluation")
}
# What a method has a key of its own for; set all the same, it would change nothing.
_OWN_KEYS: Mapping[str, str] = {"federation.strategy": "strategy", "adapters.seed": "seeds"}
_RATE = "training.learning_rate"


@dataclass(frozen=True)
class Method:
    """A row of the comparison, its parameters resolved.

    ``groups`` are JSON values of adapters, training, federation and evaluation; ``rates`` the learning rates to choose
    from; ``rates_of`` names the method whose choice it follows, itself where it chooses. ``tuned`` says what was chosen
    before the grid, and how.
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
    """One training: ``sites`` train, ``unseen`` are tested without. ``train_images`` a site, None for all it has."""

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
        """16 hex digits over the description, which holds neither the method's name nor the code's version."""
        return fingerprint(self.description)

    def __str__(self) -> str:
        images = "all images" if self.train_images is None else f"{self.train_images} images"
        without = f", without {self.left_out}" if self.left_out else ""
        return f"{self.method}, seed {self.seed}, {images}, rate {self.learning_rate:g}{without}"


@dataclass(frozen=True)
class Setting:
    """What all cells have in common: base parameter groups as JSON values, data versions by site, and the rest."""

    base: Mapping[str, Values]
    strategies: Mapping[str, Values | None]
    data: Mapping[str, str]
    foundation: str
    config: ComparisonConfig

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that train, unless they are left out."""
        return tuple(site for site in sorted(self.data) if site not in self.config.unseen_sites)


def resolve_methods(setting: Setting) -> dict[str, Method]:
    """Return the methods to compare, by name.

    One that the sites have not permitted (``centralised``) is left out, unless ``comparison.only`` names it.

    Raises:
        ConfigError: naming the YAML key of an unknown strategy or option, of a value out of range, of a pair that does
            not go together, of a site that is not there, of too few sites, or of a quorum that they cannot make.
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
    """Return the cells among which methods choose their learning rate: first seed, first number of images."""
    return [
        _cell(method, setting, method.seeds[0], method.train_images[0], rate, left_out=None)
        for method in methods.values()
        if method.rates_of == method.name
        for rate in method.rates
    ]


def cells(methods: Mapping[str, Method], setting: Setting, rates: Mapping[str, float]) -> list[Cell]:
    """Return the grid, given each method's learning rate; methods without one are left out. First seeds come first."""
    left_out = setting.sites if setting.config.leave_one_out else ()
    found = [
        (order, _cell(method, setting, seed, count, rates[method.rates_of], left))
        for method in methods.values()
        if method.rates_of in rates
        for order, seed in enumerate(method.seeds)
        for count in method.train_images
        # Of an ablation nobody asks what a site receives that did not train.
        for left in (None, *(left_out if method.ablation is None else ()))
    ]
    return [cell for _, cell in sorted(found, key=lambda pair: pair[0])]


def choose_rates(methods: Mapping[str, Method], tuned: Iterable[tuple[Cell, float]]) -> dict[str, float]:
    """Return the learning rate of each method, the best of its ``tuned`` cells by mean validation Dice.

    A method one of whose cells has no result is left out: its budget would not be that of the others.
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
    """Yield each fingerprint's first cell."""
    seen: set[str] = set()
    for cell in cells_:
        if cell.fingerprint not in seen:
            seen.add(cell.fingerprint)
            yield cell


def _method(name: str, config: MethodConfig, setting: Setting) -> Method | None:
    where = f"comparison.methods.{name}"
    strategy_name = config.strategy or name
    if strategy_name not in STRATEGIES:
        near = difflib.get_close_matches(strategy_name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{where}.strategy: {strategy_name!r} is no strategy, {hint}there are {', '.join(STRATEGIES)}"
        )
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
    own = setting.config
    counts = config.train_images or (own.train_images if config.ablation is None else own.train_images[:1])
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError(f"{where}.train_images: {list(counts)}; a site trains on 1 image at least, null: on all")
    own_rates = config.learning_rates or ([groups["training"]["learning_rate"]] if _RATE in config.set else [])
    chooser = name if config.ablation is None or own_rates else own.varied
    return Method(
        name=name,
        strategy=strategy,
        options=options,
        groups=groups,
        # What is named twice is one cell all the same.
        seeds=tuple(dict.fromkeys(config.seeds or own.seeds)),
        train_images=tuple(dict.fromkeys(counts)),
        rates=tuple(dict.fromkeys(own_rates or own.learning_rates or [groups["training"]["learning_rate"]])),
        rates_of=chooser,
        ablation=config.ablation,
        tuned=config.tuned,
    )


def _check_quorum(where: str, federation: FederationConfig, config: MethodConfig, setting: Setting) -> None:
    """Refuse a quorum above what is drawn of the sites that train in the method's smallest cell."""
    left_out = setting.config.leave_one_out and config.ablation is None
    sites = len(setting.sites) - left_out
    if federation.quorum > (drawn := federation.drawn(sites)):
        why = " where comparison.leave_one_out leaves one out" if left_out else ""
        raise ConfigError(
            f"{where}: federation.quorum: {federation.quorum}, but only {drawn} of {sites} sites are drawn in a "
            f"round{why}; lower it, or raise federation.participation"
        )


def _with_set(where: str, base: Mapping[str, Values], changes: Values) -> dict[str, Values]:
    groups = {group: dict(base[group]) for group in _GROUPS}
    for key, value in changes.items():
        group, _, rest = key.partition(".")
        if group not in groups or not rest:
            raise ConfigError(f"{where}.set: {key} cannot be set there; only keys of {', '.join(groups)} can")
        if key in _OWN_KEYS:
            raise ConfigError(f"{where}.set: {key} cannot be set there; {where}.{_OWN_KEYS[key]} is for that")
        place = groups[group]
        *path, last = rest.split(".")
        for part in path:
            inner = place.get(part) or {}
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{where}.set: {key} cannot be set there; {group}.{part} has no keys")
            place[part] = dict(inner)
            place = place[part]
        place[last] = value
    return {group: _validated(where, group, values) for group, values in groups.items()}


def _validated(where: str, group: str, values: Values) -> Values:
    try:
        return _GROUPS[group].model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        faults = [(".".join(map(str, (group, *fault["loc"]))), fault["msg"]) for fault in error.errors()]
        raise ConfigError(f"{where}.set: " + "; ".join(f"{key}: {said}" for key, said in faults)) from error


def _cell(method: Method, setting: Setting, seed: int, count: int | None, rate: float, left_out: str | None) -> Cell:
    config = setting.config
    sites = tuple(site for site in setting.sites if site != left_out)
    # What an unseen site receives is asked once, of each method, and of no ablation.
    asked = method.ablation is None and count == method.train_images[0]
    unseen = (*config.unseen_sites, *([left_out] if left_out else [])) if asked or left_out else ()
    groups = {name: dict(values) for name, values in method.groups.items()}
    groups["training"]["learning_rate"] = rate
    groups["adapters"]["seed"] = seed
    groups["federation"] = {
        key: value for key, value in groups["federation"].items() if key not in CHANGES_NO_NUMBER
    } | {"strategy": method.strategy.name}
    options = method.options.model_dump(mode="json", exclude_defaults=True)
    # What classes are called changes no number.
    fixed = {
        "preprocessing": {**setting.base["preprocessing"], "class_names": None},
        "foundation": setting.base["foundation"],
    }
    description = {
        "configuration": {
            **{name: _told(name, values) for name, values in {**fixed, **groups}.items()},
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


def _told(group: str, values: Values) -> Values:
    """Return a group without its defaults, so that a parameter which comes with a later version costs no result."""
    return GROUPS[group].model_validate(values).model_dump(mode="json", exclude_defaults=True)


THREADS = 1
"""Torch threads of a cell: many cells side by side use the cores better than one with all of them."""


def check_comparison(settings: Settings, comparison: ComparisonConfig, sites: Sequence[str]) -> None:
    """Check what ``make_plan`` would refuse, before there are data or a foundation.

    Raises:
        ConfigError: naming the YAML key.
    """
    make_plan(settings, comparison, dict.fromkeys(sites, ""), "")


def make_plan(
    settings: Settings, comparison: ComparisonConfig, data: Mapping[str, str], foundation: str
) -> dict[str, Any]:
    """Return the setting of all cells as JSON values, checked: every method resolves, and has sites to train on.

    ``data``: site to the version of its data. ``foundation``: SHA-256 of its weights.

    Raises:
        ConfigError: naming the YAML key.
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
            logger.warning("comparison.methods.%s is left out: the sites have not permitted what it does", name)
    return plan


def setting_of(plan: Mapping[str, Any]) -> Setting:
    """Return the setting that ``make_plan`` wrote as JSON values."""
    config = ComparisonConfig.model_validate(plan["comparison"])
    return Setting(plan["base"], plan["strategies"], plan["data"], plan["foundation"], config)
