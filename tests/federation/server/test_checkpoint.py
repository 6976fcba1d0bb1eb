from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation.server.checkpoint import Checkpoint, CheckpointFolder
from fedsca_pipeline.federation.server.records import RoundRecord, SiteRecord
from fedsca_pipeline.federation.strategies.server_step import ServerState


def record(round_: int) -> RoundRecord:
    return RoundRecord(
        round=round_,
        final=False,
        sites={"a": SiteRecord(bytes_up=7, loss=0.5), "b": SiteRecord(absent="holiday")},
        accepted=("a",),
        similarity=[[[1.0]]],
        weights=[[[1.0]]],
    )


def checkpoint(round_: int) -> Checkpoint:
    return Checkpoint(
        round=round_,
        state=ServerState.initial(2, 3, 1),
        aggregates=torch.full((2, 3), float(round_)),
        bases=torch.ones(2, 3),
        has_base=torch.tensor([True, False]),
        answered=torch.tensor([round_, 0]),
    )


def saved(folder: Path, *rounds: int) -> CheckpointFolder:
    """Return a folder in which these rounds were saved, one after the other."""
    found = CheckpointFolder(folder)
    for round_ in rounds:
        found.save(checkpoint(round_), record(round_))
    return found


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    found = saved(tmp_path, 3).latest()

    assert found.round == 3
    assert torch.equal(found.aggregates, checkpoint(3).aggregates)
    assert found.has_base.tolist() == [True, False]
    assert found.state.memory.isnan().all()


def test_save_returns_the_stored_checkpoint_in_memory_of_its_own(tmp_path: Path) -> None:
    given = checkpoint(3)

    kept = CheckpointFolder(tmp_path).save(given, record(3))
    given.aggregates.zero_()

    assert kept.round == 3
    assert torch.equal(kept.aggregates, checkpoint(3).aggregates)


def test_writing_to_a_loaded_checkpoint_does_not_change_its_file(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(3), record(3)).aggregates.zero_()

    assert torch.equal(folder.latest().aggregates, checkpoint(3).aggregates)


def test_equal_checkpoints_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        saved(tmp_path / name, 3)

    first, second = (contents(tmp_path / name) for name in ("first", "second"))

    assert len(first) == 2
    assert first == second


def test_a_late_round_writes_no_more_than_an_early_one(tmp_path: Path) -> None:
    written = []
    for round_ in range(10, 60):
        before = contents(tmp_path)
        saved(tmp_path, round_)
        written.append(sum(len(data) for name, data in contents(tmp_path).items() if name not in before))

    assert len(set(written)) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_record_of_every_round_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path, *range(1, 8))

    assert list(folder.records(7)) == [record(round_) for round_ in range(1, 8)]
    assert list(folder.records(0)) == []


def test_a_record_without_its_checkpoint_is_ignored(tmp_path: Path, monkeypatch) -> None:
    folder = saved(tmp_path, 1, 2)
    monkeypatch.setattr("fedsca_pipeline.federation.server.checkpoint.write_tensors", killed)

    with pytest.raises(KeyboardInterrupt):
        folder.save(checkpoint(3), record(3))

    assert (tmp_path / "records" / "round_00003.json").is_file()
    assert folder.latest().round == 2
    assert list(folder.records(folder.latest().round)) == [record(1), record(2)]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("round_", "cure"),
    [
        (2, r"Restore a copy .*or restart with --params=force=true"),
        (3, r"Delete .*round_00003\.safetensors to resume"),
    ],
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text('{"round": ')], ids=["gone", "cut"])
def test_a_damaged_record_is_named_with_the_cure(tmp_path: Path, round_: int, cure: str, damage) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "records" / f"round_{round_:05d}.json")

    with pytest.raises(ResumeError, match=rf"records.round_0000{round_}\.json: .*{cure}"):
        list(folder.records(3))


def test_only_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    saved(tmp_path, *range(1, 5))

    found = sorted(path.name for path in tmp_path.glob("*.*"))
    assert found == ["round_00003.safetensors", "round_00004.safetensors"]


def test_a_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "missing").latest() is None


def test_a_damaged_checkpoint_is_named_with_the_cure(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3, 4)
    damaged = tmp_path / "round_00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])

    with pytest.raises(ResumeError, match=r"round_00004.*Delete it to resume from the previous round"):
        folder.latest()

    damaged.unlink()
    assert folder.latest().round == 3
