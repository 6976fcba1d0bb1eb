"""Attach adapters to a foundation, load saved ones, and group the model's tensors by their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, PreprocessingConfig
from fedsca_pipeline.errors import ConfigError, WeightsError, suggestion
from fedsca_pipeline.files import read_tensors
from fedsca_pipeline.model.adapters import fel
from fedsca_pipeline.model.foundation import BlockPaths, load_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.layout import TensorLayout, sha256_tensors

# Bottleneck widths of docs/method.md: 32 for embedding widths up to 384, else 64.
SMALL_EMBEDDING, SMALL_WIDTH, LARGE_WIDTH = 384, 32, 64

# Plain 'kedro run' would find the run up to date, since the model's card exists.
EXPORT_AGAIN = "export the site's model again with 'kedro run --pipeline=training'"

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def attach_adapters(model: SegmentationModel, config: AdaptersConfig) -> SegmentationModel:
    """Add fresh adapters to the encoder's transformer blocks, in place; they and the decoder become trainable.

    FEL and LoRA leave the logits unchanged until they are trained. The global random state does not change.

    Raises:
        ConfigError: PEFT does not know the method, or the method does not attach to linear layers, refuses an option,
            or changes the foundation's pretrained values (as LoRA started by PiSSA does).
    """
    peft_config = _peft_config(model.blocks, config)
    pretrained = {} if config.method.lower() == fel.METHOD else dict(model.encoder.named_parameters())
    before = sha256_tensors(pretrained)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model.encoder = get_peft_model(model.encoder, peft_config)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"adapters.method: {config.method!r} cannot be attached to this foundation: {error}"
        ) from error
    if sha256_tensors(pretrained) != before:
        raise ConfigError(
            f"adapters.options: with {config.options} {config.method} changes the foundation's own values, which must "
            "stay frozen; remove that option"
        )
    model.decoder.requires_grad_(True)
    return model


def attach_like(model: SegmentationModel, folder: Path) -> SegmentationModel:
    """Add fresh adapters of the kind that PEFT saved in ``folder``, in place.

    The global random state does not change.

    Raises:
        WeightsError: the folder holds no adapter, or one for another architecture.
    """
    with _weights_errors(folder), torch.random.fork_rng(devices=[]):
        peft_config = _saved_config(folder)
        peft_config.inference_mode = False
        model.encoder = get_peft_model(model.encoder, peft_config)
    return model


def has_adapters(model: SegmentationModel) -> bool:
    """Return whether the encoder carries adapters."""
    return isinstance(model.encoder, PeftModel)


def load_adapters(model: SegmentationModel, folder: Path) -> SegmentationModel:
    """Load the adapters that PEFT saved in ``folder`` into the encoder, in place.

    If the encoder has adapters already, they take the saved values.

    Raises:
        WeightsError: the folder holds no adapter, or one for another architecture or of another kind.
    """
    with _weights_errors(folder):
        if isinstance(model.encoder, PeftModel):
            _read_values(model.encoder, folder)
        else:
            fel.register()
            model.encoder = PeftModel.from_pretrained(model.encoder, str(folder), use_safetensors=True)
    return model


@contextmanager
def without_adapters(model: SegmentationModel) -> Iterator[None]:
    """Disable the encoder's adapters for a block; afterwards the same parameters are trainable as before."""
    if not isinstance(model.encoder, PeftModel):
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuner: Any = model.encoder.base_model
    try:
        with warnings.catch_warnings():
            # PEFT warns that trained biases, which are the foundation's own parameters, stay as trained.
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
            tuner.disable_adapter_layers()
        yield
    finally:
        # PEFT makes every tensor of an adapter trainable.
        tuner.enable_adapter_layers()
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def tensor_layout(model: SegmentationModel) -> TensorLayout:
    """Return the names of a model's tensors by place: adapters by block from the input, decoder, pretrained encoder.

    The encoder's trainable tensors are the adapters. The decoder's head is all but its transformer: tokens, upscaling
    and hypernetworks.

    Raises:
        ConfigError: the PEFT method also trains tensors outside the blocks.
    """
    named = dict(model.named_parameters())
    adapters = [name for name, p in named.items() if p.requires_grad and name.startswith("encoder.")]
    blocks = tuple(tuple(name for name in adapters if f".{block.block}." in name) for block in model.blocks)
    if outside := set(adapters).difference(*blocks):
        raise ConfigError(f"adapters.options: these options train tensors outside the blocks, such as {min(outside)}")
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


def start_values(model: SegmentationModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Return copies of the named parameters: what training starts from."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


def build_trainable(
    foundation: FoundationConfig, adapters: AdaptersConfig, foundations: Path, preprocessing: PreprocessingConfig
) -> tuple[SegmentationModel, TensorLayout]:
    """Return the foundation with fresh adapters, on the CPU, and its tensors by place."""
    model = load_foundation(foundation, foundations, image_size=preprocessing.image_size, classes=preprocessing.classes)
    attach_adapters(model, adapters)
    return model, tensor_layout(model)


def _read_values(encoder: PeftModel, folder: Path) -> None:
    """Copy saved adapters of the same kind into the encoder's adapters.

    Raises:
        ValueError: the saved adapters are of another kind, or tensors are missing.
        RuntimeError: a shape differs.
    """
    attached = _deciding_fields(encoder.peft_config[encoder.active_adapter])
    if _deciding_fields(_saved_config(folder)) != attached:
        raise ValueError("the saved adapters are of another kind than the run's")
    values = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME, cure=EXPORT_AGAIN)
    if values.keys() != get_peft_model_state_dict(encoder).keys():
        raise ValueError("the saved adapters lack tensors of the run's, or have others")
    set_peft_model_state_dict(encoder, values)


def _saved_config(folder: Path) -> PeftConfig:
    fel.register()
    config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    return config


def _deciding_fields(config: PeftConfig) -> dict[str, Any]:
    """Return the fields that decide an adapter's output; task, base model and PEFT version do not.

    The tensors' names already say where the adapters are, and PEFT shortens a long list of ``target_modules``.
    """
    general = {field.name for field in fields(PeftConfig)} - {"peft_type"}
    return {name: value for name, value in asdict(config).items() if name not in general | {"target_modules"}}


@contextmanager
def _weights_errors(folder: Path) -> Iterator[None]:
    """Raise errors of PEFT and of reading in the block as WeightsError that names ``folder``."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise WeightsError(
            f"{folder}: holds no adapter for this foundation that can be read ({error}); {EXPORT_AGAIN}"
        ) from error


def _peft_config(blocks: tuple[BlockPaths, ...], config: AdaptersConfig) -> PeftConfig:
    fel.register()
    method = config.method.upper()
    if method not in PeftType.__members__:
        known = sorted(name.lower() for name in PeftType.__members__)
        raise ConfigError(
            f"adapters.method: {config.method!r} is no PEFT method{suggestion(config.method.lower(), known)}"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    targets = _TARGETS.get(config.method.lower(), _linear_targets)(blocks, config)
    allowed = {f.name for f in fields(config_class)}
    if unknown := sorted(({*config.options, *targets}) - allowed):
        raise ConfigError(
            f"adapters.options: {', '.join(unknown)} unknown to PEFT's {config_class.__name__}"
            f"{suggestion(unknown[0], sorted(allowed))}"
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
