from __future__ import annotations

from pathlib import Path

import torch

from fedsca_pipeline.federation.site.store import SiteState, SiteStore, Snapshot


def state(round_: int) -> SiteState:
    tensor = torch.full((2,), float(round_))
    return SiteState(
        round_, {"decoder.w": tensor}, {"encoder.a": tensor + 0.5}, {"encoder.a": -tensor}, {"w/step": tensor + 1}
    )


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    store.save_state(state(3), answered=0)

    found = store.state_at(3)

    assert found.round == 3
    for part in ("private", "base", "residual", "moments"):
        expected, got = getattr(state(3), part), getattr(found, part)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_round_done_again_starts_from_the_state_before_it(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    store.save_state(state(1), answered=0)
    store.save_state(state(2), answered=1)

    assert store.state_at(1).round == 1
    assert store.state_at(2).round == 2
    assert store.state_at(0) is None


def test_only_the_last_three_states_stay_on_disk(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    for round_ in range(1, 6):
        store.save_state(state(round_), answered=round_ - 1)

    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == [
        "state_00003.safetensors",
        "state_00004.safetensors",
        "state_00005.safetensors",
    ]


def test_the_state_of_an_earlier_round_is_stored_beside_later_ones(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    for round_ in (6, 7, 8, 1, 2):
        store.save_state(state(round_), answered=round_ - 1)

    assert store.state_at(2).round == 2
    assert store.state_at(1).round == 1


def test_states_of_rounds_that_were_not_accepted_are_deleted_and_earlier_ones_stay(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    for round_ in (1, 2, 3):
        store.save_state(state(round_), answered=round_ - 1)
    for round_ in (4, 5, 6, 7):
        store.save_state(state(round_), answered=3)

    assert [store.state_at(round_).round for round_ in (7, 6, 3, 2)] == [7, 3, 3, 2]


def test_a_snapshot_holds_its_round_and_dice(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    store.save_snapshot("best", Snapshot(4, 0.75, {"w": torch.ones(3)}))

    found = store.snapshot("best")

    assert (found.round, found.dice) == (4, 0.75)
    assert torch.equal(found.tensors["w"], torch.ones(3))
    assert store.snapshot("last") is None


def test_the_best_dice_of_a_repeated_round_is_ignored_in_that_round(tmp_path: Path) -> None:
    store = SiteStore(tmp_path / "a")
    store.save_snapshot("best", Snapshot(4, 0.75, {}))

    assert store.best_dice(before=4) == -1
    assert store.best_dice(before=5) == 0.75
