"""Build a frozen ``SegmentationModel`` from a configuration and the weights on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamVisionEncoder

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.files import read_tensors
from fedsca_pipeline.model.foundation.blocks import BlockPaths
from fedsca_pipeline.model.foundation.linear import onednn_is_quicker, use_onednn
from fedsca_pipeline.model.foundation.model import MaskDecoder, SegmentationModel
from fedsca_pipeline.model.foundation.sam_vit import SamViT, sam_vit_blocks
from fedsca_pipeline.model.foundation.tiny_vit import TEST_SIZES, TinyViT, tiny_vit_blocks
from fedsca_pipeline.model.foundation.weights import sam_folder, verified_file

STRIDE = 16

# SAM's own value; transformers' default, 1e-6, shifts logits by up to 0.29.
DECODER_EPSILON = 1e-5

_TEST_WIDTH = 32
_TEST_IMAGE_SIZE = 64

CHANNELS: dict[str, Callable[[int], int]] = {"sigmoid": lambda classes: classes, "softmax": lambda classes: classes + 1}


@dataclass(frozen=True)
class _Request:
    config: FoundationConfig
    root: Path
    image_size: int


@dataclass(frozen=True)
class _Parts:
    encoder: nn.Module
    blocks: tuple[BlockPaths, ...]
    decoder: SamMaskDecoder
    position_matrix: Tensor
    no_mask: Tensor


def load_foundation(config: FoundationConfig, root: Path, *, image_size: int, classes: int) -> SegmentationModel:
    """Return the configured foundation, in evaluation mode and with every parameter frozen.

    The global random state does not change.

    Args:
        config: which foundation, and its head.
        root: the foundation folder that ``prepare_foundation`` filled.
        image_size: S in pixels, divisible by 16.
        classes: K >= 1. With head ``sigmoid`` the logits have one channel per class; with head ``softmax`` channel 0
            is the background and K channels follow.

    Raises:
        WeightsError: the weights are missing, damaged or of another architecture.
        ValueError: ``image_size`` or ``classes`` is out of range.

    >>> config = FoundationConfig(name="random", head="softmax")
    >>> model = load_foundation(config, Path("unused"), image_size=32, classes=2)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 3, 32, 32])
    """
    if image_size < STRIDE or image_size % STRIDE:
        raise ValueError(f"image_size must be a positive multiple of {STRIDE}, got {image_size}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    channels = CHANNELS[config.head](classes)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, whose state fork_rng does not restore here.
        torch.default_generator.manual_seed(config.seed)
        parts = _SOURCES[config.name](_Request(config, root, image_size))
        decoder = MaskDecoder(
            parts.decoder,
            channels,
            position_matrix=parts.position_matrix,
            no_mask=parts.no_mask,
            side=image_size // STRIDE,
        )
    # Convolutions of few channels on large maps are faster in this memory order (docs/performance.md).
    encoder = parts.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's types
    model = SegmentationModel(
        encoder, decoder, image_size=image_size, channels=channels, head=config.head, blocks=parts.blocks
    )
    if onednn_is_quicker():
        use_onednn(model)
    return model.requires_grad_(False).eval()


def _mobile_sam(request: _Request) -> _Parts:
    path = verified_file(request.root)
    tensors = read_tensors(path)
    encoder, decoder = TinyViT(), SamMaskDecoder(_decoder_config())
    # The converted file does not contain the quality head.
    decoder.add_module("iou_prediction_head", nn.Identity())
    try:
        encoder.load_state_dict(_below("encoder.", tensors))
        decoder.load_state_dict(_below("decoder.", tensors))
    except RuntimeError as error:
        raise WeightsError(f"{path} has another architecture ({error}); delete its folder and run again") from error
    return _Parts(
        encoder, tiny_vit_blocks(encoder), decoder, tensors["prompt.position_matrix"], tensors["prompt.no_mask"]
    )


def _sam(request: _Request) -> _Parts:
    folder = sam_folder(str(request.config.source), download=False)
    try:
        # Any: transformers' types have neither the parts of a configuration nor the report.
        settings: Any = SamConfig.from_pretrained(folder, local_files_only=True)
        settings.mask_decoder_config.layer_norm_eps = DECODER_EPSILON
        loaded: Any = SamModel.from_pretrained(
            folder, config=settings, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{folder} does not load as a SAM model ({error}); save or download it again") from error
    sam, report = loaded
    if report["missing_keys"]:
        examples = ", ".join(sorted(report["missing_keys"])[:3])
        raise WeightsError(f"{folder} lacks {len(report['missing_keys'])} tensors of a SAM model, such as {examples}")
    sam = sam.float()
    encoder = SamViT(sam.vision_encoder, request.image_size)
    return _Parts(
        encoder,
        sam_vit_blocks(encoder),
        sam.mask_decoder,
        sam.shared_image_embedding.positional_embedding,
        sam.prompt_encoder.no_mask_embed.weight,
    )


def _random(request: _Request) -> _Parts:
    encoder, blocks = _RANDOM[request.config.architecture](request.image_size)
    decoder = SamMaskDecoder(
        _decoder_config(
            hidden_size=_TEST_WIDTH, mlp_dim=2 * _TEST_WIDTH, num_attention_heads=2, iou_head_hidden_dim=_TEST_WIDTH
        )
    )
    return _Parts(encoder, blocks, decoder, torch.randn(2, _TEST_WIDTH // 2), torch.randn(_TEST_WIDTH))


def _random_tiny_vit(_image_size: int) -> tuple[nn.Module, tuple[BlockPaths, ...]]:
    encoder = TinyViT(TEST_SIZES)
    return encoder, tiny_vit_blocks(encoder)


def _random_sam_vit(image_size: int) -> tuple[nn.Module, tuple[BlockPaths, ...]]:
    vision = SamVisionEncoder(
        SamVisionConfig(
            hidden_size=_TEST_WIDTH,
            output_channels=_TEST_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=_TEST_IMAGE_SIZE,
            initializer_range=0.1,
            mlp_ratio=2.0,
            window_size=3,
            global_attn_indexes=[1, 3],
            attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by transformers' base class
        )
    )
    # transformers initialises position tables with zeros, which would hide a wrong resize.
    for name, parameter in vision.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.1)
    encoder = SamViT(vision, image_size)
    return encoder, sam_vit_blocks(encoder)


def _decoder_config(**sizes: Any) -> SamMaskDecoderConfig:
    return SamMaskDecoderConfig(
        **sizes,
        layer_norm_eps=DECODER_EPSILON,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by transformers' base class
    )


_SOURCES: dict[str, Callable[[_Request], _Parts]] = {
    "mobile_sam": _mobile_sam,
    "sam": _sam,
    "random": _random,
}

_RANDOM: dict[str, Callable[[int], tuple[nn.Module, tuple[BlockPaths, ...]]]] = {
    "tiny_vit": _random_tiny_vit,
    "sam_vit": _random_sam_vit,
}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
