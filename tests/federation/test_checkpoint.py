from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation.checkpoint import Checkpoint, CheckpointFolder, RoundRecord, SiteRecord
from fedsca_pipeline.federation.strategies.base import ServerState


def checkpoint(round_: int) -> Checkpoint:
    record = RoundRecord(
        round=round_,
        final=False,
        sites={"a": SiteRecord(bytes_up=7, loss=0.5), "b": SiteRecord(absent="holiday")},
        accepted=("a",),
        similarity=[[[1.0]]],
        weights=[[[1.0]]],
    )
    return Checkpoint(
        round=round_,
        state=ServerState.initial(2, 3, 1),
        aggregates=torch.full((2, 3), float(round_)),
        bases=torch.ones(2, 3),
        has_base=torch.tensor([True, False]),
        answered=torch.tensor([round_, 0]),
        history=(record,),
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(3))

    found = folder.latest()

    assert found.round == 3
    assert found.history == checkpoint(3).history
    assert torch.equal(found.aggregates, checkpoint(3).aggregates)
    assert found.has_base.tolist() == [True, False]
    assert found.state.memory.isnan().all()


def test_what_save_returns_is_what_was_stored_and_shares_no_memory_with_what_was_given(tmp_path: Path) -> None:
    given = checkpoint(3)

    kept = CheckpointFolder(tmp_path).save(given)
    given.aggregates.zero_()

    assert (kept.round, kept.history) == (3, given.history)
    assert torch.equal(kept.aggregates, checkpoint(3).aggregates)


def test_writing_to_a_loaded_checkpoint_does_not_change_its_file(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(3)).aggregates.zero_()

    assert torch.equal(folder.latest().aggregates, checkpoint(3).aggregates)


def test_the_same_checkpoint_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        CheckpointFolder(tmp_path / name).save(checkpoint(3))

    first, second = (next((tmp_path / name).iterdir()).read_bytes() for name in ("first", "second"))

    assert first == second


def test_only_the_last_two_rounds_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for round_ in range(1, 5):
        folder.save(checkpoint(round_))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_00003.safetensors", "round_00004.safetensors"]


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "missing").latest() is None


def test_a_damaged_checkpoint_is_named_with_the_cure(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(3))
    folder.save(checkpoint(4))
    damaged = tmp_path / "round_00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])

    with pytest.raises(ResumeError, match=r"round_00004.*Delete it to go on from the round before"):
        folder.latest()

    damaged.unlink()
    assert folder.latest().round == 3
