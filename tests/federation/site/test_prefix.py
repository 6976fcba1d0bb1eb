from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig
from fedsca_pipeline.federation.site import prefix
from fedsca_pipeline.federation.site.prefix import FeatureCache, SplitModel
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation

SIDE = 32
SHAPE = (2, 3, 4)
SLOT_BYTES = 2 * 2 * 3 * 4 + 1
HIGH = AdaptersConfig(method="lora", options={"r": 2, "target_modules": ["layers.3.blocks.0.attn.qkv"]})


def trainable_model(architecture: str, adapters: AdaptersConfig, device: str = "cpu"):
    foundation = FoundationConfig(name="random", architecture=architecture)
    model = load_foundation(foundation, Path("unused"), image_size=SIDE, classes=1)
    return attach_adapters(model, adapters).to(device)


def some_images(device: str = "cpu"):
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(3, SIDE, SIDE, dtype=torch.bool)
    valid[0, 20:] = False
    return images.to(device), valid.to(device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(
    ("architecture", "adapters"),
    [
        ("tiny_vit", AdaptersConfig(width=4)),
        ("tiny_vit", AdaptersConfig(method="lora", options={"r": 2})),
        ("tiny_vit", HIGH),
        ("sam_vit", AdaptersConfig(width=4)),
    ],
    ids=["fel", "lora", "high lora", "sam"],
)
def test_prefix_and_rest_together_are_the_model(architecture: str, adapters: AdaptersConfig, device: str) -> None:
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} here")
    model = trainable_model(architecture, adapters, device)
    split = SplitModel(model, tensor_layout(model).efficient)
    images, valid = some_images(device)

    features = split.features(images, valid)

    assert_close(split.logits(features), model(model.normalise(images, valid.unsqueeze(1))), rtol=1e-4, atol=1e-5)
    assert not features.requires_grad
    assert tuple(features.shape[1:]) == split.feature_shape


def test_the_prefix_reaches_up_to_the_first_adapter() -> None:
    models = (trainable_model("tiny_vit", adapters) for adapters in (AdaptersConfig(width=4), HIGH))

    shapes = [SplitModel(model, tensor_layout(model).efficient).feature_shape for model in models]

    assert shapes == [(16, SIDE // 8, SIDE // 8), (32, SIDE // 16, SIDE // 16)]


def test_no_gradient_is_lost_by_the_cut() -> None:
    model = trainable_model("tiny_vit", AdaptersConfig(width=4))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    split = SplitModel(model, trainable)
    images, valid = some_images()

    cut, whole = (
        torch.autograd.grad(logits.square().sum(), list(trainable.values()))
        for logits in (split.logits(split.features(images, valid)), model(model.normalise(images, valid.unsqueeze(1))))
    )

    for found, wanted in zip(cut, whole, strict=True):
        assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    model = trainable_model("tiny_vit", AdaptersConfig(width=4))
    split = SplitModel(model, tensor_layout(model).efficient)
    images, valid = some_images()

    together = split.features(images, valid)

    assert all(torch.equal(together[i : i + 1], split.features(images[i : i + 1], valid[i : i + 1])) for i in range(3))


def test_cached_features_are_read_as_store_returned_them(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "site" / "features", [(7, 0), (3, 5)], SHAPE, 10**6)
    features = {key: torch.randn(SHAPE) for key in ((3, 5), (7, 0))}

    handed_out = {key: cache.store(key, tensor) for key, tensor in features.items()}

    for key, tensor in features.items():
        assert torch.equal(cache.read(key), handed_out[key])
        assert_close(handed_out[key], tensor, rtol=1e-3, atol=1e-6)  # fp16 has eleven bits
        assert handed_out[key].dtype == torch.float32


def test_an_empty_slot_is_read_as_none(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features", [(0, 0), (0, 1)], SHAPE, 10**6)
    before = cache.read((0, 1))
    cache.store((0, 1), torch.ones(SHAPE))

    assert before is None
    assert cache.read((0, 0)) is None
    assert cache.read((0, 1)) is not None


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (SLOT_BYTES - 1, 0), (2 * SLOT_BYTES, 2), (10**6, 4)])
def test_the_file_stays_below_its_limit_and_caches_the_first_keys(room: int, kept: int, tmp_path: Path) -> None:
    keys = [(0, 0), (5, 1), (5, 2), (9, 0)]
    cache = FeatureCache(tmp_path / "features", keys, SHAPE, room)

    for key in reversed(keys):
        cache.store(key, torch.full(SHAPE, 0.1))

    assert [cache.read(key) is not None for key in keys] == [index < kept for index in range(4)]
    assert not cache.path.is_file() or cache.path.stat().st_size <= room


def test_features_too_large_for_fp16_are_returned_unchanged_and_not_cached(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features", [(0, 0)], (2,), 10**6)
    features = torch.tensor([7e4, 1.0])

    assert torch.equal(cache.store((0, 0), features), features)
    assert cache.read((0, 0)) is None


def test_a_partial_write_leaves_the_slot_empty(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features", [(0, 0)], SHAPE, 10**6)
    cache.store((0, 0), torch.ones(SHAPE))
    content = cache.path.read_bytes()

    for length in (1, len(content) // 2, len(content) - 1):
        cache.path.write_bytes(content[:length])
        assert cache.read((0, 0)) is None


def test_a_full_disk_disables_the_cache_and_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    features = [torch.randn(SHAPE), torch.randn(SHAPE)]
    keeps, fails = (FeatureCache(tmp_path / name, [(0, 0), (1, 0)], SHAPE, 10**6) for name in ("keeps", "fails"))
    wanted = [keeps.store((row, 0), tensor) for row, tensor in enumerate(features)]
    monkeypatch.setattr(prefix.FeatureCache, "_write", full)

    found = [fails.store((row, 0), tensor) for row, tensor in enumerate(features)]

    assert all(map(torch.equal, found, wanted))
    assert fails.read((0, 0)) is None
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
