"""A saved site model loads, segments images and volumes, and is refused if it is damaged or does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from fedsca_pipeline import load_site_model
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, NormaliseConfig
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.model import site_model
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.site_model import save_site_model

SIZE = 32
GREY, COLOUR = (40, 28), (28, 40, 3)


def make_model(folder: Path, root: Path, classes: int = 1, head: str = "sigmoid", **card_fields: Any) -> Path:
    """Save a tiny random model whose tensors look trained; return its folder."""
    config = FoundationConfig(name="random", head=head)
    network = load_foundation(config, root, image_size=SIZE, classes=classes)
    attach_adapters(network, AdaptersConfig(width=4))
    draw = torch.Generator().manual_seed(3)
    parameters = dict(network.named_parameters())
    tensors = {
        name: parameters[name].detach() + 0.3 * torch.randn(parameters[name].shape, generator=draw)
        for name in tensor_layout(network).efficient
    }
    card = {
        "site": "north",
        "strategy": "fedsca",
        "round": 3,
        "dice_validation": 0.5,
        "run": "0123456789abcdef",
        "foundation": config,
        "foundation_sha256": prepare_foundation(config, root).sha256,
        "foundation_root": root,
        "image_size": SIZE,
        "classes": classes,
        "normalise": NormaliseConfig(),
        "threshold": 0.5,
        **card_fields,
    }
    save_site_model(folder, network, tensors, card)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site_model")
    return make_model(root / "models" / "north", root / "foundations")


def image(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    top = 1.0 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    return (np.random.default_rng(seed).random(shape) * top).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [GREY, COLOUR, (SIZE, SIZE), (200, 31, 3)])
def test_any_image_is_segmented_at_its_own_size(folder: Path, shape: tuple[int, ...], dtype: Any) -> None:
    model = load_site_model(folder)

    mask = model.segment(image(shape, dtype))

    assert mask.shape == shape[:2]
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


def test_segmenting_leaves_the_image_unchanged_and_is_repeatable(folder: Path) -> None:
    model, pixels = load_site_model(folder), image(COLOUR, np.uint8)
    before = pixels.copy()

    first, second = model.segment(pixels), model.segment(pixels)

    assert np.array_equal(pixels, before)
    assert np.array_equal(first, second)


def test_the_scale_of_intensities_does_not_matter(folder: Path) -> None:
    model = load_site_model(folder)
    pixels = image(GREY, np.uint8)

    narrow, wide = model.segment(pixels), model.segment(pixels.astype(np.uint16) * 256)

    assert (narrow == wide).mean() > 0.99


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_several_classes_are_numbered_from_one(tmp_path: Path, head: str) -> None:
    model = load_site_model(make_model(tmp_path / "north", tmp_path / "foundations", classes=3, head=head))

    mask = model.segment(image(COLOUR, np.uint8))

    assert mask.shape == COLOUR[:2]
    assert set(np.unique(mask)) <= {0, 1, 2, 3}
    assert len(np.unique(mask)) > 1


def a_volume(shape: tuple[int, ...] = (20, 24, 3)) -> np.ndarray:
    return image(shape, np.float32)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_volume_is_segmented_the_same_in_any_orientation(folder: Path, axes: tuple[int, ...], tmp_path: Path) -> None:
    model, voxels = load_site_model(folder), a_volume()
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    ahead = model.segment_volume(Volume(voxels, affine))
    assert (ahead.shape, ahead.dtype) == (voxels.shape, np.uint8)
    assert ahead.any()

    turned = affine.copy()
    turned[:, :3] = -affine[:, axes]
    there = model.segment_volume(Volume(np.flip(voxels.transpose(axes)), turned), batch_size=2)
    assert np.array_equal(np.flip(there).transpose(np.argsort(axes)), ahead)

    write_nifti(tmp_path / "v.nii.gz", voxels, affine)
    assert np.array_equal(model.segment_volume(str(tmp_path / "v.nii.gz")), ahead)


def test_a_slice_of_a_volume_is_segmented_as_an_image_with_the_volumes_intensities(folder: Path) -> None:
    model, voxels = load_site_model(folder), a_volume()
    voxels[0, 0], voxels[0, 1] = -9.0, 9.0
    whole = model.segment_volume(Volume(voxels, np.eye(4)))
    # An image's rows run to the back and its columns to the left; a RAS+ grid runs the other way.
    upright = [plane[::-1, ::-1].T for plane in np.moveaxis(voxels, 2, 0)]
    for index, plane in enumerate(upright):
        assert np.array_equal(whole[..., index][::-1, ::-1].T, model.segment(plane))


def test_a_volume_of_other_modalities_is_refused(folder: Path) -> None:
    with pytest.raises(BrokenSampleError, match="has 2 modalities"):
        load_site_model(folder).segment_volume(Volume(a_volume((8, 8, 3, 2)), np.eye(4)))


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_a_class_that_the_model_does_not_know_is_never_predicted(tmp_path: Path, head: str) -> None:
    """The class here has the most pixels in a model that knows all classes."""
    root, picture = tmp_path / "foundations", image(COLOUR, np.uint8)
    every = load_site_model(make_model(tmp_path / "every", root, 3, head, threshold=0.001)).segment(picture)
    most = int(np.bincount(every.ravel(), minlength=4)[1:].argmax()) + 1
    known = [label for label in (1, 2, 3) if label != most]

    some = load_site_model(make_model(tmp_path / "some", root, 3, head, threshold=0.001, known_classes=known))

    drawn = some.segment(picture)
    assert most in every
    assert most not in drawn
    assert np.isin(drawn[every == most], [0, *known]).all()
    if head == "softmax":
        assert np.array_equal(drawn[every != most], every[every != most])


def test_a_loaded_model_computes_what_the_saved_one_did(folder: Path, tmp_path: Path) -> None:
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    again = make_model(tmp_path / "models" / "north", tmp_path / "foundations")

    with torch.inference_mode():
        one, other = load_site_model(folder)(pixels), load_site_model(again)(pixels)

    assert one.equal(other)


def test_a_moved_model_works_with_the_foundation_root_given(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "elsewhere")
    try:
        model = load_site_model(moved, foundation_root=tmp_path / "foundations")
        assert model.card.site == "north"
    finally:
        moved.rename(folder)


@pytest.mark.parametrize("name", ["missing", ""])
def test_a_folder_without_a_card_is_not_a_model(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"no site_model\.json; give the folder of one site"):
        load_site_model(tmp_path / name)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_another_foundation_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    card = json.loads((copy / "site_model.json").read_text())
    (copy / "site_model.json").write_text(json.dumps({**card, "foundation_sha256": "0" * 64}))

    with pytest.raises(WeightsError, match="trained on 0000000000000000; pass foundation_root="):
        load_site_model(copy)


@pytest.mark.parametrize("name", ["decoder.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_named(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    copy = copied(folder, tmp_path / "copy")
    content = (copy / name).read_bytes()
    (copy / name).unlink() if damage == "missing" else (copy / name).write_bytes(content[: len(content) // 2])

    with pytest.raises(WeightsError, match=r"copy.*export .* again with 'kedro run --pipeline=training'"):
        load_site_model(copy)


def test_a_card_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    (copy / "site_model.json").write_text("{")

    with pytest.raises(WeightsError, match=r"site_model.*export .* again with 'kedro run --pipeline=training'"):
        load_site_model(copy)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: disk full")])
@pytest.mark.parametrize("part", ["write_tensors", "write_json", "_save_adapter"])
def test_a_full_disk_leaves_an_earlier_model_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise error

    folder = make_model(tmp_path / "north", tmp_path / "foundations")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(site_model, part, full)

    with pytest.raises(WeightsError, match=r"north: the model cannot be written .*; make room"):
        make_model(folder, tmp_path / "foundations")

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_a_killed_command_left_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "north" / ".site_model.partial" / "adapter_model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    folder = make_model(tmp_path / "north", tmp_path / "foundations")

    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "decoder.safetensors",
        "site_model.json",
    ]


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    network = load_foundation(FoundationConfig(name="random"), tmp_path, image_size=SIZE, classes=1)
    attach_adapters(network, AdaptersConfig(width=4))

    with pytest.raises(WeightsError, match="do not belong to this model"):
        save_site_model(tmp_path / "north", network, {"decoder.nothing": torch.zeros(1)}, {})

    assert not (tmp_path / "north" / "site_model.json").exists()
