"""The server's large arrays, in memory or on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsca_pipeline.federation.server import arrays as memory
from fedsca_pipeline.federation.server.arrays import RoundMemory, mapped

SITES, VALUES = 3, 1 << 16
ONE_ARRAY = SITES * VALUES * 4 / 2**30


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the arrays on disk."""
    shapes = []

    def noted(folder, shape):
        shapes.append(shape)
        return mapped(folder, shape)

    monkeypatch.setattr(memory, "mapped", noted)
    return shapes


@pytest.mark.parametrize(("fit", "files"), [(0, 3), (0.9, 3), (1, 2), (2.5, 1), (3, 0)])
def test_arrays_that_do_not_fit_in_memory_go_to_disk(fit: float, files: int, on_disk, tmp_path: Path) -> None:
    taken = RoundMemory.within(fit * ONE_ARRAY, tmp_path, SITES, VALUES)

    assert on_disk == [(SITES, VALUES)] * files
    for array in (taken.updates, taken.bases, taken.results.local_models, taken.results.aggregates):
        assert array.shape == (SITES, VALUES)
        assert array.dtype == torch.float32
        assert array.fill_(2.0).sum() == 2 * SITES * VALUES


def test_a_mapped_array_leaves_no_file_behind(tmp_path: Path) -> None:
    mapped(tmp_path / "new", (2, 5)).fill_(1.0)

    assert list((tmp_path / "new").iterdir()) == []


def test_no_memory_is_allocated_if_no_tensor_is_shared(on_disk, tmp_path: Path) -> None:
    assert RoundMemory.within(0.0, tmp_path, SITES, 0).updates.shape == (SITES, 0)
    assert on_disk == []


def test_a_disk_without_room_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        mapped(tmp_path, (1 << 20, 1 << 36))

    assert caught.value.filename == str(tmp_path)
