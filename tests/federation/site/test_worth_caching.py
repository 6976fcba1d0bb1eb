"""Features are cached where reading them is cheaper than computing them again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedsca_pipeline.config import AdaptersConfig, FoundationConfig
from fedsca_pipeline.federation.site.prefix import SplitModel, cheaper_to_read
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation

CPU, META, CUDA = (torch.device(kind) for kind in ("cpu", "meta", "cuda"))
FEL = AdaptersConfig(width=4)


def split_model(architecture: str, device: torch.device, side: int = 64, adapters: AdaptersConfig = FEL) -> SplitModel:
    foundation = FoundationConfig(name="random", architecture=architecture)
    model = attach_adapters(load_foundation(foundation, Path("unused"), image_size=side, classes=1), adapters)
    return SplitModel(model.to(device), frozenset(tensor_layout(model).efficient))


@pytest.mark.parametrize("side", [32, 64])
def test_the_operations_of_a_patch_embedding_are_those_of_one_product(side: int) -> None:
    split = split_model("sam_vit", CPU, side)
    positions, width = (side // 16) ** 2, 32

    assert split.operations == 2 * positions * width * 3 * 16 * 16
    assert split.feature_shape == (side // 16, side // 16, width)


def test_the_operations_of_a_prefix_are_those_of_its_layers_alone() -> None:
    """The tiny TinyViT's stem at 64 px: what each convolution does at each place of its output."""
    split = split_model("tiny_vit", CPU)
    convolutions = [
        (32**2, 8 * 3 * 9), (16**2, 16 * 8 * 9),  # patches
        (16**2, 64 * 16), (16**2, 64 * 9), (16**2, 16 * 64),  # the convolutional block
        (16**2, 16 * 16), (8**2, 16 * 9), (8**2, 16 * 16),  # to the next stage
    ]  # fmt: skip

    assert split.operations == sum(2 * places * weights for places, weights in convolutions)


def test_counting_leaves_no_hook_behind() -> None:
    split = split_model("tiny_vit", CPU)

    assert split.operations > 0
    assert not any(module._forward_hooks for module in split.model.modules())


# Bytes of one image's features in fp16, and operations to compute them.
MOBILE_SAM = (2 * 128 * 32 * 32, 860_000_000)
PATCHES = (2 * 64 * 64 * 768, 2 * 64 * 64 * 768 * 768)
FOUR_BLOCKS = (PATCHES[0], PATCHES[1] + 4 * 2 * 64 * 64 * 12 * 768 * 768)


@pytest.mark.parametrize(
    ("prefix", "device", "expected"),
    [
        (MOBILE_SAM, CPU, True),
        (PATCHES, CPU, True),
        (MOBILE_SAM, CUDA, False),
        (PATCHES, CUDA, False),
        (FOUR_BLOCKS, CUDA, True),
    ],
    ids=["mobile_sam", "ViT-B's patches", "mobile_sam on CUDA", "ViT-B's patches on CUDA", "four blocks on CUDA"],
)
def test_a_gpu_computes_small_prefixes_again_and_a_cpu_reads_them(prefix, device: torch.device, expected: bool) -> None:
    assert cheaper_to_read(*prefix, device) == expected


@pytest.mark.parametrize("architecture", ["tiny_vit", "sam_vit"])
def test_the_decision_follows_the_model_s_device(architecture: str) -> None:
    """``meta``, which computes nothing, stands for a GPU."""
    assert split_model(architecture, CPU).worth_caching
    assert not split_model(architecture, META).worth_caching


@pytest.mark.parametrize("worth", [True, False])
def test_a_prefix_that_is_not_worth_it_is_not_cached(worth, make_worker, make_site, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(SplitModel, "worth_caching", worth)
    worker: LocalWorker = make_worker(cache_bytes=10**8)
    store = SiteStore(tmp_path / "a", "run")

    (batch,) = worker._batches(make_site("a"), store).plain("validation", 4)

    assert store.feature_cache.is_file() == worth
    assert math.prod(batch.inputs.shape) == 2 * math.prod(worker.split.feature_shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_the_default_prefix_is_computed_again() -> None:
    assert not split_model("tiny_vit", CUDA).worth_caching
