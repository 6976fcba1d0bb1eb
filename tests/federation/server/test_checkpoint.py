from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation.server.checkpoint import Checkpoint, CheckpointFolder
from fedsca_pipeline.federation.server.records import Matrices, RoundRecord, SiteRecord
from fedsca_pipeline.federation.strategies.server_step import ServerState
from fedsca_pipeline.files import read_json, read_tensors, sealed, unsealed, write_sealed


def record(round_: int) -> RoundRecord:
    return RoundRecord(
        round=round_,
        final=False,
        sites={"a": SiteRecord(bytes_up=7, loss=0.5), "b": SiteRecord(absent="holiday")},
        accepted=("a",),
        similarity=Matrices.of([[[1.0]]]),
        weights=Matrices.of([[[1.0]]]),
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
    found = CheckpointFolder(folder, "run")
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

    kept = CheckpointFolder(tmp_path, "run").save(given, record(3))
    given.aggregates.zero_()

    assert kept.round == 3
    assert torch.equal(kept.aggregates, checkpoint(3).aggregates)


def test_writing_to_a_loaded_checkpoint_does_not_change_its_file(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "run")
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
    monkeypatch.setattr("fedsca_pipeline.federation.server.checkpoint.write_sealed", killed)

    with pytest.raises(KeyboardInterrupt):
        folder.save(checkpoint(3), record(3))

    assert (tmp_path / "records" / "round_00003.json").is_file()
    assert folder.latest().round == 2
    assert list(folder.records(folder.latest().round)) == [record(1), record(2)]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def of_another_run(path: Path) -> None:
    path.write_text(json.dumps(sealed({**unsealed(read_json(path)), "run": "another"})))


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("0.5", "0.7"))


RECORD_DAMAGE = [Path.unlink, lambda path: path.write_text('{"round": '), edited, of_another_run]


@pytest.mark.parametrize("damage", RECORD_DAMAGE, ids=["gone", "cut", "edited", "of another run"])
def test_a_damaged_record_is_named(tmp_path: Path, damage) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "records" / "round_00002.json")

    with pytest.raises(ResumeError, match=r"records.round_00002\.json: the record of round 2 cannot be read"):
        list(folder.records(3))


@pytest.mark.parametrize("damage", RECORD_DAMAGE, ids=["gone", "cut", "edited", "of another run"])
def test_a_run_goes_on_before_a_damaged_newest_record(tmp_path: Path, damage, caplog) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "records" / "round_00003.json")

    assert folder.resume().round == 2
    assert "round_00003.json: the record of round 3 cannot be read" in caplog.text
    assert "goes on after round 2" in caplog.text


def test_an_older_damaged_record_is_refused_with_the_cure(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 3)
    (tmp_path / "records" / "round_00001.json").unlink()

    with pytest.raises(ResumeError, match=rf"round_00001\.json.*Restore these files from a copy.*delete {tmp_path}:"):
        folder.resume()


def test_only_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    saved(tmp_path, *range(1, 5))

    found = sorted(path.name for path in tmp_path.glob("*.*"))
    assert found == ["round_00003.safetensors", "round_00004.safetensors"]


def test_a_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "missing", "run").latest() is None


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def without_round(path: Path) -> None:
    write_sealed(path, read_tensors(path), {"run": "run"})


def with_part_missing(path: Path) -> None:
    write_sealed(
        path, {f"state/{n}": t for n, t in checkpoint(4).state.as_tensors().items()}, {"run": "run", "round": 4}
    )


def of_another_round(path: Path) -> None:
    path.write_bytes(path.with_name("round_00003.safetensors").read_bytes())


def of_another_runs_folder(path: Path) -> None:
    write_sealed(path, read_tensors(path), {"run": "another", "round": 4})


DAMAGE = [flipped, cut, without_round, with_part_missing, of_another_round, of_another_runs_folder]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path: Path, damage, caplog) -> None:
    folder = saved(tmp_path, 1, 2, 3, 4)
    damage(tmp_path / "round_00004.safetensors")
    content = (tmp_path / "round_00004.safetensors").read_bytes()

    found = folder.resume()

    assert found.round == 3
    assert torch.equal(found.aggregates, checkpoint(3).aggregates)
    assert (tmp_path / "round_00004.safetensors.damaged").read_bytes() == content
    assert "round_00004.safetensors" in caplog.text
    assert "goes on after round 3, to the same models" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_checkpoint_is_refused_where_no_run_goes_on(tmp_path: Path, damage) -> None:
    folder = saved(tmp_path, 1, 2, 3, 4)
    damage(tmp_path / "round_00004.safetensors")

    with pytest.raises(ResumeError, match=r"round_00004.*federated_training' again: it goes on from the round before"):
        folder.latest()


def test_the_only_checkpoint_damaged_the_run_starts_again(tmp_path: Path, caplog) -> None:
    folder = saved(tmp_path, 1)
    flipped(tmp_path / "round_00001.safetensors")

    assert folder.resume() is None
    assert "goes on after round 0" in caplog.text


def test_both_checkpoints_damaged_is_a_refusal_with_a_cure_that_holds(tmp_path: Path) -> None:
    folder = saved(tmp_path / "server", 1, 2, 3)
    for path in (tmp_path / "server").glob("*.safetensors"):
        flipped(path)

    for _ in range(2):
        with pytest.raises(ResumeError, match=r"round_00003.*round_00002.*delete .*server:"):
            folder.resume()

    shutil.rmtree(tmp_path / "server")
    assert folder.resume() is None
