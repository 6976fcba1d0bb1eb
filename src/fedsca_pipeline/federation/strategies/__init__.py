"""The registry of federated methods, one file each; a method's file is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from fedsca_pipeline.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions
    from fedsca_pipeline.model.layout import TensorLayout

STRATEGIES: Mapping[str, str] = MappingProxyType(
    {
        "fedsca": "sgca:FedSca",
        "local": "local:Local",
        "local_full": "local_full:LocalFull",
        "centralised": "centralised:Centralised",
        "fedavg_full": "fedavg_full:FedAvgFull",
        "fedavg": "fedavg:FedAvg",
        "fedavg_low": "fedavg_low:FedAvgLow",
        "fedprox": "fedprox:FedProx",
        "scaffold": "scaffold:Scaffold",
        "fednova": "fednova:FedNova",
        "fedbn": "fedbn:FedBn",
        "fedper": "fedper:FedPer",
        "fedrep": "fedrep:FedRep",
        "ditto": "ditto:Ditto",
        "fedamp": "fedamp:FedAmp",
        "pfedgraph": "pfedgraph:PFedGraph",
        "fedsa_lora": "fedsa_lora:FedSaLora",
        "ffa_lora": "ffa_lora:FfaLora",
        "flap_sam": "flap_sam:FlapSam",
        "median": "median:Median",
        "trimmed_mean": "trimmed_mean:TrimmedMean",
        "krum": "krum:Krum",
    }
)
"""Value of ``federation.strategy`` to its class, as ``module:class`` in this package."""


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of the strategy ``name``; ConfigError for an unknown name, with the nearest known one."""
    if name not in STRATEGIES:
        raise ConfigError(f"federation.strategy is {name!r}{suggestion(name, STRATEGIES)}")
    module, _, attribute = STRATEGIES[name].partition(":")
    found: type[Strategy] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found


def strategy_options(name: str, options: Mapping[str, Any]) -> StrategyOptions:
    """Return the checked options of a strategy, the content of ``strategies.<name>``; {} stands for the defaults.

    Raises ConfigError for an unknown name and for each wrong option, with its YAML key, its value and what is allowed.
    """
    model = strategy_class(name).Options
    try:
        return model(**options)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(name, model, options, error))) from error


def build_strategy(name: str, options: Mapping[str, Any], layout: TensorLayout) -> Strategy:
    """Return the strategy ``name`` for one model; see :func:`strategy_options`.

    Before a model exists, ``strategy_class`` and ``strategy_options`` tell all that does not depend on it.
    """
    return strategy_class(name)(strategy_options(name, options), layout)


def check_options(strategies: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Check every key and value under ``strategies``, also of strategies that are not used.

    Raises ConfigError naming the YAML key.
    """
    check_names(strategies)
    for name, options in strategies.items():
        strategy_options(name, options or {})


def check_names(strategies: Mapping[str, Any]) -> None:
    """Check that every key of ``strategies`` is a strategy, without importing any; ConfigError names the key."""
    for name in strategies:
        if name not in STRATEGIES:
            raise ConfigError(f"strategies.{name} is no strategy{suggestion(name, STRATEGIES)}")


def _faults(name: str, model: type[BaseModel], options: Mapping[str, Any], error: ValidationError) -> list[str]:
    # A union reports once per alternative: one line per key is enough, with all alternatives on it.
    messages: dict[str, list[str]] = {}
    for fault in error.errors():
        messages.setdefault(str(fault["loc"][0]), []).append(fault["msg"])
    return [_fault(f"strategies.{name}.", model, key, options[key], texts) for key, texts in messages.items()]


def _fault(group: str, model: type[BaseModel], key: str, value: Any, texts: list[str]) -> str:
    if key not in model.model_fields:
        return f"{group}{key} is no option{suggestion(key, model.model_fields)}"
    allowed = model.model_fields[key].description
    return f"{group}{key} is {value!r}: {'; or '.join(dict.fromkeys(texts))}. Allowed: {allowed}"
