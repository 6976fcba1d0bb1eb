"""Finished models of sites, tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, NormaliseConfig
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.site_model import save_site_model

SIZE = 32


def make_model(
    folder: Path,
    root: Path,
    classes: int = 1,
    head: str = "sigmoid",
    adapters: AdaptersConfig | None = None,
    **card_fields: Any,
) -> Path:
    """Save a tiny random model whose tensors look trained; return its folder."""
    config = FoundationConfig(name="random", head=head)
    network = load_foundation(config, root, image_size=SIZE, classes=classes)
    attach_adapters(network, adapters or AdaptersConfig(width=4))
    draw = torch.Generator().manual_seed(3)
    parameters = dict(network.named_parameters())
    tensors = {
        name: parameters[name].detach() + 0.3 * torch.randn(parameters[name].shape, generator=draw)
        for name in tensor_layout(network).efficient
    }
    card = {
        "site": "north",
        "strategy": "fedsca",
        "round": 3,
        "dice_validation": 0.5,
        "run": "0123456789abcdef",
        "foundation": config,
        "foundation_sha256": prepare_foundation(config, root).sha256,
        "foundation_root": root,
        "image_size": SIZE,
        "classes": classes,
        "normalise": NormaliseConfig(),
        "threshold": 0.5,
        **card_fields,
    }
    save_site_model(folder, network, tensors, card)
    return folder
