"""The built foundation: shapes, seeds, frozen parameters, decoder and normalisation."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.model.foundation import SegmentationModel, load_foundation

ARCHITECTURES = ["tiny_vit", "sam_vit"]


def _tiny(architecture: str = "tiny_vit", *, size: int = 32, classes: int = 1, **fields: object) -> SegmentationModel:
    config = FoundationConfig(name="random", architecture=architecture, **fields)
    return load_foundation(config, Path("unused"), image_size=size, classes=classes)


@torch.no_grad()
def _logits(model: SegmentationModel) -> torch.Tensor:
    # Without gradients: attention chooses its kernel by what requires one, and kernels differ in the last bits.
    return model(_pixels())


def _pixels(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("head", "classes", "channels"), [("sigmoid", 1, 1), ("sigmoid", 6, 6), ("softmax", 1, 2), ("softmax", 5, 6)]
)
def test_logits_have_the_size_of_the_image_and_a_channel_for_each_class(architecture, size, head, classes, channels):
    model = _tiny(architecture, size=size, classes=classes, head=head)

    embeddings = model.embed(_pixels(size))
    logits = model(_pixels(size))

    assert model.channels == channels
    assert embeddings.shape[2:] == (size // 16, size // 16)
    assert model.decoder(embeddings).shape == (2, channels, size // 4, size // 4)
    assert logits.shape == (2, channels, size, size)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(model.decode(embeddings), logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_test_foundation_is_tiny_frozen_and_in_evaluation_mode(architecture):
    model = _tiny(architecture)

    assert sum(parameter.numel() for parameter in model.parameters()) < 150_000
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_follow_the_seed_and_only_the_seed(architecture):
    first, torch_moved = _tiny(architecture, seed=7), torch.randn(3)
    again, other = _tiny(architecture, seed=7), _tiny(architecture, seed=8)

    assert torch_moved.numel()
    assert torch.equal(first(_pixels()), again(_pixels()))
    assert not torch.equal(first(_pixels()), other(_pixels()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_leaves_the_global_generators_alone(architecture):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002 - the global one is meant

    _tiny(architecture)

    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002 - the global one is meant
    assert random.getstate() == before[2]


def test_loading_a_sam_checkpoint_leaves_the_global_generator_alone(sam_checkpoint, tmp_path):
    before = torch.get_rng_state()

    load_foundation(FoundationConfig(name="sam", source=str(sam_checkpoint)), tmp_path, image_size=32, classes=1)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_paths_name_modules_of_the_encoder(architecture):
    model = _tiny(architecture)

    assert len(model.blocks) == 4
    for block in model.blocks:
        children = dict(model.encoder.get_submodule(block.block).named_children())
        assert model.encoder.get_submodule(block.attention) is children["attn"]
        assert model.encoder.get_submodule(block.mlp) is children["mlp"]
        assert len(block.linears) == 4
        assert model.encoder.get_submodule(block.linears[0]).in_features == block.width
        assert all(isinstance(model.encoder.get_submodule(path), torch.nn.Linear) for path in block.linears)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("targets", ["paths", "regex"])
def test_lora_wraps_the_encoder_starts_as_the_foundation_learns_and_comes_back_from_disk(
    architecture, targets, tmp_path
):
    model = _tiny(architecture)
    foundation = _logits(model)
    linears = [path for block in model.blocks for path in block.linears]
    target_modules = {"paths": linears, "regex": r".*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2|lin1|lin2))"}[targets]
    model.encoder = get_peft_model(model.encoder, LoraConfig(r=2, target_modules=target_modules))
    assert torch.equal(_logits(model), foundation)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=10.0)
    for _ in range(2):
        model(_pixels()).square().mean().backward()
        optimizer.step()
    model.encoder.save_pretrained(tmp_path)

    restored = _tiny(architecture)
    restored.encoder = PeftModel.from_pretrained(restored.encoder, tmp_path)
    assert len(trained) == 2 * len(linears)
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    assert not torch.equal(_logits(model), foundation)
    assert torch.equal(_logits(restored), _logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("classes", [1, 6])
def test_every_parameter_of_the_decoder_is_used_and_its_state_dict_has_only_parameters(architecture, classes):
    model = _tiny(architecture, classes=classes)
    model.decoder.requires_grad_(True)

    model(_pixels()).square().mean().backward()

    parameters = dict(model.decoder.named_parameters())
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []
    assert set(model.decoder.state_dict()) == set(parameters)
    assert not any("iou_prediction" in name for name in parameters)


def test_padding_is_exactly_zero_after_normalisation_and_the_rest_is_standardised():
    model = _tiny(size=32)
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[0, :, 20:] = False

    pixels = model.normalise(images, valid)

    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0, :, 20:], torch.zeros(3, 12, 32))
    wanted = torch.tensor(
        [(255 - m) / s for m, s in zip(model.pixel_mean.flatten(), model.pixel_std.flatten(), strict=True)]
    )
    torch.testing.assert_close(pixels[1, :, 0, 0], wanted)
    torch.testing.assert_close(pixels[0, :, 19, 31], wanted)


@pytest.mark.parametrize(
    ("size", "classes", "message"), [(40, 1, "image_size"), (0, 1, "image_size"), (32, 0, "classes")]
)
def test_sizes_out_of_range_are_refused(size, classes, message):
    with pytest.raises(ValueError, match=message):
        _tiny(size=size, classes=classes)


def test_a_foundation_that_was_not_prepared_is_refused_with_its_cure(tmp_path):
    with pytest.raises(
        WeightsError, match=r"mobile_sam/model\.safetensors is missing.*kedro run --pipeline=foundation"
    ):
        load_foundation(FoundationConfig(), tmp_path, image_size=64, classes=1)


def test_mobile_sam_has_its_size_and_works_at_small_images(foundation_root):
    model = load_foundation(FoundationConfig(), foundation_root, image_size=64, classes=1)

    logits = model(_pixels(64))

    assert 9.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 9.8e6
    assert len(model.blocks) == 10
    assert logits.shape == (2, 1, 64, 64)
    assert logits.isfinite().all()
