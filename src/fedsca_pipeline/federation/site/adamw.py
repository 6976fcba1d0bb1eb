"""AdamW for one phase of a site's round, and its moments from round to round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fedsca_pipeline.config import TrainingConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def build_optimiser(
    parameters: Mapping[str, torch.nn.Parameter],
    decoder: Collection[str],
    training: TrainingConfig,
    moments: Mapping[str, Tensor],
) -> torch.optim.AdamW:
    """Return AdamW over ``parameters``; those of the ``decoder`` have a learning rate of their own.

    ``moments`` are those of :func:`moments_of`; a parameter that is missing there starts without.
    """
    rates = {False: training.learning_rate, True: training.learning_rate * training.decoder_factor}
    groups = [
        {"params": [p for name, p in parameters.items() if (name in decoder) == in_decoder], "lr": rate}
        for in_decoder, rate in rates.items()
    ]
    optimiser = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=training.weight_decay, fused=True)
    for name, parameter in parameters.items():
        if f"{name}/step" in moments:
            optimiser.state[parameter] = {
                key: moments[f"{name}/{key}"].clone().to(parameter.device) for key in _MOMENTS
            }
    return optimiser


def moments_of(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return AdamW's moments of the named parameters, on the CPU, as ``<name>/<moment>``."""
    return {
        f"{name}/{key}": value.detach().cpu().clone()
        for name in names
        for key, value in optimiser.state[parameters[name]].items()
    }
