"""One vector per image, from its valid area."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.data_report.embedding import embed_images
from fedsca_pipeline.model.foundation import load_foundation

CPU = torch.device("cpu")
MODEL = load_foundation(FoundationConfig(name="random"), Path(), image_size=64, classes=1)


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 64, 64), np.uint8), np.ones((count, 64, 64), bool)


def test_an_embedding_is_the_mean_of_the_encoders_features_in_any_batch() -> None:
    pixels, valid = images(11)
    done: list[int] = []

    found = embed_images(MODEL, pixels, valid, CPU, done.append)

    with torch.inference_mode():
        whole = MODEL.embed(MODEL.normalise(torch.from_numpy(pixels), torch.from_numpy(valid).unsqueeze(1)))
    np.testing.assert_allclose(found, whole.mean((2, 3)).numpy(), atol=1e-5)
    assert found.dtype == np.float32
    assert sum(done) == 11


def test_padding_does_not_change_the_embedding() -> None:
    pixels, valid = images(2)
    valid[:, 32:] = False
    other = pixels.copy()
    other[:, :, 32:] = 255 - other[:, :, 32:]

    np.testing.assert_array_equal(embed_images(MODEL, pixels, valid, CPU), embed_images(MODEL, other, valid, CPU))


def test_no_image_gives_no_embedding() -> None:
    assert len(embed_images(MODEL, *images(0), CPU)) == 0
