"""The registry: names, options and the errors for wrong ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
from server_steps import flat_layout

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies import (
    STRATEGIES,
    build_strategy,
    check_options,
    strategy_class,
    strategy_options,
)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_built_by_its_name_with_described_defaults(name):
    strategy = build_strategy(name, {}, flat_layout(2))

    assert isinstance(strategy, strategy_class(name))
    assert strategy.name == name
    assert all(field.description for field in strategy.Options.model_fields.values())


def test_the_defaults_of_fedsca():
    options = strategy_options("fedsca", {})

    assert options.model_dump() == {
        "shared_blocks": "low",
        "share_decoder": False,
        "prior": "samples",
        "lora_merge": "a_only",
        "weighting": "gate",
        "granularity": "model",
        "memory": True,
        "gate": "continuous",
        "rho": 0.5,
        "trust": 0.3,
        "simplex_penalty": 0.8,
        "softmax_self": 0.3,
        "softmax_temperature": 0.1,
        "compare": "updates",
        "mu": 0.0,
        "step": 1.0,
    }


def test_the_error_for_an_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(
        ConfigError, match=r"federation\.strategy is 'fedsac'.*'fedsca'\? Allowed: fedsca, local, local_full,"
    ):
        build_strategy("fedsac", {}, flat_layout())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("rho", 1.0, "0 <= rho < 1"),
        ("rho", float("nan"), "0 <= rho < 1"),
        ("trust", 0, "0 < g0 <= 1"),
        ("weighting", "gates", "gate, simplex, softmax or uniform"),
        ("gate", "soft", "continuous or hard"),
        ("granularity", "layer", "model .* or block"),
        ("prior", "size", "samples .* or uniform"),
        ("memory", "often", "true or false"),
        ("simplex_penalty", 0, "1e-3 <= alpha"),
        ("softmax_self", 1.1, "0 to 1"),
        ("softmax_temperature", -1, "1e-3 <= t"),
        ("lora_merge", "both", "a_only"),
        ("shared_blocks", "lowest", "low .*high .*all, none, or a list"),
        ("shared_blocks", [-1], "block numbers from 0"),
        ("shared_blocks", [0, 0], "block numbers from 0"),
        ("shared_blocks", ["1"], "block numbers from 0"),
        ("shared_blocks", None, "block numbers from 0"),
    ],
)
def test_the_error_for_a_wrong_option_names_its_key_its_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ConfigError, match=rf"strategies\.fedsca\.{key} is .*Allowed: .*{allowed}") as caught:
        strategy_options("fedsca", {key: value})

    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_error_for_an_unknown_option_suggests_the_nearest():
    with pytest.raises(
        ConfigError, match=r"strategies\.fedsca\.share_block is no option; did you mean 'shared_blocks'"
    ):
        strategy_options("fedsca", {"share_block": "all"})
    with pytest.raises(ConfigError, match=r"strategies\.local\.rho is no option\. Allowed: none"):
        strategy_options("local", {"rho": 0.5})


def test_one_error_names_all_wrong_options():
    with pytest.raises(ConfigError, match=r"(?s)rho.*trust"):
        strategy_options("fedsca", {"rho": 2, "trust": 2})


def test_the_registry_imports_no_torch():
    code = "import sys, fedsca_pipeline.federation.strategies; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mistyped_strategy_or_option_is_refused_even_if_it_is_not_used() -> None:
    with pytest.raises(ConfigError, match=r"strategies\.fedsac is no strategy; did you mean 'fedsca'"):
        check_options({"fedsac": {"rho": 0.9}})
    with pytest.raises(ConfigError, match=r"strategies\.fedavg\.shared_block is no option"):
        check_options({"fedsca": {}, "fedavg": {"shared_block": "all"}})
    check_options({"fedsca": None, "local": {}})
