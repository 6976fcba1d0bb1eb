"""FEL adapters follow their equations, start as the foundation, and survive a round trip through PEFT's files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig
from fedsca_pipeline.errors import ConfigError, WeightsError
from fedsca_pipeline.model.adapters import fel
from fedsca_pipeline.model.adapters.attach import attach_adapters, load_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation

ARCHITECTURES = ("tiny_vit", "sam_vit")


def network(architecture: str = "tiny_vit"):
    config = FoundationConfig(name="random", architecture=architecture)
    return load_foundation(config, Path("unused"), image_size=32, classes=1)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def disturb(model: torch.nn.Module) -> None:
    """Move every trainable tensor off its start value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["fel", "lora"])
def test_round_zero_is_the_foundation_bit_for_bit(architecture: str, method: str) -> None:
    foundation = network(architecture)
    adapted = attach_adapters(copy.deepcopy(foundation), AdaptersConfig(method=method)).eval()
    # With several threads PyTorch uses another kernel for weights that require a gradient; the last bit differs.
    foundation.decoder.requires_grad_(True)

    with torch.no_grad():
        assert torch.equal(adapted(images()), foundation(images()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_adapters_and_the_decoder_train(architecture: str) -> None:
    model = attach_adapters(network(architecture), AdaptersConfig())

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    assert all(".fel_" in name or name.startswith("decoder.") for name in trainable)
    assert all(p.requires_grad for p in model.decoder.parameters())


def test_the_attention_adapter_follows_its_equation() -> None:
    model = attach_adapters(network(), AdaptersConfig(width=4))
    disturb(model)
    layer = next(m for m in model.modules() if isinstance(m, fel.FelAttention))
    dim = layer.fel_down["default"].in_features
    x = torch.randn(1, 4, 4, dim)

    y = layer.base_layer(x)
    down, up = layer.fel_down["default"], layer.fel_up["default"]
    expected = y + F.linear(F.gelu(F.linear(y, down.weight, down.bias)), up.weight, up.bias)

    torch.testing.assert_close(layer(x), expected)


def test_the_mlp_adapter_reads_the_normed_input_and_is_scaled() -> None:
    model = attach_adapters(network(), AdaptersConfig(width=4, scale=0.25))
    disturb(model)
    layer = next(m for m in model.modules() if isinstance(m, fel.FelMlp))
    x = torch.randn(1, 5, layer.fel_down["default"].in_features)

    h = layer.base_layer.norm(x)
    down, up = layer.fel_down["default"], layer.fel_up["default"]
    expected = layer.base_layer(x) + 0.25 * up(F.gelu(down(h)))

    torch.testing.assert_close(layer(x), expected)


def test_every_site_draws_the_same_down_projections_whatever_its_random_state() -> None:
    torch.manual_seed(1)
    first = attach_adapters(network(), AdaptersConfig(seed=3)).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = attach_adapters(network(), AdaptersConfig(seed=3)).state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_another_seed_draws_other_down_projections() -> None:
    first, second = (attach_adapters(network(), AdaptersConfig(seed=seed)).state_dict() for seed in (0, 1))

    assert any(not torch.equal(first[name], second[name]) for name in first if "fel_down" in name and "weight" in name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["fel", "lora"])
def test_a_saved_adapter_loads_into_a_fresh_foundation(architecture: str, method: str, tmp_path: Path) -> None:
    model = attach_adapters(network(architecture), AdaptersConfig(method=method))
    disturb(model)
    model.encoder.save_pretrained(str(tmp_path))

    fresh = load_adapters(network(architecture), tmp_path)

    with torch.no_grad():
        assert torch.equal(fresh.eval().embed(images()), model.eval().embed(images()))


@pytest.mark.parametrize("method", ["fel", "lora"])
def test_saved_adapters_replace_attached_ones_of_the_same_kind(
    method: str, foundation_root: Path, tmp_path: Path
) -> None:
    """mobile_sam has so many adapters that PEFT shortens the list of their modules."""
    models = [
        attach_adapters(
            load_foundation(FoundationConfig(), foundation_root, image_size=32, classes=1),
            AdaptersConfig(method=method),
        )
        for _ in range(2)
    ]
    disturb(models[0])
    models[0].encoder.save_pretrained(str(tmp_path))

    load_adapters(models[1], tmp_path)

    with torch.no_grad():
        assert torch.equal(*(model.eval().embed(torch.ones(1, 3, 32, 32)) for model in models))


def test_peft_alone_reads_a_saved_adapter_once_fel_is_registered(tmp_path: Path) -> None:
    model = attach_adapters(network(), AdaptersConfig())
    disturb(model)
    model.encoder.save_pretrained(str(tmp_path))

    fel.register()
    encoder = PeftModel.from_pretrained(network().encoder, str(tmp_path))

    with torch.no_grad():
        assert torch.equal(encoder(images()), model.encoder(images()))


def test_peft_can_disable_the_adapters() -> None:
    foundation = network()
    model = attach_adapters(copy.deepcopy(foundation), AdaptersConfig())
    disturb(model)

    with torch.no_grad(), model.encoder.disable_adapter():
        assert torch.equal(model.embed(images()), foundation.embed(images()))


def test_registering_twice_is_harmless() -> None:
    fel.register()
    fel.register()

    assert get_peft_model(network().encoder, fel.FelConfig(attention_modules={network().blocks[0].attention: 32}))


def test_layout_puts_each_adapter_tensor_into_one_block_in_order() -> None:
    model = attach_adapters(network(), AdaptersConfig(width=4))

    layout = tensor_layout(model)

    assert len(layout.blocks) == len(model.blocks)
    assert all(len(block) == 8 for block in layout.blocks)
    assert sorted((*layout.adapters, *layout.decoder, *layout.encoder)) == sorted(layout.shapes)
    assert layout.encoder
    assert not any("fel_" in name for name in layout.encoder)
    assert {name.rsplit(".", 2)[1] for name in layout.norms if ".blocks." in name} == {"norm"}
    assert set(layout.norms) <= {*layout.encoder, *layout.decoder}
    for block, names in zip(model.blocks, layout.blocks, strict=True):
        assert all(f".{block.block}." in name for name in names)


def test_mobile_sam_has_the_sizes_of_the_method(foundation_root: Path) -> None:
    model = load_foundation(FoundationConfig(), foundation_root, image_size=256, classes=1)

    layout = tensor_layout(attach_adapters(model, AdaptersConfig()))

    low = [name for block in layout.blocks[:5] for name in block]
    assert len(layout.blocks) == 10
    assert layout.size(layout.adapters) == 241_920
    assert layout.size(low) == 96_000


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"adapters\.method: 'lorra'.*did you mean 'lora'"):
        attach_adapters(network(), AdaptersConfig(method="lorra"))


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"adapters\.options: rank unknown to PEFT's LoraConfig"):
        attach_adapters(network(), AdaptersConfig(method="lora", options={"rank": 4}))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no adapter for this foundation"):
        load_adapters(network(), tmp_path)
