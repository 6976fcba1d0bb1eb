from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation.site.store import SiteState, SiteStore, Snapshot
from fedsca_pipeline.files import read_sealed, read_tensors, write_sealed


def state(round_: int) -> SiteState:
    tensor = torch.full((2,), float(round_))
    return SiteState(
        round_, {"decoder.w": tensor}, {"encoder.a": tensor + 0.5}, {"encoder.a": -tensor}, {"w/step": tensor + 1}
    )


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    store.save_state(state(3), answered=0)

    found = store.state_at(3)

    assert found.round == 3
    for part in ("private", "base", "residual", "moments"):
        expected, got = getattr(state(3), part), getattr(found, part)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_round_done_again_starts_from_the_state_before_it(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    store.save_state(state(1), answered=0)
    store.save_state(state(2), answered=1)

    assert store.state_at(1).round == 1
    assert store.state_at(2).round == 2
    assert store.state_at(0) is None


def test_only_the_last_three_states_stay_on_disk(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    for round_ in range(1, 6):
        store.save_state(state(round_), answered=round_ - 1)

    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == [
        "state_00003.safetensors",
        "state_00004.safetensors",
        "state_00005.safetensors",
    ]


def test_the_state_of_an_earlier_round_is_stored_beside_later_ones(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    for round_ in (6, 7, 8, 1, 2):
        store.save_state(state(round_), answered=round_ - 1)

    assert store.state_at(2).round == 2
    assert store.state_at(1).round == 1


def test_states_of_rounds_that_were_not_accepted_are_deleted_and_earlier_ones_stay(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    for round_ in (1, 2, 3):
        store.save_state(state(round_), answered=round_ - 1)
    for round_ in (4, 5, 6, 7):
        store.save_state(state(round_), answered=3)

    assert [store.state_at(round_).round for round_ in (7, 6, 3, 2)] == [7, 3, 3, 2]


def test_a_snapshot_holds_its_round_and_dice(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    store.save_snapshot("best", Snapshot(4, 0.75, {"w": torch.ones(3)}))

    found = store.snapshot("best")

    assert (found.round, found.dice) == (4, 0.75)
    assert torch.equal(found.tensors["w"], torch.ones(3))
    assert store.snapshot("last") is None


def test_the_best_dice_of_a_repeated_round_is_ignored_in_that_round(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a", "run")
    store.save_snapshot("best", Snapshot(4, 0.75, {}))

    assert store.best_dice(before=4) == -1
    assert store.best_dice(before=5) == 0.75


def store_with_states(folder: Path, run: str = "run") -> SiteStore:
    store = SiteStore(folder, run)
    for round_ in (1, 2, 3):
        if round_ > 1:
            store.save_snapshot("best", Snapshot(round_ - 1, round_ / 10, {"w": torch.full((2,), float(round_))}))
        store.save_state(state(round_), answered=round_ - 1)
    return store


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def with_an_unknown_part(path: Path) -> None:
    label, tensors = read_sealed(path)
    write_sealed(path, {**tensors, "gossip/x": torch.ones(1)}, label)


def without_round(path: Path) -> None:
    label, tensors = read_sealed(path)
    write_sealed(path, tensors, {name: value for name, value in label.items() if name != "round"})


def unlabelled(path: Path) -> None:
    write_sealed(path, read_tensors(path), {})


def of_another_site(path: Path) -> None:
    other = store_with_states(path.parent.with_name("b"))
    path.write_bytes((other.folder / path.name).read_bytes())


def of_another_run(path: Path) -> None:
    other = store_with_states(path.parent.parent / "other" / path.parent.name, "other")
    path.write_bytes((other.folder / path.name).read_bytes())


def of_another_round(path: Path) -> None:
    path.write_bytes(path.with_name("state_00002.safetensors").read_bytes())


DAMAGE = [flipped, cut, without_round, unlabelled, of_another_site, of_another_run]


@pytest.mark.parametrize("damage", [*DAMAGE, with_an_unknown_part, of_another_round])
def test_a_damaged_state_is_set_aside_and_counts_as_missing(tmp_path: Path, damage, caplog) -> None:
    store = store_with_states(tmp_path / "a")
    damage(tmp_path / "a" / "state_00003.safetensors")

    assert store.state_at(3).round == 2
    assert (tmp_path / "a" / "state_00003.safetensors.damaged").is_file()
    assert "state_00003.safetensors" in caplog.text
    assert "the state of round 3 is missing or damaged" in store.fault(3, answered=3, last=None)
    assert store.fault(2, answered=2, last=None) is None


@pytest.mark.parametrize("damage", [*DAMAGE, Path.unlink])
def test_a_damaged_or_deleted_best_model_is_noticed(tmp_path: Path, damage) -> None:
    store, best = store_with_states(tmp_path / "a"), tmp_path / "a" / "best.safetensors"
    assert store.fault(3, answered=3, last=None) is None
    damage(best)

    assert f"{best}: the best model, of round 2, is missing" in store.fault(3, answered=3, last=None)
    assert store.fault(2, answered=2, last=None) is None
    assert store.snapshot("best") is None
    assert store.best_dice(before=9) == -1


def test_an_older_best_model_in_its_place_is_noticed(tmp_path: Path) -> None:
    store = store_with_states(tmp_path / "a")
    store.save_snapshot("best", Snapshot(1, 0.9, {}))

    assert "the best model, of round 2" in store.fault(3, answered=3, last=None)


def test_the_last_model_is_no_best_model(tmp_path: Path) -> None:
    store = store_with_states(tmp_path / "a")
    store.save_snapshot("last", Snapshot(3, 0.1, {}))
    (tmp_path / "a" / "last.safetensors").replace(tmp_path / "a" / "best.safetensors")

    assert store.snapshot("best") is None
    assert "the model of round 3" in store.fault(4, answered=0, last=3)


def test_a_lost_best_model_is_refused_at_the_end_and_said_before(tmp_path: Path, caplog) -> None:
    store = store_with_states(tmp_path / "a")
    store.save_snapshot("last", Snapshot(3, 0.1, {}))
    assert {name: model.round for name, model in store.models().items()} == {"best": 2, "last": 3}
    (tmp_path / "a" / "best.safetensors").unlink()

    with pytest.raises(ResumeError, match=r"best\.safetensors: the best model, of round 2, .*Restore it from a copy"):
        store.models()
    assert store.best_dice(before=3, known=2) == -1
    assert "the best model, of round 2, is gone" in caplog.text
    assert SiteStore(tmp_path / "b", "run").models() == {"best": None, "last": None}


def test_a_file_that_was_set_aside_before_stays(tmp_path: Path) -> None:
    store = store_with_states(tmp_path / "a")
    for _ in range(2):
        store.save_state(state(3), answered=2)
        flipped(tmp_path / "a" / "state_00003.safetensors")
        store.state_at(3)

    assert len(list((tmp_path / "a").glob("state_00003*.damaged*"))) == 2
