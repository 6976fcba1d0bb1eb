"""FEL, the bottleneck adapters of docs/method.md, as a PEFT method.

In every transformer block, with ``a(h) = W_up gelu(W_down h + b_down) + b_up``::

    x'  = x  + attn(ln1 x) + a_attn(attn(ln1 x))
    x'' = x' + mlp(ln2 x') + scale * a_mlp(ln2 x')

Source: Zhang et al., *FedSCA*, arXiv 2503.15390; the placement is this project's reconstruction from the abstract.
Call :func:`register` before ``PeftModel.from_pretrained`` reads a saved FEL adapter.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from aenum import extend_enum
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

METHOD = "fel"


@dataclass
class FelConfig(PeftConfig):
    """Configuration of FEL adapters; PEFT saves it as ``adapter_config.json``."""

    attention_modules: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Path of each attention module and its embedding width."}
    )
    mlp_modules: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Path of each MLP module and its embedding width."}
    )
    width: int = field(default=32, metadata={"help": "Bottleneck width."})
    scale: float = field(default=0.5, metadata={"help": "Factor of the adapter beside the MLP."})
    seed: int = field(default=0, metadata={"help": "Seed of the down projections; the same at every site."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "All adapted modules; derived from the two mappings."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT has no types here
        self.peft_type = PeftType(METHOD.upper())
        self.target_modules = sorted({**self.attention_modules, **self.mlp_modules})


class FelLayer(nn.Module, BaseTunerLayer):
    """A base module with a bottleneck adapter; subclasses define the adapter's input."""

    adapter_layer_names = ("fel_down", "fel_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, dim: int, width: int, scale: float, seed: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fel_down = nn.ModuleDict()
        self.fel_up = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.add_adapter(adapter_name, dim, width, scale, seed)

    def add_adapter(self, adapter_name: str, dim: int, width: int, scale: float, seed: int) -> None:
        """Add one adapter with ``W_down`` drawn from ``seed`` and all else zero, so that its output starts at zero."""
        down, up = nn.Linear(dim, width), nn.Linear(width, dim)
        generator = torch.Generator().manual_seed(seed)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5), generator=generator)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.fel_down[adapter_name] = down
        self.fel_up[adapter_name] = up
        self.scale[adapter_name] = scale
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter([adapter_name])

    def adapt(self, h: Tensor) -> Tensor:
        """Return the sum of the active adapters' outputs, each times its scale; ``h`` is float [..., dim]."""
        outputs: list[Tensor] = [
            self.scale[name] * self.fel_up[name](nn.functional.gelu(self.fel_down[name](h)))
            for name in self.active_adapters
            if name in self.fel_down
        ]
        return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]


class FelAttention(FelLayer):
    """Adapter after attention: ``y + a(y)``, where y is the attention's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base attention's output with the adapter added to it (to the first item of a tuple)."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if isinstance(output, tuple):
            return (output[0] + self.adapt(output[0]), *output[1:])
        return output + self.adapt(output)


class FelMlp(FelLayer):
    """Adapter beside the MLP: ``mlp(x) + scale * a(ln x)``.

    If the MLP contains the norm (TinyViT), ln is that norm; else x is normed already.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output plus the adapter's; ``x`` is the MLP's input [..., dim]."""
        output: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return output
        norm = getattr(self.base_layer, "norm", None)
        return output + self.adapt(x if norm is None else norm(x))


class FelModel(BaseTuner):
    """Puts FEL layers around the attention and MLP modules that a :class:`FelConfig` names."""

    prefix = "fel_"
    tuner_layer_cls = FelLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as PEFT declares it)

    # PEFT calls a tuner with its own configuration class only.
    @staticmethod
    def _check_target_module_exists(peft_config: FelConfig, key: str) -> bool:  # type: ignore[override]
        return key in peft_config.attention_modules or key in peft_config.mlp_modules

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: FelConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        is_attention = current_key in peft_config.attention_modules
        modules = peft_config.attention_modules if is_attention else peft_config.mlp_modules
        shape = (modules[current_key], peft_config.width)
        scale = 1.0 if is_attention else peft_config.scale
        seed = _seed_of(peft_config.seed, current_key)
        if isinstance(target, FelLayer):
            target.add_adapter(adapter_name, *shape, scale, seed)
            return
        layer = FelAttention if is_attention else FelMlp
        setattr(parent, target_name, layer(target, adapter_name, *shape, scale, seed))


def register() -> None:
    """Register ``fel`` with PEFT, for ``get_peft_model`` and ``from_pretrained``; further calls change nothing."""
    if METHOD.upper() not in PeftType.__members__:
        extend_enum(PeftType, METHOD.upper(), METHOD.upper())
    if PeftType(METHOD.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=FelConfig, model_cls=FelModel)


def _seed_of(seed: int, path: str) -> int:
    """Return an independent seed per module path, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:7], "big")
