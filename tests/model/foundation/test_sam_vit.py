"""The ``sam`` foundation against ``transformers.SamModel`` without a prompt."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import SamModel

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.model.foundation import load_foundation

SIZE = 64


def _config(folder: object, **fields: object) -> FoundationConfig:
    return FoundationConfig(name="sam", source=str(folder), **fields)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_one_sigmoid_class_is_sams_single_mask_without_a_prompt(sam_checkpoint, tiny_sam, tmp_path, pixels):
    model = load_foundation(_config(sam_checkpoint), tmp_path, image_size=SIZE, classes=1)

    theirs = tiny_sam()(pixel_values=pixels, multimask_output=False).pred_masks

    ours = model.decoder(model.embed(pixels))
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, theirs[:, 0].detach(), atol=1e-5, rtol=1e-5)


def test_softmax_channels_are_sams_mask_tokens_from_the_first(sam_checkpoint, tiny_sam, tmp_path, pixels):
    model = load_foundation(_config(sam_checkpoint, head="softmax"), tmp_path, image_size=SIZE, classes=3)
    sam = tiny_sam()

    single = sam(pixel_values=pixels, multimask_output=False).pred_masks[:, 0]
    several = sam(pixel_values=pixels, multimask_output=True).pred_masks[:, 0]

    ours = model.decoder(model.embed(pixels))
    torch.testing.assert_close(ours, torch.cat([single, several], dim=1).detach(), atol=1e-5, rtol=1e-5)


def test_the_decoder_runs_with_sams_epsilon_whatever_the_checkpoint_says(tiny_sam, tmp_path, pixels):
    tiny_sam(decoder_epsilon=1e-1).save_pretrained(tmp_path / "other_epsilon")

    model = load_foundation(_config(tmp_path / "other_epsilon"), tmp_path, image_size=SIZE, classes=1)

    theirs = tiny_sam(decoder_epsilon=1e-5)(pixel_values=pixels, multimask_output=False).pred_masks[:, 0]
    torch.testing.assert_close(model.decoder(model.embed(pixels)), theirs.detach(), atol=1e-5, rtol=1e-5)


def _resized(state: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Return the checkpoint for another image size, with tables resized as in segment-anything."""
    side = size // 16
    state = dict(state)
    grid = state["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    state["vision_encoder.pos_embed"] = grid.permute(0, 2, 3, 1)
    for axis in "hw":
        name = f"vision_encoder.layers.1.attn.rel_pos_{axis}"  # the one global block
        table = state[name].T[None]
        state[name] = F.interpolate(table, size=2 * side - 1, mode="linear", align_corners=False)[0].T
    return state


@pytest.mark.parametrize("size", [32, 48, 96])
def test_at_another_image_size_position_tables_are_resized(
    sam_checkpoint, tiny_sam: Callable[..., SamModel], tmp_path, size
):
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    sam = tiny_sam(image_size=size)
    sam.load_state_dict(_resized(tiny_sam().state_dict(), size))

    model = load_foundation(_config(sam_checkpoint), tmp_path, image_size=size, classes=1)

    theirs = sam(pixel_values=pixels, multimask_output=False).pred_masks[:, 0]
    ours = model.decoder(model.embed(pixels))
    assert ours.shape == (1, 1, size // 4, size // 4)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_lacks_tensors_is_refused(sam_checkpoint, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(sam_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if not name.startswith("mask_decoder.transformer")}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(WeightsError, match=r"lacks \d+ tensors.*mask_decoder\.transformer"):
        load_foundation(_config(folder), tmp_path, image_size=SIZE, classes=1)


def test_a_checkpoint_with_other_shapes_is_refused(sam_checkpoint, tmp_path):
    folder = tmp_path / "other_shapes"
    shutil.copytree(sam_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mask_decoder.mask_tokens.weight"] = torch.zeros(7, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(WeightsError, match="does not load as a SAM model"):
        load_foundation(_config(folder), tmp_path, image_size=SIZE, classes=1)
