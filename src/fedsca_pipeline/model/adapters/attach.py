"""Attach adapters to a foundation by name of the method, and tell which tensors belong to which block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import nn

from fedsca_pipeline.config import (
    AdaptersConfig,
    FoundationConfig,
    PreprocessingConfig,
)
from fedsca_pipeline.errors import ConfigError, WeightsError
from fedsca_pipeline.files import read_tensors
from fedsca_pipeline.model.adapters import fel
from fedsca_pipeline.model.foundation.model import BlockPaths, SegmentationModel
from fedsca_pipeline.model.layout import TensorLayout, sha256_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from fedsca_pipeline.model.foundation.model import SegmentationModel

# Widths of docs/method.md: 32 for embedding widths up to 384, else 64.
SMALL_EMBEDDING, SMALL_WIDTH, LARGE_WIDTH = 384, 32, 64

# The whole command finds nothing to do where a model's card is there.
EXPORT_AGAIN = "export the site's model again with 'kedro run --pipeline=training'"

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def attach_adapters(model: SegmentationModel, config: AdaptersConfig) -> SegmentationModel:
    """Wrap the encoder's transformer blocks with fresh adapters and make them and the decoder trainable, in place.

    FEL and LoRA change nothing until they are trained. The random state outside is left as it was.

    Raises:
        ConfigError: the method is unknown to PEFT, does not attach to linear layers, changes the foundation's own
            values (LoRA started by PiSSA does), or refuses an option.
    """
    peft_config = _peft_config(model.blocks, config)
    own = {} if config.method.lower() == fel.METHOD else dict(model.encoder.named_parameters())
    before = sha256_tensors(own)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model.encoder = get_peft_model(model.encoder, peft_config)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"adapters.method: {config.method!r} cannot be attached to this foundation: {error}"
        ) from error
    if sha256_tensors(own) != before:
        raise ConfigError(
            f"adapters.options: with {config.options} {config.method} changes the foundation's own values, and they "
            "stay as they are here; take that option out"
        )
    model.decoder.requires_grad_(True)
    return model


def attach_like(model: SegmentationModel, folder: Path) -> SegmentationModel:
    """Wrap the encoder with fresh adapters of the kind that PEFT saved in ``folder``, in place.

    The random state outside is left as it was.

    Raises:
        WeightsError: the folder holds no adapter, or one for another architecture.
    """
    with _told_of(folder), torch.random.fork_rng(devices=[]):
        kind = _saved_kind(folder)
        kind.inference_mode = False
        model.encoder = get_peft_model(model.encoder, kind)
    return model


def has_adapters(model: SegmentationModel) -> bool:
    """Return whether the encoder carries adapters."""
    return isinstance(model.encoder, PeftModel)


def load_adapters(model: SegmentationModel, folder: Path) -> SegmentationModel:
    """Wrap the encoder with the adapters that PEFT saved in ``folder``, in place.

    An encoder that carries adapters already gets their values.

    Raises:
        WeightsError: the folder holds no adapter, or one for another architecture or of another kind.
    """
    with _told_of(folder):
        if has_adapters(model):
            _read_values(model.encoder, folder)
        else:
            fel.register()
            model.encoder = PeftModel.from_pretrained(model.encoder, str(folder), use_safetensors=True)
    return model


@contextmanager
def without_adapters(model: SegmentationModel) -> Iterator[None]:
    """Have the encoder pass its adapters by for a block; what takes gradients after it is what did before."""
    if not has_adapters(model):
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuner = model.encoder.base_model
    try:
        with warnings.catch_warnings():
            # Of biases, which PEFT trains as the foundation's own values and does not pass by.
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
            tuner.disable_adapter_layers()
        yield
    finally:
        # PEFT makes all of an adapter trainable.
        tuner.enable_adapter_layers()
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def tensor_layout(model: SegmentationModel) -> TensorLayout:
    """Group the names of a model's tensors: adapters by block, numbered from the input, decoder, the encoder's own.

    The decoder's head is what is not its transformer: tokens, upscaling and hypernetworks.

    Adapters and decoder are what ``attach_adapters`` made trainable.

    Raises:
        ConfigError: the PEFT method also trains tensors of the encoder that are in no block.
    """
    named = dict(model.named_parameters())
    adapters = [name for name, p in named.items() if p.requires_grad and name.startswith("encoder.")]
    blocks = tuple(tuple(name for name in adapters if f".{block.block}." in name) for block in model.blocks)
    if outside := set(adapters).difference(*blocks):
        raise ConfigError(f"adapters.options: they train tensors outside the blocks, such as {min(outside)}")
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    decoder = tuple(name for name in named if name.startswith("decoder."))
    return TensorLayout(
        blocks=blocks,
        decoder=decoder,
        head=tuple(name for name in decoder if not name.startswith("decoder.sam.transformer.")),
        shapes={name: tuple(p.shape) for name, p in named.items()},
        encoder=tuple(name for name in named if name.startswith("encoder.") and name not in set(adapters)),
        norms=tuple(name for name in named if name in norms),
    )


def _read_values(encoder: PeftModel, folder: Path) -> None:
    """Copy saved adapters of the same kind into those that an encoder carries.

    Raises:
        ValueError: they are of another kind, or not all there.
        RuntimeError: a shape is another one.
    """
    own = _what_counts(encoder.peft_config[encoder.active_adapter])
    if _what_counts(_saved_kind(folder)) != own:
        raise ValueError("they are of another kind than the run's")
    values = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME, cure=EXPORT_AGAIN)
    if values.keys() != get_peft_model_state_dict(encoder).keys():
        raise ValueError("some are missing, or not the run's")
    set_peft_model_state_dict(encoder, values)


def _saved_kind(folder: Path) -> PeftConfig:
    fel.register()
    return PeftConfig.from_pretrained(str(folder))


def _what_counts(kind: PeftConfig) -> dict[str, Any]:
    """Return what decides an adapter's output: not what it is for, nor what wrote it.

    Where it is, the names of its values tell; PEFT abridges a list of many ``target_modules`` as it attaches.
    """
    aside = {field.name for field in fields(PeftConfig)} - {"peft_type"}
    return {name: value for name, value in asdict(kind).items() if name not in aside | {"target_modules"}}


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise WeightsError(
            f"{folder}: no adapter for this foundation can be read there ({error}); {EXPORT_AGAIN}"
        ) from error


def _peft_config(blocks: tuple[BlockPaths, ...], config: AdaptersConfig) -> PeftConfig:
    fel.register()
    method = config.method.upper()
    if method not in PeftType.__members__:
        known = sorted(name.lower() for name in PeftType.__members__)
        near = get_close_matches(config.method.lower(), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"adapters.method: {config.method!r} is no PEFT method{hint} Known: {', '.join(known)}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    targets = _TARGETS.get(config.method.lower(), _linear_targets)(blocks, config)
    allowed = {f.name for f in fields(config_class)}
    if unknown := sorted(({*config.options, *targets}) - allowed):
        raise ConfigError(
            f"adapters.options: {', '.join(unknown)} unknown to PEFT's {config_class.__name__}; "
            f"it takes {', '.join(sorted(allowed))}"
        )
    try:
        return config_class(**{**targets, **config.options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapters.options: {config_class.__name__} refuses {config.options}: {error}") from error


def _fel_targets(blocks: tuple[BlockPaths, ...], config: AdaptersConfig) -> Mapping[str, Any]:
    small = max(block.width for block in blocks) <= SMALL_EMBEDDING
    return {
        "attention_modules": {block.attention: block.width for block in blocks},
        "mlp_modules": {block.mlp: block.width for block in blocks},
        "width": config.width or (SMALL_WIDTH if small else LARGE_WIDTH),
        "scale": config.scale,
        "seed": config.seed,
    }


def _linear_targets(blocks: tuple[BlockPaths, ...], config: AdaptersConfig) -> Mapping[str, Any]:
    return {"target_modules": [path for block in blocks for path in block.linears]}


_TARGETS: Mapping[str, Callable[[tuple[BlockPaths, ...], AdaptersConfig], Mapping[str, Any]]] = {
    fel.METHOD: _fel_targets,
}


def start_values(model: SegmentationModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Return copies of a model's parameters, by name."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


def build_trainable(
    foundation: FoundationConfig, adapters: AdaptersConfig, foundations: Path, preprocessing: PreprocessingConfig
) -> tuple[SegmentationModel, TensorLayout]:
    """Return the foundation with adapters attached, on the CPU, and the places of its tensors."""
    from fedsca_pipeline.model.foundation import load_foundation

    model = load_foundation(foundation, foundations, image_size=preprocessing.image_size, classes=preprocessing.classes)
    attach_adapters(model, adapters)
    return model, tensor_layout(model)
