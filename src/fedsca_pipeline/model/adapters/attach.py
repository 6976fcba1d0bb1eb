"""Attach adapters to a foundation, load saved ones, and group the model's tensors by their place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, PreprocessingConfig
from fedsca_pipeline.errors import ConfigError, WeightsError, suggestion
from fedsca_pipeline.files import read_json, read_tensors
from fedsca_pipeline.model.adapters import fel
from fedsca_pipeline.model.foundation import BlockPaths, load_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.layout import TensorLayout, faults, sha256_tensors

# Bottleneck widths of docs/method.md: 32 for embedding widths up to 384, else 64.
SMALL_EMBEDDING, SMALL_WIDTH, LARGE_WIDTH = 384, 32, 64

# Plain 'kedro run' would find the run up to date, since the model's card exists.
EXPORT_AGAIN = "export the site's model again with 'kedro run --pipeline=training'"

# Of a JSON file of a saved model; those of the largest model are a hundred times smaller.
_MOST_BYTES = 2**20
# A name of a module, or a word; no pattern, path or code.
_WORD = re.compile(r"[\w.-]{0,300}")
_LARGEST, _LARGEST_SEED = 4096, 2**63
_SEEDS_AND_STEPS = frozenset({"seed", "projection_prng_key", "random_loc_seed", "total_step", "tinit", "tfinal"})
# Fields of PEFT's configuration that describe an adapter and do not decide its output.
_GENERAL = frozenset(field.name for field in fields(PeftConfig)) - {"peft_type"}
# Any value of a stranger's configuration can cause these in PEFT.
_PEFT_ERRORS = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError),
    *(RuntimeError, MemoryError, OSError, SafetensorError),
)

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def attach_adapters(model: SegmentationModel, config: AdaptersConfig) -> SegmentationModel:
    """Add fresh adapters to the encoder's transformer blocks, in place; they and the decoder become trainable.

    FEL and LoRA leave the logits unchanged until they are trained. The global random state does not change.

    Raises:
        ConfigError: PEFT does not know the method, or the method does not attach to linear layers, refuses an option,
            cannot compute on the encoder's maps, or changes the foundation's pretrained values (as LoRA started by
            PiSSA does).
    """
    peft_config = _peft_config(model.blocks, config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            foundation_changed = _wrap(model, peft_config)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"adapters.method: {config.method!r} cannot be attached to this foundation: {error}"
        ) from error
    if foundation_changed:
        raise ConfigError(
            f"adapters.options: with {config.options} {config.method} changes the foundation's own values, which must "
            "stay frozen; remove that option"
        )
    model.decoder.requires_grad_(True)
    return model


def attach_like(model: SegmentationModel, folder: Path, *, trainable: bool = True) -> SegmentationModel:
    """Add fresh adapters of the kind that PEFT saved in ``folder``, in place.

    The global random state does not change.

    Raises:
        WeightsError: the folder holds no adapter, or one for another architecture.
    """
    with _weights_errors(folder), torch.random.fork_rng(devices=[]):
        config = _saved_config(folder)
        if isinstance(config, fel.FelConfig):
            _check_widths(config, model.blocks)
        config.inference_mode = not trainable
        if _wrap(model, config):
            raise ValueError("it changes the foundation's own values")
    return model


def has_adapters(model: SegmentationModel) -> bool:
    """Return whether the encoder carries adapters."""
    return isinstance(model.encoder, PeftModel)


def load_adapters(model: SegmentationModel, folder: Path) -> SegmentationModel:
    """Load the adapters that PEFT saved in ``folder`` into the encoder, in place.

    If the encoder has adapters already, they take the saved values. PEFT only builds the modules: both files are read
    here, so that no network is asked for a missing one, and nothing is unpickled.

    Raises:
        WeightsError: the folder holds no adapter, or one for another architecture or of another kind.
    """
    if not has_adapters(model):
        attach_like(model, folder, trainable=False)
    encoder: Any = model.encoder
    with _weights_errors(folder):
        if _deciding_fields(_saved_config(folder)) != _deciding_fields(encoder.peft_config[encoder.active_adapter]):
            raise ValueError("the saved adapters are of another kind than the run's")
        values = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME, cure=EXPORT_AGAIN)
        if wrong := faults(values, get_peft_model_state_dict(encoder, save_embedding_layers=False)):
            raise ValueError("; ".join(wrong[:3]))
        set_peft_model_state_dict(encoder, values)
    return model


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file of a saved model.

    Raises:
        ValueError: it is no JSON object of at most a mebibyte.
        OSError: it cannot be read.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} has more than {_MOST_BYTES:,} bytes")
    try:
        value = read_json(path)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value


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


def _wrap(model: SegmentationModel, config: PeftConfig) -> bool:
    """Put adapters around the encoder's modules, and return whether that changed the foundation's own values.

    Raises:
        ValueError: the adapters cannot compute on the encoder's maps.
    """
    pretrained = {} if isinstance(config, fel.FelConfig) else dict(model.encoder.named_parameters())
    before = sha256_tensors(pretrained)
    encoder: Any = get_peft_model(model.encoder, config)
    if isinstance(getattr(config, "target_modules", None), str):
        # A pattern is not read back, so the names that it matched are saved.
        config.target_modules = sorted(encoder.base_model.targeted_module_names)  # type: ignore[attr-defined]  # not of every tuner
    _try_out(encoder, model.blocks[0])
    model.encoder = encoder
    return sha256_tensors(pretrained) != before


def _try_out(encoder: PeftModel, block: BlockPaths) -> None:
    """Check that a block with adapters computes on a map [batch, height, width, channels].

    Several of PEFT's methods attach and fail when run: they take any input with four axes for a convolution's (OFT),
    count on other axes (GraLoRA, AdaMSS), or need an argument in every call (Poly).

    Raises:
        ValueError: it cannot.
    """
    try:
        with torch.no_grad():
            for path in (block.attention, block.mlp):
                encoder.get_base_model().get_submodule(path)(torch.zeros(1, 2, 2, block.width))
    except _PEFT_ERRORS as error:
        raise ValueError(
            f"it attaches, but cannot compute on maps [batch, height, width, channels] ({error})"
        ) from error


def _saved_config(folder: Path) -> PeftConfig:
    """Return the configuration that PEFT saved in ``folder``.

    Raises:
        ValueError: it is none, or has values that no adapter of this project has.
        OSError: it cannot be read.
    """
    fel.register()
    saved = read_object(folder / CONFIG_NAME)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(saved.get("peft_type"))]
    options = {name: value for name, value in saved.items() if name not in _GENERAL | {"peft_type"}}
    if issubclass(kind, PromptLearningConfig):
        raise ValueError(f"peft_type: {saved['peft_type']} attaches to no linear layer")
    if unknown := sorted(options.keys() - {field.name for field in fields(kind)}):
        raise ValueError(f"{CONFIG_NAME}: {unknown[0]} is unknown to PEFT's {kind.__name__}")
    if isinstance(options.get("target_modules"), str):
        raise ValueError(f"{CONFIG_NAME}: target_modules is a pattern; it must be a list of names")
    numbers = {f.name for f in fields(kind) if isinstance(f.default, int | float) and not isinstance(f.default, bool)}
    odd = [f"{name}: {options[name]!r:.80} is no number" for name in sorted(numbers & options.keys())
           if not isinstance(options[name], int | float)]  # fmt: skip
    if odd := odd + _odd_options(options):
        raise ValueError(f"{CONFIG_NAME}: {odd[0]}")
    return kind(**options)


def _odd_options(options: Mapping[str, Any]) -> list[str]:
    """Return a line per option that is no plain word, switch or number within bounds, nor a group of these.

    Paths, patterns, code and configurations of further libraries are none.
    """
    odd = []
    for name, value in options.items():
        if value and name.endswith(("_config", "_file", "_path", "adapters", "tokens")):
            odd.append(f"{name}: {value!r:.80} is for other models or libraries; leave it out")
            continue
        most = _LARGEST_SEED if name in _SEEDS_AND_STEPS else _LARGEST
        entries = [*value, *value.values()] if isinstance(value, dict) else value
        for entry in entries if isinstance(value, dict | list | tuple | set) else [value]:
            plain = entry is None or (isinstance(entry, int | float) and abs(entry) <= most)
            if not plain and not (isinstance(entry, str) and _WORD.fullmatch(entry)):
                odd.append(f"{name}: {entry!r:.80} is no plain word, and no number up to {most:,}")
    return odd


def _check_widths(config: fel.FelConfig, blocks: Sequence[BlockPaths]) -> None:
    """Check, before memory is allocated, that adapters are at the foundation's modules.

    Raises:
        ValueError: a module is unknown, or of another width.
    """
    for name, block_path in (("attention_modules", "attention"), ("mlp_modules", "mlp")):
        known = {getattr(block, block_path): block.width for block in blocks}
        if others := sorted(getattr(config, name).items() - known.items()):
            raise ValueError(f"{CONFIG_NAME}: {name} has {others[0]}, which this foundation does not")


def _deciding_fields(config: PeftConfig) -> dict[str, Any]:
    """Return the fields that decide an adapter's output; task, base model and PEFT version do not.

    The tensors' names already say where the adapters are, and PEFT shortens a long list of ``target_modules``.
    """
    return {name: value for name, value in asdict(config).items() if name not in _GENERAL | {"target_modules"}}


@contextmanager
def _weights_errors(folder: Path) -> Iterator[None]:
    """Raise errors of PEFT and of reading in the block as WeightsError that names ``folder``."""
    try:
        yield
    except _PEFT_ERRORS as error:
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
    # A pattern of modules is replaced by their names once it is attached.
    plain = {name: value for name, value in config.options.items() if name != "target_modules"}
    if odd := _odd_options(plain):
        raise ConfigError(f"adapters.options: {odd[0]}")
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
